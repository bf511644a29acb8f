"""Raw picture, mask and class-list files read with care; shared by the adapters that read files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lexiseg.data.adapters.base import IGNORE_ON_DISK, RawContent
from lexiseg.errors import DataError

# Formats whose bytes are kept as they are: every reader of a prepared data set decodes them alike.
_KEPT_FORMATS = {"JPEG", "MPO", "PNG"}
_ORIENTATION_TAG = 0x0112


@contextmanager
def pixel_limit(max_pixels: int) -> Iterator[None]:
    """Refuse pictures of more than `max_pixels` pixels before they are decoded, in this process.

    It sets PIL's own limit, so it holds for every adapter that reads pictures with PIL, and turns PIL's
    warning above it into an error.
    """
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def inside(folder: Path, relative: str, *, listed_in: str) -> Path:
    """`folder / relative`, where a list file gave `relative`.

    The check is on the words of the path alone: DVC may have made the files links into its cache, which is
    elsewhere.

    Raises:
        DataError: the path is absolute or climbs out of the folder.
    """
    path = PurePosixPath(relative.replace("\\", "/"))
    if not path.parts or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise DataError(
            found=f"the path `{relative}` in {listed_in}",
            allowed="paths relative to the data set's folder that stay inside it",
            fix=f"correct that line of {listed_in}",
        )
    return folder / path


def read_picture(path: Path, *, file: str) -> RawContent:
    """Read a photograph as upright 8-bit RGB; greyscale, palette, CMYK and 16-bit files are converted.

    Transparency is dropped, not blended.

    Args:
        path: the file.
        file: its name for messages, relative to the data set's folder.

    Returns:
        A RawContent with `image`, `mode`, and `image_bytes` where the file can be kept as it is.

    Raises:
        DataError: missing, empty, damaged, too many pixels (see `pixel_limit`), or not a picture of 8 or 16 bits.
    """
    content = _read_bytes(path, file=file)

    def decode() -> RawContent:
        with Image.open(BytesIO(content)) as picture:
            mode, kept = picture.mode, picture.format in _KEPT_FORMATS
            rotated = picture.getexif().get(_ORIENTATION_TAG, 1) != 1
            picture.load()
            upright = ImageOps.exif_transpose(picture) if rotated else picture
        pixels = _to_rgb(upright, file=file)
        keep = mode == "RGB" and kept and not rotated
        return RawContent(image=pixels, image_bytes=content if keep else None, mode=mode)

    return _decoded(decode, file=file, size=partial(_pixels, content))


def picture_pixels(picture: Image.Image, *, name: str) -> np.ndarray:
    """Pixels of an opened picture as `read_picture` gives them: uint8 RGB (H, W, 3), upright.

    Raises:
        DataError: damaged, too many pixels (see `pixel_limit`), or not a picture of 8 or 16 bits.
    """

    def decode() -> np.ndarray:
        if picture.width * picture.height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise Image.DecompressionBombError  # PIL looks at it when it opens a file, which happened elsewhere
        picture.load()
        return _to_rgb(ImageOps.exif_transpose(picture), file=name)

    return _decoded(decode, file=name, size=lambda: f"{picture.width} x {picture.height}")


def read_mask(path: Path, *, file: str) -> np.ndarray:
    """Read a mask whose pixel values are ids: one channel of 1, 8 or 16 bits, or a palette image's indices.

    Returns:
        uint16 H x W, the raw ids.

    Raises:
        DataError: missing, empty, damaged, too many pixels, or a colour picture.
    """
    content = _read_bytes(path, file=file)

    def decode() -> np.ndarray:
        with Image.open(BytesIO(content)) as picture:
            if picture.mode not in {"1", "L", "P", "I", "I;16", "I;16B"}:
                raise DataError(
                    found=f"{file} has the mode {picture.mode}",
                    allowed="a mask with one channel that holds class ids (8 or 16 bits, or palette indices)",
                    fix="convert the colours to ids first",
                )
            ids = np.asarray(picture)
        if ids.dtype.kind == "i" and (ids.min() < 0 or ids.max() > IGNORE_ON_DISK):
            raise DataError(
                found=f"{file} holds the values {ids.min()} to {ids.max()}",
                allowed=f"ids from 0 to {IGNORE_ON_DISK}",
                fix="write the mask with 8 or 16 bits",
            )
        return ids.astype(np.uint16)

    return _decoded(decode, file=file, size=partial(_pixels, content))


def relabel(
    ids: np.ndarray, *, classes: Mapping[int, int], ignored: Collection[int]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Turn raw ids into indices of the vocabulary.

    Args:
        ids: uint16 H x W, raw.
        classes: raw id -> index.
        ignored: raw ids that mean "no label".

    Returns:
        The mask, uint16 H x W with 65535 = no label, and the raw ids that are in neither (65535 in the mask).
    """
    table = np.full(1 << 16, IGNORE_ON_DISK, np.uint16)
    known = np.zeros(1 << 16, bool)
    for raw, index in classes.items():
        table[raw] = index
    known[[*classes, *ignored, IGNORE_ON_DISK]] = True
    present = np.flatnonzero(np.bincount(ids.ravel(), minlength=1))
    return table[ids], tuple(int(value) for value in present if not known[value])


def read_lines(path: Path, *, file: str, purpose: str) -> list[tuple[int, str]]:
    """Lines of a text file with their numbers, without empty ones and comments (`#`).

    Raises:
        DataError: the file is missing or not UTF-8 text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            found=f"{file} cannot be read ({_words(error)})",
            allowed=f"a UTF-8 text file: {purpose}",
            fix=f"put {file} into the data set's folder",
        ) from error
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def _read_bytes(path: Path, *, file: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            found=f"{file} cannot be opened ({error.strerror or _words(error)})",
            allowed="a readable picture file",
            fix="add the file or remove its entry",
        ) from error
    if not content:
        raise DataError(
            found=f"{file} is empty (0 bytes)", allowed="a complete picture", fix="copy or export the file again"
        )
    return content


def _decoded(decode: Callable, *, file: str, size: Callable[[], str]):
    try:
        return decode()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(
            found=f"{file} has {size()} pixels",
            allowed=f"at most {Image.MAX_IMAGE_PIXELS}; a larger one may be a decompression bomb",
            fix="scale the picture down; in a data set that you trust, `data.max_pixels` of params.yaml may be raised",
        ) from error
    except UnidentifiedImageError as error:
        raise DataError(
            found=f"{file} is not a picture in a known format",
            allowed="PNG, JPEG or another format that Pillow reads",
            fix="export the file again, or remove it",
        ) from error
    except (DataError, MemoryError):
        raise
    except Exception as error:  # depending on format and place of the damage, nearly any kind
        raise DataError(
            found=f"{file} is damaged ({_words(error)})",
            allowed="a complete picture",
            fix="copy or export the file again, or remove it",
        ) from error


def _pixels(content: bytes) -> str:
    # Only the header is read here; the limit is lifted for that alone.
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(BytesIO(content)) as picture:
            return f"{picture.width} x {picture.height}"
    except Exception:  # as in _decoded
        return "too many"
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _to_rgb(picture: Image.Image, *, file: str) -> np.ndarray:
    if picture.mode.startswith("I;16"):
        # PIL's own conversion clips at 255; the upper byte is the picture.
        grey = (np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if picture.mode in {"I", "F"}:
        raise DataError(
            found=f"{file} has 32 bits per pixel (mode {picture.mode})",
            allowed="photographs of 8 or 16 bits per channel",
            fix="export the picture with 8 bits",
        )
    return np.asarray(picture.convert("RGB"))


def _words(error: Exception) -> str:
    # The first line, and no object addresses: reasons go to the manifest, which must not differ between runs.
    text = (str(error).splitlines() or [""])[0]
    return type(error).__name__ if not text or " at 0x" in text else text
