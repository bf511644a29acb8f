"""What an adapter gives for one picture, and what an adapter is.

A sixth data format costs one file beside this one: a class with the members of `Adapter`, named in
`lexiseg.data.adapters.ADAPTERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from lexiseg.vocabulary import Vocabulary

IGNORE_ON_DISK = 65535
"""Value of a pixel without a label in a semantic mask on disk (16 bits)."""

NO_SEGMENT = 0
"""Value of a pixel that belongs to no segment in a panoptic mask on disk (16 bits)."""


@dataclass(frozen=True)
class RawContent:
    """One sample, decoded. What the data set does not have is None, never made up.

    Attributes:
        image: uint8 H x W x 3, RGB, upright. None only together with `image_bytes`.
        image_bytes: the file's own bytes where they already are such an upright 8-bit RGB picture, so that
            they are kept as they are; None: prepare encodes `image` as PNG.
        semantic: uint16 H x W, indices into the vocabulary, 65535 = no label.
        panoptic: uint16 H x W, segment ids, 0 = no segment.
        segments: one {"id": int, "class_id": int, "thing": bool} per id in `panoptic`.
        captions: sentences about the whole picture.
        phrases: {"text": str, "segment_ids": list[int]}: words that mean these segments.
        questions: {"question": str, "answer": str}.
        mode: how the file stored its pixels, in PIL's words (RGB, L, RGBA, P, I;16 …); for the manifest.
        unknown_labels: ids in the raw mask that the data set's list of classes does not have. Their pixels
            are 65535 in `semantic`; validate stops at them and names them.
    """

    image: np.ndarray | None
    image_bytes: bytes | None = None
    semantic: np.ndarray | None = None
    panoptic: np.ndarray | None = None
    segments: list[dict[str, Any]] | None = None
    captions: list[str] | None = None
    phrases: list[dict[str, Any]] | None = None
    questions: list[dict[str, str]] | None = None
    mode: str = "RGB"
    unknown_labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class RawSample:
    """One sample, not read yet.

    Attributes:
        id: name of the sample, unique in its split.
        file: where it lies, posix, relative to the data set's folder (or what makes it, for rendered ones).
        load: reads it. Raises DataError, OSError or an error of PIL when it cannot; prepare records that
            and goes on. It need not be picklable: worker processes make their own adapter.
    """

    id: str
    file: str
    load: Callable[[], RawContent]


class Adapter(Protocol):
    """A data format.

    Attributes:
        name: the word for `--adapter` and `data.adapter`.
        licence: terms of the data, in words; copied to info.json and into every model trained on it.
    """

    name: str
    licence: str

    def __init__(self, folder: Path) -> None: ...

    def splits(self) -> list[str]:
        """Names of the splits there are, `train` first."""
        ...

    def vocabulary(self) -> Vocabulary:
        """The class names. Raises DataError where the data set's own list cannot be read."""
        ...

    def samples(self, split: str) -> Iterator[RawSample]:
        """The samples of a split in a fixed order; cheap, as no picture is read before `load`."""
        ...


@dataclass(frozen=True)
class Episodes:
    """Questions with two labels each: "others", and ONE class of a picture, whatever else is in it.

    Attributes:
        classes: the names that are asked about; evaluation takes the mean over all of them, asked or not.
        pairs: (sample id, class name); one that is there twice counts twice.
        by_class: training draws a class first and then one of its pictures, so that rare classes are as frequent
            as others; False: it goes through the pairs.
    """

    classes: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    by_class: bool = False


@runtime_checkable
class ListsEpisodes(Protocol):
    """An adapter of a data set with episodes of its own; for others see `lexiseg.data.episodes`."""

    def episodes(self, split: str) -> Episodes:
        """The episodes of a split; their pictures are among its samples."""
        ...
