"""A CLIP small enough to be pretrained on a laptop CPU in minutes.

Two towers of open_clip with three changes that made the difference at this size: a convolutional stem
instead of the patch projection, attention of each patch limited to its 3x3 neighbours (an additive mask, so
the weights remain those of an ordinary ViT), and average pooling of the patch tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn

from lexiseg.settings import Block


class TinyClipConfig(Block):
    """Sizes of the tiny CLIP."""

    vocab_size: int
    image_size: int = 64
    patch_size: int = 8
    width: int = 128
    vision_layers: int = 3
    text_layers: int = 2
    heads: int = 4
    context_length: int = 32
    embed_dim: int = 128


class ConvStem(nn.Module):
    """Three-channel image -> patch grid, with the two finer maps a dense head may want.

    Strides: 2 (32 channels), 4 (64 channels), 8 (`width` channels).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fine = _conv_bn_relu(3, 32, stride=2)
        self.middle = nn.Sequential(_conv_bn_relu(32, 64, stride=2), _conv_bn_relu(64, 64, stride=1))
        self.coarse = nn.Sequential(_conv_bn_relu(64, 128, stride=2), nn.Conv2d(128, width, 1, bias=False))

    def forward(self, images: Tensor) -> Tensor:
        return self.levels(images)[-1]

    def levels(self, images: Tensor) -> list[Tensor]:
        """The maps at strides 2, 4 and 8."""
        fine = self.fine(images)
        middle = self.middle(fine)
        return [fine, middle, self.coarse(middle)]


class TinyVision(VisionTransformer):
    """open_clip's VisionTransformer with a conv stem, local attention and any grid size."""

    def __init__(self, config: TinyClipConfig) -> None:
        super().__init__(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.width,
            layers=config.vision_layers,
            heads=config.heads,
            mlp_ratio=4.0,
            output_dim=config.embed_dim,
            pool_type="avg",
        )
        self.conv1 = ConvStem(config.width)  # type: ignore[assignment]

    def tokens(self, grid: Tensor, *, crop: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """Class and patch tokens before the first block, and the attention mask.

        Args:
            grid: stem output (B, D, h, w).
            crop: for grids smaller than the trained one, the (row, column) at which positions are read.
                None resizes the positions bilinearly where the size differs.

        Returns:
            tokens (B, 1 + h*w, D) and the additive mask (1 + h*w, 1 + h*w).
        """
        height, width = grid.shape[-2:]
        tokens = grid.flatten(2).transpose(1, 2)
        classes = self.class_embedding.expand(len(tokens), 1, -1)
        tokens = torch.cat([classes, tokens], dim=1) + self._positions(height, width, crop)
        return self.ln_pre(tokens), local_attention_mask(height, width).to(tokens)

    def embed(self, images: Tensor, *, crop: tuple[int, int] | None = None) -> Tensor:
        """Image embeddings (B, C), not normalised. Images are normalised floats (B, 3, H, W)."""
        tokens, mask = self.tokens(self.conv1(images), crop=crop)
        pooled, _ = self._pool(self.transformer(tokens, attn_mask=mask))
        return pooled @ self.proj  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x)

    def _positions(self, height: int, width: int, crop: tuple[int, int] | None) -> Tensor:
        rows, columns = self.grid_size
        first, rest = self.positional_embedding[:1], self.positional_embedding[1:]
        grid = rest.view(rows, columns, -1)
        if crop is not None:
            grid = grid[crop[0] : crop[0] + height, crop[1] : crop[1] + width]
        elif (height, width) != (rows, columns):
            grid = F.interpolate(grid.permute(2, 0, 1)[None], size=(height, width), mode="bilinear")[0].permute(1, 2, 0)
        return torch.cat([first, grid.reshape(height * width, -1)])


class TinyText(TextTransformer):
    """open_clip's TextTransformer, run on texts trimmed to the longest one of the batch."""

    def forward(self, text: Tensor) -> Tensor:
        length = text.shape[1]
        tokens = self.token_embedding(text) + self.positional_embedding[:length]
        # The causal mask is built for the full context, and open_clip does not slice it.
        tokens = self.transformer(tokens, attn_mask=self.attn_mask[:length, :length])  # type: ignore[index]
        tokens = self.ln_final(tokens)
        # The end-of-text id is the largest one of the vocabulary, so argmax finds it.
        pooled = tokens[torch.arange(len(text), device=text.device), text.argmax(dim=-1)]
        return pooled @ self.text_projection


class TinyClip(nn.Module):
    """The pair of towers and the learned logit scale."""

    def __init__(self, config: TinyClipConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = TinyVision(config)
        self.text = TinyText(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            width=config.width,
            heads=config.heads,
            layers=config.text_layers,
            output_dim=config.embed_dim,
        )
        self.logit_scale = nn.Parameter(torch.log(torch.tensor(1 / 0.07)))

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised floats -> (B, C), not normalised."""
        return self.visual(images)

    def encode_text(self, text: Tensor) -> Tensor:
        """(B, L) token ids -> (B, C), not normalised."""
        return self.text(text)


def local_attention_mask(height: int, width: int) -> Tensor:
    """Additive mask (1 + h*w, 1 + h*w): the class token sees all, a patch its 3x3 neighbours and no class token."""
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    near = ((rows[:, None] - rows).abs() <= 1) & ((columns[:, None] - columns).abs() <= 1)
    mask = torch.full((1 + height * width, 1 + height * width), float("-inf"))
    mask[0] = 0
    mask[1:, 1:][near] = 0
    return mask


def _conv_bn_relu(channels_in: int, channels_out: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )
