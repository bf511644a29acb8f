"""PASCAL-5i: the 20 classes of PASCAL VOC 2012 with the masks of SBD, in four folds of five classes.

    VOC2012/JPEGImages/<name>.jpg             pictures
    VOC2012/SegmentationClassAug/<name>.png   masks: 0 background, 1..20 the classes, 255 the border of objects
    splits/pascal/trn/fold<i>.txt             training pictures of the classes of fold i
    splits/pascal/val/fold<i>.txt             test pictures of the classes of fold i

A line of a list is `name__NN`, NN being the class that is asked for, 01..20. Fold i holds the classes 5i + 1 to 5i + 5:
training reads the lists `trn` of the other folds, testing goes through the list `val` of its own again and again
until 1000 questions are asked.
"""

from __future__ import annotations

import re
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from lexiseg.data.adapters.base import Episodes
from lexiseg.data.adapters.files import read_lines, read_mask, relabel
from lexiseg.data.adapters.listed import EPISODES, FOLDS, FoldedAdapter, Pair
from lexiseg.errors import DataError

# The spelling of the official label file: vectors of other words would give other scores.
CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle"),
    *("bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person"),
    *("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
BORDER = 255
_LINE = re.compile(r"(?P<name>[\w-]+?)__(?P<id>\d+)")


class Pascal5iAdapter(FoldedAdapter):
    """PASCAL-5i in `folder`; see the module's text for the layout."""

    name = "pascal5i"
    licence = "PASCAL VOC 2012: photographs under Flickr's terms of use; masks: VOC 2012 and SBD, for research"

    def episodes(self, split: str) -> Episodes:
        """Training goes through the lists; testing asks 1000 questions, the first ones of a list more often."""
        pairs = self._pairs(split)
        if split == "train":
            return self._as_episodes([name for name in CLASSES if name not in self._unseen()], pairs)
        return self._as_episodes(self._unseen() or CLASSES, list(islice(cycle(pairs), EPISODES)))

    def _classes(self) -> tuple[str, ...]:
        return CLASSES

    def _fold_of(self, position: int) -> int:
        return position // (len(CLASSES) // FOLDS)

    def _list_file(self, part: str, fold: int) -> str:
        return f"splits/pascal/{part}/fold{fold}.txt"

    def _pairs(self, split: str) -> list[Pair]:
        if split == "train" and self._fold is not None:
            folds = [fold for fold in range(FOLDS) if fold != self._fold]
        else:
            folds = self._folds()
        part = "trn" if split == "train" else "val"
        return [pair for fold in folds for pair in self._read(self._list_file(part, fold), fold)]

    def _read(self, file: str, fold: int) -> list[Pair]:
        pairs = []
        for number, line in read_lines(self._folder / file, file=file, purpose="one `name__NN` per line"):
            match = _LINE.fullmatch(line)
            position = int(match["id"]) - 1 if match else -1
            if not match or not 0 <= position < len(CLASSES) or self._fold_of(position) != fold:
                ids = [f"{position + 1:02}" for position in range(len(CLASSES)) if self._fold_of(position) == fold]
                raise DataError(
                    found=f"{file} line {number}: `{line}`",
                    allowed=f"`name__NN` with a class of fold {fold}: {', '.join(ids)}",
                    fix=f"correct that line of {file}, or copy the official list again",
                )
            pairs.append((f"VOC2012/JPEGImages/{match['name']}.jpg", CLASSES[position]))
        return pairs

    def _mask_of(self, picture: str) -> str:
        return f"VOC2012/SegmentationClassAug/{Path(picture).stem}.png"

    def _semantic(self, path: Path, *, file: str) -> tuple[np.ndarray, tuple[int, ...]]:
        ids = {id: id for id in range(len(CLASSES) + 1)}
        return relabel(read_mask(path, file=file), classes=ids, ignored=(BORDER,))
