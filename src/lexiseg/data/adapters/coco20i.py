"""COCO-20i: the 80 classes of COCO 2014 in four folds of twenty.

    COCO2014/train2014/<name>.jpg  COCO2014/val2014/<name>.jpg                           pictures
    COCO2014/annotations/train2014/<name>.png  COCO2014/annotations/val2014/<name>.png   masks: 0, and 1..80
    splits/coco/trn/fold<i>.pkl   training pictures of fold i, by class
    splits/coco/val/fold<i>.pkl   test pictures of fold i, by class

A list is a pickled table {0..79: [picture relative to COCO2014, ...]}, empty for classes that it is not about.
It is read without executing anything. Fold i holds the classes i, i + 4, ..., i + 76 (counted from 0).

Training draws a class of the other folds, then one of its pictures. The 1000 test questions are drawn once with
numpy's seed 0 in the same way; the split `test` holds the pictures that are among them.
"""

from __future__ import annotations

import pickle
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from lexiseg.data.adapters.base import Episodes
from lexiseg.data.adapters.files import read_mask, relabel
from lexiseg.data.adapters.listed import EPISODES, FOLDS, FoldedAdapter, Pair
from lexiseg.errors import DataError

# The spelling of the official label file: vectors of other words would give other scores.
CLASSES = (
    *("person", "bicycle", "car", "motorbike", "aeroplane", "bus", "train", "truck", "boat", "trafficlight"),
    *("firehydrant", "stopsign", "parkingmeter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sportsball", "kite", "baseballbat", "baseballglove", "skateboard", "surfboard"),
    *("tennisracket", "bottle", "wineglass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hotdog", "pizza", "donut", "cake", "chair", "sofa"),
    *("pottedplant", "bed", "diningtable", "toilet", "tvmonitor", "laptop", "mouse", "remote", "keyboard"),
    *("cellphone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors"),
    *("teddybear", "hairdrier", "toothbrush"),
)
_CROWD = 255
_SEED = 0


class Coco20iAdapter(FoldedAdapter):
    """COCO-20i in `folder`; see the module's text for the layout."""

    name = "coco20i"
    licence = "COCO 2014: annotations CC BY 4.0; photographs under Flickr's terms of use"

    def __init__(self, folder: Path, *, fold: int | None) -> None:
        super().__init__(folder, fold=fold)
        self._read = cache(self._read_list)  # tens of thousands of names, asked for several times

    def episodes(self, split: str) -> Episodes:
        """Every picture with each of its classes for training, 1000 drawn questions for testing."""
        pairs = self._pairs(split)
        if split == "train":
            return self._as_episodes([name for name in CLASSES if name not in self._unseen()], pairs, by_class=True)
        return self._as_episodes(self._unseen() or CLASSES, pairs)

    def _classes(self) -> tuple[str, ...]:
        return CLASSES

    def _fold_of(self, position: int) -> int:
        return position % FOLDS

    def _list_file(self, part: str, fold: int) -> str:
        return f"splits/coco/{part}/fold{fold}.pkl"

    def _pairs(self, split: str) -> list[Pair]:
        if split != "train":
            return [pair for fold in self._folds() for pair in self._drawn(fold)]
        tables = [self._read("trn", fold) for fold in self._folds()]
        listed = [(name, position) for table in tables for position in table for name in table[position]]
        return [(f"COCO2014/{name}", CLASSES[position]) for name, position in dict.fromkeys(listed)]

    def _drawn(self, fold: int) -> list[Pair]:
        table, draws = self._read("val", fold), np.random.RandomState(_SEED)
        ids = [position for position in range(len(CLASSES)) if self._fold_of(position) == fold]
        empty = [CLASSES[position] for position in ids if not table.get(position)]
        if empty:
            raise DataError(
                found=f"no picture of {', '.join(empty)} in {self._list_file('val', fold)}",
                allowed="pictures of every class of the fold",
                fix="copy the official list again",
            )
        pairs = []
        for _ in range(EPISODES):
            # A draw without replacement of one is a shuffle of all: another call would give other episodes.
            position = ids[draws.choice(len(ids), 1, replace=False)[0]]
            name = table[position][draws.choice(len(table[position]), 1, replace=False)[0]]
            pairs.append((f"COCO2014/{name}", CLASSES[position]))
        return pairs

    def _read_list(self, part: str, fold: int) -> dict[int, list[str]]:
        file = self._list_file(part, fold)
        table = _plain_pickle(self._folder / file, file=file)
        wanted = [position for position in range(len(CLASSES)) if (self._fold_of(position) == fold) == (part == "val")]
        fine = isinstance(table, dict) and all(
            isinstance(names, list)
            and (not names or position in wanted)
            and all(isinstance(name, str) and name.endswith(".jpg") for name in names)
            for position, names in table.items()
        )
        if not fine:
            whose = "of the fold" if part == "val" else "outside the fold"
            raise DataError(
                found=f"{file} holds something else than lists of pictures by class",
                allowed=f"{{class: [name.jpg, ...]}} with classes {whose}: {', '.join(map(str, wanted))}",
                fix="copy the official list again",
            )
        return table

    def _mask_of(self, picture: str) -> str:
        folder, _, rest = picture.partition("/")
        return f"{folder}/annotations/{rest.removesuffix('.jpg')}.png"

    def _semantic(self, path: Path, *, file: str) -> tuple[np.ndarray, tuple[int, ...]]:
        # Unlike PASCAL's border, what is not labelled here counts: the official code takes all of it for "others".
        ids = {**{id: id for id in range(len(CLASSES) + 1)}, _CROWD: 0}
        return relabel(read_mask(path, file=file), classes=ids, ignored=())


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, words, lists and tables only: whatever a pickle would import or call is refused before it is."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def _plain_pickle(path: Path, *, file: str) -> Any:
    try:
        return _PlainUnpickler(BytesIO(path.read_bytes())).load()
    except Exception as error:  # missing or damaged: depending on the place of the damage, nearly any kind
        why = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise DataError(
            found=f"{file} cannot be read ({why or type(error).__name__})",
            allowed="a pickle of plain data (numbers, words, lists); one that would execute code is never opened",
            fix="copy the official list (fewshot_data/data/splits/coco) again",
        ) from error
