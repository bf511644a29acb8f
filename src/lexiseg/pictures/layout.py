"""Legends, rows and columns of pictures, and PNG files with reproducible bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lexiseg.pictures.palette import palette
from lexiseg.pictures.text import draw_text, shorten, text_size
from lexiseg.storage import atomic_path

PAPER = (250, 250, 248)
_INK = (30, 30, 30)
_GREY = (110, 110, 110)
_GAP = 8


def legend(
    labels: Sequence[str],
    *,
    width: int,
    shown: Sequence[str] | None = None,
    notes: Mapping[str, str] | None = None,
    unlabelled: bool = False,
    size: int = 15,
) -> np.ndarray:
    """Names beside their colours, in as many rows as needed.

    Args:
        labels: all names; they decide the colours, as in `overlay`.
        width: width of the result in pixels.
        shown: the names to list, in this order; all by default.
        notes: for a name, words to add in brackets, such as "never labelled in training".
        unlabelled: add an entry for the grey of pixels without a label.
        size: height of the text in pixels, and of the swatches.

    Returns:
        (height, width, 3) uint8 RGB.
    """
    colours = dict(zip(labels, palette(labels).tolist(), strict=True))
    entries = [
        (f"{name} ({notes[name]})" if notes and name in notes else name, tuple(colours[name]))
        for name in (labels if shown is None else shown)
    ] + [("no label", _GREY)] * unlabelled
    height = text_size("", size=size)[1]
    placed, left, top = [], _GAP, _GAP
    for text, colour in entries:
        text = shorten(text, width=width - size - 4 * _GAP, size=size)
        needed = size + 6 + text_size(text, size=size)[0] + 2 * _GAP
        if left > _GAP and left + needed > width:
            left, top = _GAP, top + height + 6
        placed.append((text, colour, left, top))
        left += needed
    image = Image.new("RGB", (width, top + height + _GAP), PAPER)
    canvas = ImageDraw.Draw(image)
    for text, colour, left, top in placed:
        middle = top + height // 2
        canvas.rectangle((left, middle - size // 2, left + size, middle + size // 2), fill=colour, outline=_INK)
        draw_text(canvas, text, left=left + size + 6, top=top, size=size, ink=_INK)
    return np.asarray(image)


def side_by_side(pictures: Sequence[np.ndarray], titles: Sequence[str] | None = None, *, size: int = 15) -> np.ndarray:
    """Pictures in a row, tops aligned, each below its title.

    Args:
        pictures: (H_i, W_i, 3) uint8 RGB.
        titles: one text per picture, shortened where it is wider than the picture; or None.
        size: height of the text in pixels.
    """
    head = text_size("", size=size)[1] + 6 if titles else 0
    width = sum(picture.shape[1] for picture in pictures) + _GAP * (len(pictures) - 1)
    height = head + max(picture.shape[0] for picture in pictures)
    image = Image.new("RGB", (width, height), PAPER)
    canvas = ImageDraw.Draw(image)
    left = 0
    for number, picture in enumerate(pictures):
        if titles:
            text = shorten(titles[number], width=picture.shape[1], size=size)
            draw_text(canvas, text, left=left, top=2, size=size, ink=_INK)
        image.paste(Image.fromarray(picture), (left, head))
        left += picture.shape[1] + _GAP
    return np.asarray(image)


def stack(pictures: Sequence[np.ndarray], *, margin: int = _GAP) -> np.ndarray:
    """Pictures below each other, left sides aligned, with a margin around."""
    width = max(picture.shape[1] for picture in pictures) + 2 * margin
    height = sum(picture.shape[0] for picture in pictures) + _GAP * (len(pictures) - 1) + 2 * margin
    image = Image.new("RGB", (width, height), PAPER)
    top = margin
    for picture in pictures:
        image.paste(Image.fromarray(picture), (margin, top))
        top += picture.shape[0] + _GAP
    return np.asarray(image)


def write_png(target: Path | str, picture: np.ndarray) -> None:
    """Write (H, W, 3) RGB or (H, W) uint8 / uint16 as PNG, atomically; equal pictures give equal bytes."""
    with atomic_path(target) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")
