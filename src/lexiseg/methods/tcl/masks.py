"""From similarities of pixels and texts to masks (paper section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6  # of all L2 norms; so large because the authors compute them in float16


def unit(x: Tensor, *, dim: int = -1) -> Tensor:
    """x / max(|x|, 1e-6) along `dim`."""
    return F.normalize(x, dim=dim, eps=NORM_EPS)


def pixel_text_cosines(embedding: Tensor, text: Tensor) -> Tensor:
    """Cosines (B, N, h, w) of dense embeddings (B, C, h, w) and text embeddings (N, C), neither of them normalised."""
    cosines = _Cosines.apply(embedding.flatten(2), unit(text))
    return cosines.unflatten(2, embedding.shape[-2:])  # type: ignore[union-attr]


class _Cosines(torch.autograd.Function):
    """Cosines (B, N, P) of pixels (B, C, P), not normalised, and unit vectors (N, C).

    Products are computed in the pixels' format, which mixed precision makes bfloat16 while texts stay float32. The
    norms divide the products, and the gradient is written into one array: none of the size of the pixels is made
    besides, where autograd by itself makes three.
    """

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, text: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(pixels, dim=1, keepdim=True)
        text = text.to(pixels.dtype)
        cosines = text @ pixels / norms.clamp(min=NORM_EPS)
        ctx.save_for_backward(pixels, text, norms, cosines)
        return cosines

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        pixels, text, norms, cosines = ctx.saved_tensors
        gradient, clamped = gradients[0], norms.clamp(min=NORM_EPS)
        scaled = (gradient / clamped).to(pixels.dtype)
        of_pixels = of_text = None
        if ctx.needs_input_grad[0]:
            of_pixels = text.T @ scaled
            # Where the norm was clamped it is a constant.
            along = (gradient * cosines).sum(dim=1, keepdim=True) / clamped.square() * (norms > NORM_EPS)
            of_pixels.addcmul_(pixels, along.to(pixels.dtype), value=-1)
        if ctx.needs_input_grad[1]:
            of_text = (scaled @ pixels.transpose(1, 2)).sum(dim=0)
        return of_pixels, of_text


class SimToMask(nn.Module):
    """Soft and hard masks of cosines, by one learnable scale and bias: sigmoid(w s + b).

    Args:
        scale: initial w.
        bias: initial b; with 10 and -2.5 a mask is at 0.5 where the cosine is 0.25.
    """

    def __init__(self, *, scale: float = 10.0, bias: float = -2.5) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, cosines: Tensor) -> Tensor:
        """Logits of the masks, of the shape of `cosines`; their sigmoid is the soft mask."""
        return self.scale * cosines + self.bias


def hard_mask(logits: Tensor, noise: Tensor | None, *, temperature: float = 1.0) -> Tensor:
    """A mask of zeros and ones, with the gradient of a soft one (two-class Gumbel-max, straight through).

    Args:
        logits: of the soft mask.
        noise: uniform in (0, 1), of the same shape; None: no noise and no gradient, soft mask > 0.5.
        temperature: of the soft mask that the gradient comes from.
    """
    if noise is None:
        return (logits > 0).to(logits.dtype)
    soft = ((logits + noise.logit()) / temperature).sigmoid()
    return (soft > 0.5).to(soft.dtype) - soft.detach() + soft
