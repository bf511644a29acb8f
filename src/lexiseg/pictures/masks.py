"""Soft masks over their photograph, one panel for each label; they may overlap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lexiseg.pictures.layout import side_by_side, stack
from lexiseg.pictures.overlay import enlarged
from lexiseg.pictures.palette import palette

_COLUMNS = 4
MOST_PANELS = 12


def mask_sheet(image: np.ndarray, masks: Sequence[np.ndarray], labels: Sequence[str]) -> np.ndarray:
    """The photograph in grey once for each mask, tinted as strongly as that says.

    Args:
        image: (H, W, 3) uint8 RGB; enlarged where `overlay` would do it.
        masks: soft masks (H, W), 0..1, of the first labels; up to `MOST_PANELS` of them are readable.
        labels: N names, as many as masks or more; all of them decide the colours, as in `overlay`.

    Returns:
        (height, width, 3) uint8 RGB: at most four panels in a row, each below its name.
    """
    grey = enlarged(image).mean(axis=2, keepdims=True, dtype=np.float32)
    panels, titles = [], []
    for mask, label, colour in zip(masks, labels, palette(labels).astype(np.float32), strict=False):
        share = 0.85 * enlarged(mask)[..., None]
        panels.append(((1 - share) * 0.85 * grey + share * colour).round().astype(np.uint8))
        titles.append(f"{label} ({mask.max():.2f} at most)")
    rows = range(0, len(panels), _COLUMNS)
    return stack([side_by_side(panels[row : row + _COLUMNS], titles[row : row + _COLUMNS]) for row in rows])
