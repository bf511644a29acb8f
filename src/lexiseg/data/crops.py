"""Fixed crops: the centre square that STEGO evaluates on, and the five crops that it learns from."""

from __future__ import annotations

import numpy as np
from PIL import Image


def centre_square(array: np.ndarray, side: int, *, nearest: bool) -> np.ndarray:
    """Scale the shorter side to `side` pixels and cut out the square in the middle.

    Args:
        array: uint8 RGB (H, W, 3), or class ids (H, W).
        side: of the square, in pixels.
        nearest: take the nearest pixel, as STEGO's code does for pictures too; else Pillow's bilinear filter, which
            smooths where it shrinks. Class ids always take the nearest.

    Returns:
        (side, side, 3) or (side, side), of the same type.
    """
    height, width = array.shape[:2]
    short = min(height, width)
    # torchvision's rule, which the authors' code goes by: the longer side is rounded down.
    tall, wide = (side if length == short else int(side * length / short) for length in (height, width))
    size = (tall, wide)
    if (height, width) != size:
        array = _resized(array, size, nearest=nearest)
    top, left = (round((length - side) / 2) for length in size)
    return np.ascontiguousarray(array[top : top + side, left : left + side])


def five_crops(array: np.ndarray) -> list[np.ndarray]:
    """The four corners and the centre of a picture (H, W, …), each half as high and half as wide."""
    height, width = (max(1, length // 2) for length in array.shape[:2])
    bottom, right = array.shape[0] - height, array.shape[1] - width
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))]
    return [array[top : top + height, left : left + width] for top, left in corners]


def _resized(array: np.ndarray, size: tuple[int, int], *, nearest: bool) -> np.ndarray:
    # Pillow's nearest pixel, as in the authors' code, is the one below the middle of the new one; torch's is another.
    ids = array.ndim == 2
    image = Image.fromarray(array.astype(np.int32) if ids else array)
    kind = Image.Resampling.NEAREST if ids or nearest else Image.Resampling.BILINEAR
    return np.array(image.resize((size[1], size[0]), kind)).astype(array.dtype, copy=False)
