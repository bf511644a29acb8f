"""What PASCAL-5i, COCO-20i and FSS-1000 have in common, in the layout of the data layer of HSNet and LSeg.

List files name pictures together with ONE class each. In a mask 0 is background and k is class k of the data
set's list. Nothing but "others" and the class of an episode is ever asked for; background is part of "others".

Of the two data sets with folds, training takes the classes of the other three folds and testing those of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from lexiseg.data.adapters.base import Episodes, RawContent, RawSample
from lexiseg.data.adapters.files import inside, read_mask, read_picture, relabel
from lexiseg.errors import DataError
from lexiseg.vocabulary import Vocabulary

BACKGROUND = "background"
FOLDS = 4
EPISODES = 1000
"""Test episodes of a fold."""

Pair = tuple[str, str]
"""Path of a picture relative to the data set's folder, and the name of one class in it."""


class ListedAdapter(ABC):
    """An adapter of list files; a subclass says what they are.

    Attributes:
        name, licence: see `Adapter`.
    """

    name: str
    licence: str

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)

    @abstractmethod
    def splits(self) -> list[str]:
        """Names of the splits, `train` first."""

    @abstractmethod
    def episodes(self, split: str) -> Episodes:
        """See `ListsEpisodes`."""

    @abstractmethod
    def _classes(self) -> tuple[str, ...]:
        """The names of the classes 1, 2, … of the masks."""

    @abstractmethod
    def _unseen(self) -> Collection[str]:
        """The names that training must not see."""

    @abstractmethod
    def _pairs(self, split: str) -> list[Pair]:
        """Everything that a split asks for, in order."""

    @abstractmethod
    def _mask_of(self, picture: str) -> str:
        """Path of a picture's mask."""

    def vocabulary(self) -> Vocabulary:
        """Background, then the classes in the order of their ids."""
        unseen = self._unseen()
        names = (BACKGROUND, *self._classes())
        return Vocabulary(
            names=names,
            seen=tuple(name not in unseen for name in names),
            things=tuple(name != BACKGROUND for name in names),
        )

    def samples(self, split: str) -> Iterator[RawSample]:
        """The pictures that the split asks about, each once, in the order of their first question."""
        for picture in dict.fromkeys(picture for picture, _ in self._pairs(split)):
            yield RawSample(id=self._id(picture), file=picture, load=lambda picture=picture: self._load(picture))

    def _load(self, picture: str) -> RawContent:
        content, mask = read_picture(self._path(picture), file=picture), self._mask_of(picture)
        semantic, unknown = self._semantic(self._path(mask), file=mask)
        return replace(content, semantic=semantic, unknown_labels=unknown)

    def _semantic(self, path: Path, *, file: str) -> tuple[np.ndarray, tuple[int, ...]]:
        """What `relabel` gives: the mask in ids of the vocabulary, and raw ids that the data set does not have."""
        return relabel(
            read_mask(path, file=file), classes={id: id for id in range(len(self._classes()) + 1)}, ignored=()
        )

    def _path(self, relative: str) -> Path:
        return inside(self._folder, relative, listed_in=f"the lists of {self.name}")

    def _id(self, picture: str) -> str:
        return PurePosixPath(picture).stem

    def _as_episodes(self, classes: Collection[str], pairs: list[Pair], *, by_class: bool = False) -> Episodes:
        return Episodes(tuple(classes), tuple((self._id(picture), name) for picture, name in pairs), by_class)


class FoldedAdapter(ListedAdapter):
    """A data set whose classes are divided into four folds.

    Args:
        folder: of the raw files.
        fold: 0..3; None: all folds whose lists are there, every class seen, which serves to look a folder through.
    """

    def __init__(self, folder: Path, *, fold: int | None) -> None:
        super().__init__(folder)
        self._fold = fold

    @abstractmethod
    def _fold_of(self, position: int) -> int:
        """The fold of a class by its position in `_classes`."""

    @abstractmethod
    def _list_file(self, part: str, fold: int) -> str:
        """Path of a list; `part` is "trn" or "val"."""

    def splits(self) -> list[str]:
        """`train` and `test`. The official lists have no third part: their "val" is what is tested on."""
        return ["train", "test"]

    def _unseen(self) -> tuple[str, ...]:
        return () if self._fold is None else self._classes_of(self._fold)

    def _classes_of(self, fold: int) -> tuple[str, ...]:
        return tuple(name for position, name in enumerate(self._classes()) if self._fold_of(position) == fold)

    def _folds(self) -> list[int]:
        """The fold, or those there are."""
        if self._fold is not None:
            return [self._fold]
        files = [self._list_file("val", fold) for fold in range(FOLDS)]
        found = [fold for fold, file in enumerate(files) if (self._folder / file).is_file()]
        if not found:
            raise DataError(
                found=f"none of {', '.join(files)} in {self._folder.name}/",
                allowed=f"the lists of the folds; see the text of lexiseg.data.adapters.{self.name}",
                fix="copy the folder `splits` of the official code (fewshot_data/data) into the data set's folder",
            )
        return found
