"""One raw sample turned into a row of the prepared data set and into facts for the manifest.

Runs in worker processes, so it imports little.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from lexiseg.data.adapters.base import IGNORE_ON_DISK, NO_SEGMENT, RawContent, RawSample
from lexiseg.errors import DataError
from lexiseg.storage import sha256_of_json

# Run-length coding alone: measured a quarter faster than level 1 with the usual matching, and no larger for
# masks and small pictures, which are what is encoded here (photographs keep their files' bytes).
_COMPRESSION = {"compress_level": 1, "compress_type": zlib.Z_RLE}


@dataclass(frozen=True)
class Examined:
    """What prepare keeps of one raw sample.

    Attributes:
        facts: the sample's row of the manifest (see `lexiseg.data.manifest`).
        row: its row of the data set (see `lexiseg.data.features`), or None where it cannot be read.
        digest: hex sha256 of the row.
    """

    facts: dict[str, Any]
    row: dict[str, Any] | None
    digest: str


def examine(sample: RawSample, *, split: str, class_count: int) -> Examined:
    """Load a sample; one that cannot be read gives facts with `readable` False and the reason, and no row.

    Args:
        sample: the sample.
        split: name of its split.
        class_count: size of the vocabulary; mask values from there on are reported as unknown.
    """
    facts: dict[str, Any] = {"split": split, "id": sample.id, "file": sample.file}
    try:
        content = sample.load()
        pixels = _pixels(content)
        _check_arrays(pixels, content)
    except DataError as error:
        reason = f"found: {error.found}; allowed: {error.allowed}; to do: {error.fix}"
        return Examined(facts | {"readable": False, "reason": reason}, None, "")
    except (OSError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = f"{sample.file}: {(str(error).splitlines() or [''])[0] or type(error).__name__}"
        return Examined(facts | {"readable": False, "reason": reason}, None, "")
    facts |= {"readable": True, "reason": None, "mode": content.mode}
    facts |= _picture_facts(pixels) | _mask_facts(content, class_count) | _text_facts(content)
    row = {
        "id": sample.id,
        "image": content.image_bytes or png(pixels),
        "semantic": None if content.semantic is None else png(content.semantic),
        "panoptic": None if content.panoptic is None else png(content.panoptic),
        "segments": content.segments,
        "captions": content.captions,
        "phrases": content.phrases,
        "questions": content.questions,
    }
    return Examined(facts, row, _digest(row))


def png(pixels: np.ndarray) -> bytes:
    """PNG bytes of uint8 H x W x 3 (RGB) or uint16 H x W (16 bits, one channel)."""
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", **_COMPRESSION)
    return buffer.getvalue()


def decode_rgb(content: bytes) -> np.ndarray:
    """uint8 H x W x 3, RGB, of a picture's bytes."""
    with Image.open(BytesIO(content)) as picture:
        return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))  # a copy: writable


def decode_ids(content: bytes) -> np.ndarray:
    """int64 H x W of the bytes of a 16-bit mask, values as on disk."""
    with Image.open(BytesIO(content)) as mask:
        return np.asarray(mask).astype(np.int64)


def _pixels(content: RawContent) -> np.ndarray:
    if content.image is not None:
        return content.image
    if content.image_bytes is None:
        raise DataError(found="a sample without a picture", allowed="`image` or `image_bytes`", fix="mend the adapter")
    return decode_rgb(content.image_bytes)


def _check_arrays(pixels: np.ndarray, content: RawContent) -> None:
    faults = []
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        faults.append(f"image {pixels.dtype} {pixels.shape}")
    for name in ("semantic", "panoptic"):
        mask = getattr(content, name)
        if mask is not None and (mask.dtype != np.uint16 or mask.ndim != 2 or not mask.size):
            faults.append(f"{name} {mask.dtype} {mask.shape}")
    if faults:
        raise DataError(
            found=", ".join(faults),
            allowed="image uint8 H x W x 3; semantic and panoptic uint16 H x W",
            fix="mend the adapter that made them",
        )


def _picture_facts(pixels: np.ndarray) -> dict[str, Any]:
    height, width = pixels.shape[:2]
    content = hashlib.sha256(f"{width}x{height}:".encode())
    content.update(pixels.tobytes())
    return {"width": width, "height": height, "image_sha256": content.hexdigest()}


def _mask_facts(content: RawContent, class_count: int) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if content.semantic is not None:
        counts = np.bincount(content.semantic.ravel())
        values = [int(value) for value in np.flatnonzero(counts) if value != IGNORE_ON_DISK]
        ignored = int(counts[IGNORE_ON_DISK]) if len(counts) > IGNORE_ON_DISK else 0
        strangers = {value for value in values if value >= class_count} | set(content.unknown_labels)
        facts = {
            "mask_height": content.semantic.shape[0],
            "mask_width": content.semantic.shape[1],
            "label_values": values,
            "unknown_labels": sorted(strangers),
            "ignored_share": ignored / content.semantic.size,
        }
    if content.panoptic is not None:
        present = set(np.flatnonzero(np.bincount(content.panoptic.ravel())).tolist()) - {NO_SEGMENT}
        facts |= {
            "panoptic_height": content.panoptic.shape[0],
            "panoptic_width": content.panoptic.shape[1],
            "segments_agree": present == {segment["id"] for segment in content.segments or []},
        }
    return facts


def _text_facts(content: RawContent) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "caption_count": len(content.captions or []),
        "phrase_count": len(content.phrases or []),
        "question_count": len(content.questions or []),
    }
    if content.captions:
        words = [len(caption.split()) for caption in content.captions]
        facts |= {"caption_words_min": min(words), "caption_words_max": max(words)}
    return facts


def _digest(row: dict[str, Any]) -> str:
    hashed = {
        name: hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else value for name, value in row.items()
    }
    return sha256_of_json(hashed)
