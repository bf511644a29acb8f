"""Readable text on any background, in Pillow's own font (Latin letters)."""

from __future__ import annotations

from functools import lru_cache

from PIL import ImageDraw, ImageFont

INK = (255, 255, 255)
OUTLINE = (20, 20, 20)


@lru_cache(maxsize=32)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The bundled font at a height of about `size` pixels."""
    return ImageFont.load_default(size)


def text_size(text: str, *, size: int, outline: int = 0) -> tuple[int, int]:
    """Width and height in pixels of the box that `draw_text` fills; all texts of a size are equally high."""
    left, _, right, _ = font(size).getbbox(text, stroke_width=outline)
    _, top, _, bottom = font(size).getbbox("bdgpqyÅ", stroke_width=outline)
    return round(right - left) + 1, round(bottom - top) + 1


def draw_text(
    canvas: ImageDraw.ImageDraw,
    text: str,
    *,
    left: int,
    top: int,
    size: int,
    ink: tuple[int, int, int] = INK,
    outline: int = 0,
) -> None:
    """Write `text` into the box with this left upper corner; `outline` pixels of dark rim around the letters."""
    x, _, _, _ = font(size).getbbox(text, stroke_width=outline)
    _, y, _, _ = font(size).getbbox("bdgpqyÅ", stroke_width=outline)
    canvas.text((left - x, top - y), text, font=font(size), fill=ink, stroke_width=outline, stroke_fill=OUTLINE)


def shorten(text: str, *, width: int, size: int) -> str:
    """`text`, or as much of it as fits into `width` pixels and an ellipsis."""
    if text_size(text, size=size)[0] <= width:
        return text
    while text and text_size(text + "…", size=size)[0] > width:
        text = text[:-1]
    return text.rstrip() + "…"
