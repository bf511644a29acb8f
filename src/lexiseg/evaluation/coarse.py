"""The classes that a card evaluates: those of the vocabulary, or coarse ones that they are parts of, found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lexiseg.data.label_maps import (
    CITYSCAPES27,
    CITYSCAPES27_THINGS,
    COCOSTUFF27,
    COCOSTUFF27_THINGS,
    COCOSTUFF_VALUES,
    POTSDAM3,
    cocostuff27,
    potsdam3,
)
from lexiseg.errors import DataError
from lexiseg.evaluation.protocol import ProtocolCard, read_class_list
from lexiseg.segmentation import IGNORE_LABEL
from lexiseg.vocabulary import Vocabulary

THING = "thing"

# Names of Cityscapes that are evaluated nowhere.
_CITYSCAPES_IGNORED = (
    "unlabeled",
    "ego vehicle",
    "rectification border",
    "out of roi",
    "static",
    "dynamic",
    "ground",
    "license plate",
)
# Potsdam's six classes in the order of their ids, as the data set is spelt in several places.
_POTSDAM_NAMES = (
    ("impervious surfaces", "impervious surface", "road", "roads"),
    ("building", "buildings"),
    ("low vegetation", "grass"),
    ("tree", "trees"),
    ("car", "cars"),
    ("clutter", "clutter/background", "background"),
)


@dataclass(frozen=True, eq=False)
class ClassSet:
    """The C classes that are evaluated, and which of the vocabulary's V classes each one consists of.

    Attributes:
        names: of the C classes.
        seen: C flags, True = labelled in training (of coarse ones: a part of it).
        things: C flags, True = countable.
        vocabulary: the V classes.
        lookup: int64 (V + 1,): class id of the vocabulary -> 0..C-1, or -100 where it is not evaluated. The last entry
            is where -100 looks up itself.
    """

    names: tuple[str, ...]
    seen: tuple[bool, ...]
    things: tuple[bool, ...]
    vocabulary: Vocabulary
    lookup: np.ndarray

    def of(self, labels: np.ndarray) -> np.ndarray:
        """Class ids of the vocabulary, -100 = none, of any shape -> int64 0..C-1, -100 = not evaluated.

        Raises:
            DataError: a label outside of the vocabulary.
        """
        highest, size = int(labels.max(initial=IGNORE_LABEL)), len(self.vocabulary)
        if highest >= size:
            raise DataError(
                found=f"the label {highest} in the prepared data",
                allowed=f"0..{size - 1} ({', '.join(self.vocabulary.names)})",
                fix="run the stages prepare and validate again",
            )
        return self.lookup[np.where(labels == IGNORE_LABEL, size, labels)]

    def position(self, name: str) -> int:
        """The evaluated class, 0..C-1, that a name of it or of one of its parts means; -100 for what is not evaluated.

        Raises:
            DataError: a name of neither.
        """
        if name in self.names:
            return self.names.index(name)
        if name in self.vocabulary.names:
            return int(self.lookup[self.vocabulary.index(name)])
        raise DataError(
            found=f"the class {name!r} in the predictions",
            allowed=f"one of {', '.join(dict.fromkeys((*self.names, *self.vocabulary.names)))}",
            fix="a linear probe knows its classes by training, that of an imported model those of its own data: set "
            "`stego.protocol` to a card whose classes they are, or `stego.probe.linear: false`; where the data set "
            "changed, run the stages before again (`dvc repro` does it)",
        )


def evaluated_classes(protocol: ProtocolCard, vocabulary: Vocabulary) -> ClassSet:
    """The classes of a card on one data set.

    Raises:
        DataError: names that the card's coarse classes do not consist of.
    """
    if protocol.coarse is not None:
        return _COARSE[protocol.coarse](vocabulary)
    ids = list(protocol.classes(vocabulary))
    lookup = np.full(len(vocabulary) + 1, IGNORE_LABEL, dtype=np.int64)
    lookup[ids] = np.arange(len(ids))
    return ClassSet(
        names=tuple(vocabulary.names[id] for id in ids),
        seen=tuple(vocabulary.seen[id] for id in ids),
        things=tuple(vocabulary.things[id] for id in ids),
        vocabulary=vocabulary,
        lookup=lookup,
    )


def _by_name(
    vocabulary: Vocabulary,
    owners: Mapping[str, int],
    *,
    names: tuple[str, ...],
    things: tuple[bool, ...],
    data: str,
    ignored: tuple[str, ...] = (),
) -> ClassSet:
    """Coarse classes by a table of names; those without any name in the vocabulary are left out.

    Args:
        vocabulary: of the data set.
        owners: name in lower case -> number of its coarse class.
        names: of all coarse classes.
        things: their flags.
        data: what the names are those of, for messages.
        ignored: further names, of no class.
    """
    words = [name.lower() for name in vocabulary.names]
    strange = [name for name, word in zip(vocabulary.names, words, strict=True) if word not in {*owners, *ignored}]
    if strange or not any(word in owners for word in words):
        shown = ", ".join(strange[:5]) + (", …" if len(strange) > 5 else "")
        known = [*owners, *ignored]
        raise DataError(
            found=f"a vocabulary with {shown}" if strange else "a vocabulary without any class of the card",
            allowed=f"names of {data}: {', '.join(known[:40])}{', …' if len(known) > 40 else ''}",
            fix="give the data set these names, or set `stego.protocol: clusters`, which takes any",
        )
    members = np.array([owners.get(word, IGNORE_LABEL) for word in words])
    present = np.unique(members[members >= 0])
    return _grouped(
        vocabulary,
        np.where(members >= 0, np.searchsorted(present, members), IGNORE_LABEL),
        names=tuple(names[number] for number in present),
        things=tuple(things[number] for number in present),
    )


def _grouped(
    vocabulary: Vocabulary, members: np.ndarray, *, names: tuple[str, ...], things: tuple[bool, ...]
) -> ClassSet:
    seen = np.array(vocabulary.seen)
    return ClassSet(
        names=names,
        seen=tuple(bool(seen[members == number].any()) for number in range(len(names))),
        things=things,
        vocabulary=vocabulary,
        lookup=np.append(members, IGNORE_LABEL).astype(np.int64),
    )


def _cocostuff27(vocabulary: Vocabulary) -> ClassSet:
    coarse = cocostuff27(np.array(COCOSTUFF_VALUES)).tolist()
    owners = dict(zip(read_class_list("coco_stuff"), coarse, strict=True))
    return _by_name(vocabulary, owners, names=COCOSTUFF27, things=COCOSTUFF27_THINGS, data="COCO-Stuff")


def _cityscapes27(vocabulary: Vocabulary) -> ClassSet:
    return _by_name(
        vocabulary,
        {name: number for number, name in enumerate(CITYSCAPES27)},
        names=CITYSCAPES27,
        things=CITYSCAPES27_THINGS,
        data="Cityscapes",
        ignored=_CITYSCAPES_IGNORED,
    )


def _potsdam3(vocabulary: Vocabulary) -> ClassSet:
    coarse = potsdam3(np.arange(len(_POTSDAM_NAMES))).tolist()
    owners = {word: number for words, number in zip(_POTSDAM_NAMES, coarse, strict=True) for word in words}
    # Cars are things and roads are not: together they are neither.
    return _by_name(vocabulary, owners, names=POTSDAM3, things=(False,) * len(POTSDAM3), data="Potsdam")


def _stuff_and_thing(vocabulary: Vocabulary) -> ClassSet:
    things = np.array(vocabulary.things)
    stuff = tuple(name for name, thing in zip(vocabulary.names, vocabulary.things, strict=True) if not thing)
    if not things.any() or THING in stuff:
        raise DataError(
            found=f"a class of stuff with the name {THING!r}" if THING in stuff else "a vocabulary without any thing",
            allowed="classes that are marked as things, which count as one class, and others, which are not called "
            f"{THING!r}",
            fix="mark countable classes in the data set ([thing] in a classes.txt), or set `stego.protocol: clusters`",
        )
    return _grouped(
        vocabulary,
        np.where(things, len(stuff), np.cumsum(~things) - 1),
        names=(*stuff, THING),
        things=(*(False for _ in stuff), True),
    )


_COARSE: Mapping[str, Callable[[Vocabulary], ClassSet]] = {
    "cocostuff27": _cocostuff27,
    "cityscapes27": _cityscapes27,
    "potsdam3": _potsdam3,
    "stuff_and_thing": _stuff_and_thing,
}
