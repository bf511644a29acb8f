"""Boundary F-score: how well outlines agree, which mIoU hardly notices on large regions.

What is computed. A pixel is a boundary pixel of its class when one of its four neighbours inside the picture has
another class. A boundary pixel of class c is matched when the other map has a boundary pixel of class c no further
away than the tolerance (Euclidean distance between pixel centres; share of the image diagonal, at least one pixel).
Precision of c is the matched share of its predicted boundary pixels, recall the matched share of its true ones, both
over all images of the split; F = 2PR / (P + R), and the score is the mean over classes. The idea is that of Csurka et
al. (BMVC 2013), who average F per image; here counts are pooled, as for mIoU.

Pixels to ignore are taken out of both maps: they are never boundary pixels and make none of their neighbours one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lexiseg.errors import DataError
from lexiseg.evaluation.metrics import AbsentClass, mean_over
from lexiseg.segmentation import IGNORE_LABEL


class BoundaryScore:
    """Count matched boundary pixels per class, over as many images as are added.

    Args:
        classes: the C class names.
        tolerance: share of the image diagonal; the distance is never less than one pixel.
    """

    def __init__(self, classes: Sequence[str], *, tolerance: float = 0.0075) -> None:
        self.classes, self.tolerance = tuple(classes), tolerance
        size = len(self.classes) + 1  # the last one is for pixels of no class
        self._predicted, self._predicted_matched = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self._true, self._true_matched = np.zeros(size, np.int64), np.zeros(size, np.int64)

    def update(self, *, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Add one image.

        Args:
            truth: (H, W) integers, 0..C-1 or -100 to ignore.
            prediction: (H, W) integers, 0..C-1, or C for pixels of no class: they have no boundary of their own, but
                end that of their neighbours.

        Raises:
            DataError: the shapes differ.
        """
        if truth.shape != prediction.shape:
            raise DataError(
                found=f"a prediction of shape {prediction.shape} for a truth of shape {truth.shape}",
                allowed="equal shapes",
                fix="upsample the scores to the size of the label image",
            )
        radius = max(1.0, self.tolerance * math.hypot(*truth.shape))
        offsets = _disc(radius)
        margin = int(radius)
        prediction = np.where(truth == IGNORE_LABEL, IGNORE_LABEL, prediction)
        true, predicted = (
            np.pad(_boundary(labels), margin, constant_values=IGNORE_LABEL) for labels in (truth, prediction)
        )
        self._add(true, predicted, offsets, self._true, self._true_matched)
        self._add(predicted, true, offsets, self._predicted, self._predicted_matched)

    def _add(
        self, ours: np.ndarray, theirs: np.ndarray, offsets: np.ndarray, total: np.ndarray, matched: np.ndarray
    ) -> None:
        # Both maps are padded by the radius, so a shift by an offset never leaves the flat array.
        positions = np.flatnonzero(ours != IGNORE_LABEL)
        classes = ours.ravel()[positions]
        total += np.bincount(classes, minlength=len(total))
        flat = theirs.ravel()
        for row, column in offsets:
            hit = flat[positions + (row * ours.shape[1] + column)] == classes
            matched += np.bincount(classes[hit], minlength=len(total))
            positions, classes = positions[~hit], classes[~hit]
            if not len(positions):
                break

    @property
    def f_score(self) -> np.ndarray:
        """(C,) float64 F per class, 0..1; NaN for a class without a boundary in either map of any image."""
        both = self._predicted + self._true
        precision = self._predicted_matched / np.maximum(self._predicted, 1)
        recall = self._true_matched / np.maximum(self._true, 1)
        f_score = 2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny)
        return np.where(both > 0, f_score, np.nan)[: len(self.classes)]

    def mean(self, *, absent_class: AbsentClass) -> float | None:
        """Mean F over classes, 0..1; None when no class has a boundary."""
        return mean_over(self.f_score, absent_class=absent_class)


def _boundary(labels: np.ndarray) -> np.ndarray:
    """The class of each boundary pixel; -100 everywhere else."""
    edge = np.zeros(labels.shape, dtype=bool)
    for here, there in (
        ((slice(None), slice(1, None)), (slice(None), slice(None, -1))),
        ((slice(1, None), slice(None)), (slice(None, -1), slice(None))),
    ):
        differs = (labels[here] != labels[there]) & (labels[here] != IGNORE_LABEL) & (labels[there] != IGNORE_LABEL)
        edge[here] |= differs
        edge[there] |= differs
    return np.where(edge, labels, IGNORE_LABEL).astype(np.int64)


def _disc(radius: float) -> np.ndarray:
    """(K, 2) int offsets (row, column) within `radius`, nearest first, so that most pixels match early."""
    reach = int(radius)
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    squared = rows**2 + columns**2
    inside = squared <= radius**2
    order = np.argsort(squared[inside], kind="stable")
    return np.stack([rows[inside], columns[inside]], axis=1)[order]
