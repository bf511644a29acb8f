"""Pixel-text correlation (paper section 3.2), with and without the pixel embeddings in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SMALLEST_NORM = 1e-6
# Of |x|^2 against the terms it is the sum of: below it, rounding in float32 decides what is left of them.
SMALLEST_SHARE = 1e-6


def correlate(embedded: Tensor, text: Tensor) -> Tensor:
    """Cosines (B, N, h, w) of unit pixel embeddings (B, C, h, w) and unit label vectors (N, C) or (B, N, C)."""
    batch, channels, height, width = embedded.shape
    return (text @ embedded.reshape(batch, channels, height * width)).reshape(batch, -1, height, width)


def correlate_through_head(features: Tensor, head: nn.Conv2d, text: Tensor) -> Tensor:
    """The same cosines straight from the decoder's features, where the head is all that lies between.

    With x = W f + b, the product t.x is (t W) f + t.b, and |x|^2 is f'(W'W)f + 2 b'W f + b.b: N + F instead of
    C channels per pixel. For few labels and F = 64 beside C = 512 that saves most of the time of a training step
    and of its memory; for more labels than C the embeddings are cheaper.

    Args:
        features: decoder output (B, F, h, w).
        head: 1x1 convolution F -> C with bias.
        text: unit label vectors (N, C), or (B, N, C) where every picture has labels of its own.

    Returns:
        (B, N, h, w), equal to `correlate(normalise(head(features)), text)` up to rounding; never in half precision.
    """
    batch, channels, height, width = features.shape
    weight, bias = head.weight[:, :, 0, 0], head.bias
    assert bias is not None  # LSeg's head has one
    # The terms of |x|^2 may cancel: in bfloat16 a "cosine" of thousands comes out where W f and -b are close.
    with torch.autocast(features.device.type, enabled=False):
        flat = features.reshape(batch, channels, height * width).to(weight.dtype)
        products = (text @ weight) @ flat + (text @ bias)[..., None]
        outer = (flat * ((weight.T @ weight) @ flat)).sum(dim=1, keepdim=True) + bias @ bias
        squared = outer + 2 * ((weight.T @ bias)[None] @ flat)
        floor = (SMALLEST_SHARE * outer.detach()).clamp(min=SMALLEST_NORM**2)
        return (products / torch.maximum(squared, floor).sqrt()).reshape(batch, -1, height, width)
