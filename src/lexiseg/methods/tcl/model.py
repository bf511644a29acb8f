"""TCL: a grounder on a frozen CLIP, contrasted through the regions that it finds."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexiseg.encoders.clip import value_path_block, vit_tokens
from lexiseg.methods.tcl.grounder import Grounder
from lexiseg.methods.tcl.masks import hard_mask, pixel_text_cosines

# Of the knowledge branch: sigmoid(10 (cos - 0.25)), where an untrained mask has its 0.5.
KNOWLEDGE_SCALE, KNOWLEDGE_SHIFT = 10.0, 0.25


class TCL(nn.Module):
    """The frozen image tower of a CLIP and the grounder on it.

    Letters: b images of this rank, N texts, C channels of the text space, H x W pixels, h x w the mask grid.

    Args:
        visual: image tower; its weights stay as they are.
        temperature: initial value of both temperatures of the losses.
        grounder: arguments of `Grounder`.

    Attributes:
        image_log_scale: learned logit scale of TCL_v, as a logarithm.
        feature_log_scale: the same of TCL_f.
    """

    def __init__(self, visual: Any, *, temperature: float = 0.07, **grounder: Any) -> None:
        super().__init__()
        self.visual = visual.eval().requires_grad_(False)
        self.grounder = Grounder(visual, **grounder).requires_grad_(True)
        self.image_log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.feature_log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def train(self, mode: bool = True) -> TCL:
        """As usual; the frozen tower stays in evaluation mode."""
        super().train(mode)
        self.visual.eval()
        return self

    def embed(self, images: Tensor) -> Tensor:
        """The grounder's dense embeddings (b, C, h, w) of normalised images (b, 3, H, W), not normalised."""
        return self.grounder(*self.tokens(images))

    @torch.no_grad()
    def knowledge(self, tokens: Tensor, grid: tuple[int, int], text: Tensor) -> Tensor:
        """Masks (b, N, *grid) of the untrained tower: its own dense embeddings against texts (N, C)."""
        last = value_path_block(self.visual.transformer.resblocks[-1], tokens)[:, 1:]
        dense = (self.visual.ln_post(last) @ self.visual.proj).transpose(1, 2).unflatten(2, grid)
        return (KNOWLEDGE_SCALE * (pixel_text_cosines(dense, text) - KNOWLEDGE_SHIFT)).sigmoid()

    def embed_masked(self, images: Tensor, logits: Tensor, noise: Tensor | None, *, temperature: float = 1.0) -> Tensor:
        """CLIP's embeddings (b, C) of images with all that lies outside of a hard mask set to the mean colour.

        Args:
            images: normalised, (b, 3, H, W).
            logits: of the mask of each image's own text, (b, 1, h, w); gradients flow into them.
            noise: see `hard_mask`.
            temperature: see `hard_mask`.
        """
        masks = F.interpolate(hard_mask(logits, noise, temperature=temperature), size=images.shape[-2:], mode="nearest")
        # By hand, since open_clip's own forward is for pictures of the trained size alone.
        tokens, mask, _ = vit_tokens(self.visual, images * masks, antialias=False)
        pooled, _ = self.visual._pool(self.visual.transformer(tokens, attn_mask=mask))
        return pooled @ self.visual.proj

    def grid(self, images: Tensor) -> tuple[int, int]:
        """The mask grid (h, w) of images (b, 3, H, W)."""
        finer = 2 ** len(self.grounder.decoder.stages)
        return tuple(
            side // patch * finer for side, patch in zip(images.shape[-2:], self.visual.patch_size, strict=True)
        )  # type: ignore[return-value]

    @torch.no_grad()
    def tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (b, 1 + cells, D) before the last block, and the grid of cells."""
        tokens, mask, grid = vit_tokens(self.visual, images, antialias=False)
        for block in self.visual.transformer.resblocks[:-1]:
            tokens = block(tokens, attn_mask=mask)
        return tokens, grid
