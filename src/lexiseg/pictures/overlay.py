"""A label map over its photograph, with the names written on the regions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import binary_dilation, distance_transform_edt
from scipy.ndimage import label as connected_parts

from lexiseg.pictures.palette import palette
from lexiseg.pictures.text import draw_text, text_size

# A picture whose longer side is below this is enlarged, or names could not be read.
_READABLE_SIDE = 384
# Names are placed on a copy of the label map of about this size; finer would only cost time.
_PLACING_SIDE = 320
_SMALLEST_REGION = 0.006
_NAMES_PER_LABEL = 3
# Cells left free beside a name, so that two names do not read as one.
_SPACE = 4
_NAMES = 30


def overlay(
    image: np.ndarray,
    label_map: np.ndarray,
    labels: Sequence[str],
    *,
    alpha: float = 0.6,
    names: bool = True,
) -> np.ndarray:
    """Tint a picture by its label map, draw the borders of regions and write names on the large ones.

    A picture whose longer side is below 384 pixels is enlarged by a whole factor first (nearest neighbour).
    Pixels with a label outside 0..N-1, such as the ignored ones, are grey and hatched.

    Args:
        image: (H, W, 3) uint8 RGB.
        label_map: (H, W) integers, index into `labels`.
        labels: N names; the colours depend on the set of names, not on their order.
        alpha: strength of the tint, 0 (the photograph in grey) to 1 (flat colours).
        names: write names on regions.

    Returns:
        (f * H, f * W, 3) uint8 RGB, f = the factor of enlargement (1 for pictures of 384 pixels and more).

    Example:
        >>> overlay(photo, result.label_map, result.labels).shape == photo.shape
        True
    """
    image, label_map = enlarged(image), enlarged(label_map)
    valid = (label_map >= 0) & (label_map < len(labels))
    ids = np.where(valid, label_map, 0)
    # The photograph in grey gives the shades, the label alone the hue: colours look as they do in the legend.
    grey = image.mean(axis=2, keepdims=True, dtype=np.float32)
    colours = palette(labels).astype(np.float32)
    picture = np.where(valid[..., None], 0.85 * (1 - alpha) * grey + alpha * colours[ids], _hatched(grey))
    border = _borders(np.where(valid, label_map, -1), width=max(1, round(min(label_map.shape) / 400)))
    picture[border] = 0.3 * picture[border] + 0.7 * 255  # not solid, or thin things would be all border
    picture = picture.round().astype(np.uint8)
    if not names:
        return picture
    canvas_image = Image.fromarray(picture)
    canvas = ImageDraw.Draw(canvas_image)
    size = max(12, round(min(label_map.shape) / 26))
    rim = max(1, size // 8)
    for name, left, top in _places(np.where(valid, label_map, -1), labels, size=size, rim=rim):
        draw_text(canvas, name, left=left, top=top, size=size, outline=rim)
    return np.asarray(canvas_image)


def enlarged(image: np.ndarray) -> np.ndarray:
    """A small picture or label map as `overlay` enlarges it; a large one as it is."""
    factor = max(1, math.ceil(_READABLE_SIDE / max(image.shape[:2])))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _hatched(grey: np.ndarray) -> np.ndarray:
    rows, columns = np.ogrid[: grey.shape[0], : grey.shape[1]]
    return 0.45 * grey + np.where((rows + columns) // 3 % 4 == 0, np.float32(62), np.float32(40))[..., None]


def _borders(label_map: np.ndarray, *, width: int) -> np.ndarray:
    """Bool (H, W): the pixels left of and above a change of label, `width` pixels thick."""
    edge = np.zeros(label_map.shape, dtype=bool)
    edge[:, :-1] |= label_map[:, :-1] != label_map[:, 1:]
    edge[:-1] |= label_map[:-1] != label_map[1:]
    return binary_dilation(edge, np.ones((width, width))) if width > 1 else edge


def _places(label_map: np.ndarray, labels: Sequence[str], *, size: int, rim: int) -> list[tuple[str, int, int]]:
    """Where names go: (name, left, top) in pixels; whole boxes inside the picture, none over another."""
    step = max(1, max(label_map.shape) // _PLACING_SIDE)
    small = label_map[step // 2 :: step, step // 2 :: step]
    taken = np.zeros(small.shape, dtype=bool)
    places = []
    for _, label, region in _regions(small)[: 2 * _NAMES]:
        if len(places) == _NAMES:
            break
        width, height = text_size(labels[label], size=size, outline=rim)
        box = math.ceil(height / step) + 1, math.ceil(width / step) + 1
        if box[0] > small.shape[0] or box[1] > small.shape[1]:
            continue
        corner = _best_corner(region, taken, box)
        if corner is None:
            continue
        row, column = corner
        taken[max(0, row - 1) : row + box[0] + 1, max(0, column - _SPACE) : column + box[1] + _SPACE] = True
        top = min(row * step, label_map.shape[0] - height)
        left = min(column * step, label_map.shape[1] - width)
        places.append((labels[label], left, top))
    return places


def _regions(label_map: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """Connected regions that deserve a name, largest first: (pixels, label, bool mask)."""
    regions = []
    for label in np.unique(label_map[label_map >= 0]):
        parts = _connected(label_map == label)
        pixels = np.bincount(parts.ravel())[1:]
        order = np.argsort(-pixels, kind="stable")[:_NAMES_PER_LABEL]
        regions += [
            (int(pixels[part]), int(label), parts == part + 1)
            for part in order
            if pixels[part] >= _SMALLEST_REGION * label_map.size
        ]
    return sorted(regions, key=lambda region: (-region[0], region[1]))


def _connected(mask: np.ndarray) -> np.ndarray:
    """(H, W) int32: 0 outside the mask, 1, 2 … for its connected parts."""
    parts = np.empty(mask.shape, dtype=np.int32)
    connected_parts(mask, output=parts)
    return parts


def _best_corner(region: np.ndarray, taken: np.ndarray, box: tuple[int, int]) -> tuple[int, int] | None:
    """Left upper corner for a text box (height, width): as far inside the region as it gets, near its visual centre.

    None where every place would cover another name or lie mostly outside the region.
    """
    inside = _box_sums(region, box) / (box[0] * box[1])
    free = _box_sums(taken, box) == 0
    # Distance to the region's outline, the picture's edge being one: its maximum is the visual centre.
    depth = _depth(region)
    middle = depth[box[0] // 2 :, box[1] // 2 :][: inside.shape[0], : inside.shape[1]]
    score = np.where(free & (middle > 0) & (inside >= 0.35), inside + 0.5 * middle / depth.max(), -1)
    best = int(score.argmax())
    if score.flat[best] < 0:
        return None
    return best // score.shape[1], best % score.shape[1]


def _depth(region: np.ndarray) -> np.ndarray:
    """Distance of each pixel of a region to its outline or the picture's edge, float64 (H, W); 0 outside of it."""
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    around = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)  # most regions are small
    depth = np.zeros(region.shape)
    depth[around] = np.asarray(distance_transform_edt(np.pad(region[around], 1)))[1:-1, 1:-1]
    return depth


def _box_sums(mask: np.ndarray, box: tuple[int, int]) -> np.ndarray:
    """Sum of `mask` in a box of this height and width, for each place of its left upper corner."""
    total = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    height, width = box
    return total[height:, width:] - total[:-height, width:] - total[height:, :-width] + total[:-height, :-width]
