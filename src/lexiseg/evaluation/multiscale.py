"""Scores of one picture summed over scales, mirrored copies and sliding windows, as LSeg's release evaluates ADE20K."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

STRIDE = 2 / 3  # of the windows, as a share of their side


def multi_scale_scores(
    image: Tensor,
    forward: Callable[[Tensor], Tensor],
    *,
    scales: Sequence[float],
    base_size: int | None,
    window: int | None,
    flip: bool,
    black: Sequence[float],
    size: tuple[int, int] | None = None,
    multiple: int = 1,
) -> Tensor:
    """Sum of the logits over scales and mirrored copies; windows that overlap are averaged.

    At scale s the long side becomes ceil(base_size * s) and the short one follows, rounded half up. A picture that fits
    into the window is padded to it at the bottom and the right; a larger one is covered by windows that start on a grid
    of int(window * 2/3) pixels, those at the edge padded too.

    Letters: N labels, H x W pixels.

    Args:
        image: normalised, float (1, 3, H, W).
        forward: (B, 3, h, w) -> logits (B, N, h, w).
        scales: the s.
        base_size: long side at s = 1, in pixels; None: the picture's own.
        window: side of the square windows in pixels; None: the whole picture at once.
        flip: add the logits of the mirrored picture.
        black: three values of a black pixel after normalisation, which pad.
        size: (height, width) of the result; None: H x W.
        multiple: without windows, both sides become multiples of it.

    Returns:
        (1, N, *size), not divided by the number of scales and copies.
    """
    height, width = image.shape[-2:]
    total = None
    for scale in scales:
        scores = _at_scale(
            image, forward, _scaled(height, width, scale, base_size, multiple, window), window, flip, black
        )
        scores = _resized(scores, size or (height, width))
        total = scores if total is None else total.add_(scores)
    assert total is not None  # the settings want at least one scale
    return total


def pad_bottom_right(image: Tensor, *, height: int, width: int, black: Sequence[float]) -> Tensor:
    """(B, 3, h, w) -> (B, 3, height, width): black below and to the right; a larger side stays."""
    rows, columns = max(0, height - image.shape[-2]), max(0, width - image.shape[-1])
    channels = [F.pad(image[:, i], (0, columns, 0, rows), value=float(value)) for i, value in enumerate(black)]
    return torch.stack(channels, dim=1)


def _scaled(
    height: int, width: int, scale: float, base_size: int | None, multiple: int, window: int | None
) -> tuple[int, int]:
    longer = max(height, width)
    long = math.ceil((base_size or longer) * scale)
    sides = tuple(long if side == longer else int(side * long / longer + 0.5) for side in (height, width))
    if window is None:
        sides = tuple(max(1, round(side / multiple)) * multiple for side in sides)
    return max(1, sides[0]), max(1, sides[1])


def _at_scale(
    image: Tensor,
    forward: Callable[[Tensor], Tensor],
    sides: tuple[int, int],
    window: int | None,
    flip: bool,
    black: Sequence[float],
) -> Tensor:
    height, width = sides
    scaled = _resized(image, sides)
    if window is None:
        return _both_ways(scaled, forward, flip)
    padded = pad_bottom_right(scaled, height=window, width=window, black=black)
    rows, columns = padded.shape[-2:]
    if max(height, width) <= window:
        return _both_ways(padded, forward, flip)[..., :height, :width]
    stride = int(window * STRIDE)
    total, count = None, padded.new_zeros(1, 1, rows, columns)
    for top in _starts(rows, window, stride):
        for left in _starts(columns, window, stride):
            piece = padded[..., top : top + window, left : left + window]
            covered = piece.shape[-2:]
            piece = pad_bottom_right(piece, height=window, width=window, black=black)
            scores = _both_ways(piece, forward, flip)[..., : covered[0], : covered[1]]
            if total is None:
                total = scores.new_zeros(*scores.shape[:2], rows, columns)
            total[..., top : top + window, left : left + window] += scores
            count[..., top : top + window, left : left + window] += 1
    assert total is not None  # there is at least one window
    return (total / count)[..., :height, :width]


def _starts(side: int, window: int, stride: int) -> range:
    return range(0, (math.ceil((side - window) / stride) + 1) * stride, stride)


def _both_ways(image: Tensor, forward: Callable[[Tensor], Tensor], flip: bool) -> Tensor:
    scores = forward(image)
    return scores + forward(image.flip(-1)).flip(-1) if flip else scores


def _resized(tensor: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(tensor.shape[-2:]) == tuple(size):
        return tensor
    return F.interpolate(tensor, size=size, mode="bilinear", align_corners=True)
