"""Pixel-adaptive mask refinement, PAMR (Araslanov and Roth, CVPR 2020, section 3.3), as TCL evaluates with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DILATIONS = (1, 2, 4, 8, 12, 24)
# The eight pixels around a centre, row by row.
_AROUND = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if row or column)
# Values of masks that are refined together on a CPU: about what its cache holds (measured: 2^15 is slower).
_CACHED_VALUES = 2**18


def pamr(image: Tensor, masks: Tensor, *, iterations: int = 10, dilations: Sequence[int] = DILATIONS) -> Tensor:
    """Masks drawn to the edges of a picture: each pixel becomes a mean over its neighbours that look like it.

    Letters: B pictures, N masks each, H x W pixels, P = 8 neighbours per dilation.

    The neighbours of all masks are weighted alike, so that one pass over shifted views serves all N; nothing of the
    size N x P x H x W is ever made.

    Args:
        image: guidance, float (B, 3, H, W), normalised as for the network.
        masks: float (B, N, h, w); where it is not H x W, it is resized first, bilinearly with `align_corners=True`.
        iterations: how often; 0 only resizes.
        dilations: distances of the neighbours in pixels.

    Returns:
        (B, N, H, W), of the range that `masks` has.
    """
    if masks.shape[-2:] != image.shape[-2:]:
        masks = F.interpolate(masks, size=image.shape[-2:], mode="bilinear", align_corners=True)
    if iterations == 0:
        return masks
    weights = pamr_affinity(image, dilations=dilations).to(masks.dtype)
    # A few masks through all iterations stay in the cache of a CPU; a GPU is better used by all at once.
    together = max(1, _CACHED_VALUES // image[:, 0].numel()) if image.device.type == "cpu" else masks.shape[1]
    refined = []
    for some in masks.split(together, dim=1):
        for _ in range(iterations):
            some = _weighted_mean(some, weights, dilations)
        refined.append(some)
    return torch.cat(refined, dim=1)


def pamr_affinity(image: Tensor, *, dilations: Sequence[int] = DILATIONS) -> Tensor:
    """How alike each pixel and its neighbours are: (B, P, H, W), which sums to 1 over P.

    Neighbours are in the order of `dilations`, those of one row by row; beyond the border is the nearest pixel.
    """
    if image.dtype in (torch.float16, torch.bfloat16):  # where 1e-8 would be nothing
        image = image.float()
    spread = 1e-8 + 0.1 * local_std(image, dilations=dilations)
    distances = [((view - image).abs() / spread).mean(dim=1) for view in _neighbours(image, dilations)]
    return torch.stack(distances, dim=1).neg_().softmax(dim=1)


def local_std(image: Tensor, *, dilations: Sequence[int] = DILATIONS) -> Tensor:
    """Unbiased standard deviation (B, 3, H, W) of each channel over the 3 x 3 windows of all dilations together.

    The centre counts once per dilation.
    """
    count, centre = 9 * len(dilations), len(dilations)
    mean = image * centre
    for view in _neighbours(image, dilations):
        mean += view
    mean /= count
    # Squares of differences, since those of values cancel where the picture is flat.
    squares = centre * (image - mean) ** 2
    for view in _neighbours(image, dilations):
        squares += (view - mean) ** 2
    return (squares / (count - 1)).sqrt()


def _neighbours(tensor: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """The tensor (B, C, H, W) shifted to each neighbour, one view after the other."""
    height, width = tensor.shape[-2:]
    border = max(dilations)
    padded = F.pad(tensor, (border,) * 4, mode="replicate")
    for dilation in dilations:
        for row, column in _AROUND:
            top, left = border + row * dilation, border + column * dilation
            yield padded[..., top : top + height, left : left + width]


def _weighted_mean(masks: Tensor, weights: Tensor, dilations: Sequence[int]) -> Tensor:
    total = torch.zeros_like(masks)
    for number, view in enumerate(_neighbours(masks, dilations)):
        total.addcmul_(view, weights[:, number : number + 1])
    return total
