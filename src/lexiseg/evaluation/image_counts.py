"""Pixels of every picture by class. Sums of them are the split's scores, so they tell how sure a difference is.

Letters: I pictures, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lexiseg.storage import atomic_path

# Only pairs with a pixel have a row, since a picture shows few of the classes; and the first class of every picture.
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "class": pa.string(),
        "intersection": pa.int64(),  # pixels that are of the class and are predicted so
        "pixels_true": pa.int64(),
        "pixels_predicted": pa.int64(),
    }
)
_COLUMNS = ("intersection", "pixels_true", "pixels_predicted")


@dataclass(frozen=True, eq=False)
class ImageCounts:
    """What was counted in each picture.

    Attributes:
        ids: of the I pictures.
        classes: the C names.
        intersection, true, predicted: (I, C) int64 pixels. The IoU of a class is
            sum(intersection) / (sum(true) + sum(predicted) - sum(intersection)), over any set of pictures.
    """

    ids: tuple[str, ...]
    classes: tuple[str, ...]
    intersection: np.ndarray
    true: np.ndarray
    predicted: np.ndarray

    @property
    def union(self) -> np.ndarray:
        """(I, C) int64 pixels that are of the class or are predicted so."""
        return self.true + self.predicted - self.intersection

    def ordered(self, ids: Sequence[str]) -> ImageCounts:
        """The same pictures in another order."""
        place = {id: row for row, id in enumerate(self.ids)}
        rows = [place[id] for id in ids]
        return ImageCounts(tuple(ids), self.classes, self.intersection[rows], self.true[rows], self.predicted[rows])


class ImageCounter:
    """Collects the counts of pictures.

    Args:
        classes: the C names.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = tuple(classes)
        self._rows: dict[str, np.ndarray] = {}

    def add(self, id: str, *, intersection: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> None:
        """Add (C,) pixels each to a picture; it may be asked several times (episodes)."""
        counted = np.stack([intersection, true, predicted])
        self._rows[id] = self._rows[id] + counted if id in self._rows else counted

    def result(self) -> ImageCounts:
        """Everything that was added."""
        size = len(self._classes)
        counts = np.stack([*self._rows.values()]) if self._rows else np.zeros((0, 3, size), np.int64)
        return ImageCounts(tuple(self._rows), self._classes, counts[:, 0], counts[:, 1], counts[:, 2])


def write_image_counts(path: Path, counts: ImageCounts) -> None:
    """Write counts as parquet: a row per picture and class with a pixel, in their order."""
    kept = counts.union > 0
    kept[:, :1] = True
    images, classes = np.nonzero(kept)
    table = pa.table(
        {
            "id": [counts.ids[image] for image in images],
            "class": [counts.classes[position] for position in classes],
            "intersection": counts.intersection[images, classes],
            "pixels_true": counts.true[images, classes],
            "pixels_predicted": counts.predicted[images, classes],
        },
        schema=SCHEMA,
    )
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_image_counts(path: Path, classes: Sequence[str]) -> ImageCounts:
    """Read what `write_image_counts` wrote.

    Args:
        path: the file.
        classes: all C names, also of classes without a pixel.
    """
    table = pq.read_table(path, schema=SCHEMA)
    ids = list(dict.fromkeys(table["id"].to_pylist()))
    rows = {id: row for row, id in enumerate(ids)}
    columns = {name: column for column, name in enumerate(classes)}
    place = ([rows[id] for id in table["id"].to_pylist()], [columns[name] for name in table["class"].to_pylist()])
    counts = np.zeros((3, len(ids), len(columns)), np.int64)
    for number, name in enumerate(_COLUMNS):
        counts[number][place] = table[name].to_numpy()
    return ImageCounts(tuple(ids), tuple(classes), *counts)
