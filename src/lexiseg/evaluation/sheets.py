"""Example pictures of an evaluation: photo, truth and prediction beside each other; or photo and clusters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from lexiseg.evaluation.evaluate import Example
from lexiseg.pictures import enlarged, legend, overlay, side_by_side, stack

# Longer side of a picture on the contact sheet; names are still readable at this size.
_SHEET_SIDE = 384


def example_picture(example: Example, *, classes: Sequence[str], unseen: Sequence[str]) -> np.ndarray:
    """One example at full size, with the colours of the classes that occur in it below.

    Args:
        example: the picture.
        classes: names of the class ids.
        unseen: names marked in the legend as never labelled in training.
    """
    return _sheet([example], classes=classes, unseen=unseen)


def overview_picture(examples: Sequence[Example], *, classes: Sequence[str], unseen: Sequence[str]) -> np.ndarray:
    """All examples below each other at a moderate size, one legend for all (see `example_picture`)."""
    return _sheet([_at_most(example, side=_SHEET_SIDE) for example in examples], classes=classes, unseen=unseen)


def _sheet(examples: Sequence[Example], *, classes: Sequence[str], unseen: Sequence[str]) -> np.ndarray:
    rows = [_row(example, classes) for example in examples]
    maps = [ids for item in examples for ids in (item.truth, item.prediction) if ids is not None]
    present = np.unique(np.concatenate([ids.ravel() for ids in maps]))
    shown = [classes[int(id)] for id in present if id >= 0]
    key = legend(
        classes,
        width=max(row.shape[1] for row in rows),
        shown=shown,
        notes=dict.fromkeys(unseen, "never labelled in training"),
        unlabelled=bool((present < 0).any()),
    )
    return stack([*rows, key])


def _row(example: Example, classes: Sequence[str]) -> np.ndarray:
    maps = {"clusters": example.prediction}
    if example.truth is not None:
        maps = {"truth": example.truth, "prediction": example.prediction}
    panels = [overlay(example.image, ids, classes) for ids in maps.values()]
    return side_by_side([enlarged(example.image), *panels], [example.id, *maps])


def _at_most(example: Example, *, side: int) -> Example:
    height, width = example.image.shape[:2]
    if max(height, width) <= side:
        return example
    size = round(width * side / max(height, width)), round(height * side / max(height, width))

    def at_size(ids: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(ids.astype(np.int32)).resize(size, Image.Resampling.NEAREST))

    return Example(
        id=example.id,
        image=np.asarray(Image.fromarray(example.image).resize(size, Image.Resampling.BOX)),
        truth=None if example.truth is None else at_size(example.truth),
        prediction=at_size(example.prediction),
    )
