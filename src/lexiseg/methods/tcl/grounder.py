"""The grounder: tokens of a frozen CLIP -> dense embeddings in its text space (paper section 3.2)."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from lexiseg.encoders.clip import value_path_block
from lexiseg.methods.tcl.decoder import GatedDecoder
from lexiseg.methods.tcl.masks import SimToMask, pixel_text_cosines


class Grounder(nn.Module):
    """A copy of CLIP's last block in which every token attends to itself only, the gated decoder, a copy of the head.

    Letters: B images, N texts, L = 1 + h*w tokens of width D, C channels of the text space; masks are s times as fine
    as the grid of tokens.

    Args:
        visual: a VisionTransformer of open_clip, or a TinyVision; it is not changed.
        stages: of the decoder: s is 2 to that power.
        units: gated units per stage.
        kernel: side of the decoder's convolutions.
        gate: initial value of the gates.
        scale, bias: initial values of the mask's scale and bias.
    """

    def __init__(
        self,
        visual: Any,
        *,
        stages: int = 2,
        units: int = 2,
        kernel: int = 3,
        gate: float = 0.0,
        scale: float = 10.0,
        bias: float = -2.5,
    ) -> None:
        super().__init__()
        self.block = copy.deepcopy(visual.transformer.resblocks[-1])
        self.decoder = GatedDecoder(visual.proj.shape[0], stages=stages, units=units, kernel=kernel, gate=gate)
        self.ln_post = copy.deepcopy(visual.ln_post)
        self.proj = nn.Parameter(visual.proj.detach().clone())
        self.sim_to_mask = SimToMask(scale=scale, bias=bias)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Dense embeddings (B, C, s h, s w), not normalised, of tokens (B, L, D) before CLIP's last block."""
        patches = value_path_block(self.block, tokens)[:, 1:]
        features = self.decoder(patches.transpose(1, 2).unflatten(2, grid))
        # The head comes after the decoder: CLIP's last LayerNorm never sees the grid of tokens.
        return (self.ln_post(features.permute(0, 2, 3, 1)) @ self.proj).permute(0, 3, 1, 2)

    def mask_logits(self, embedding: Tensor, text: Tensor) -> Tensor:
        """Logits (B, N, s h, s w) of the masks of dense embeddings for texts (N, C); their sigmoid is the soft mask."""
        return self.sim_to_mask(pixel_text_cosines(embedding, text))
