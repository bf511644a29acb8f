"""Clusters -> classes: Hungarian matching, and the scores that follow (STEGO, section 4 of the paper).

Letters: N clusters, C classes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

NO_CLASS = -1
Unmatched = Literal["error", "majority"]
"""What becomes of clusters beyond the number of classes. "error": their pixels are of no class, so wrong wherever a
label is. "majority": each counts as the class that most of its pixels have."""


class ClusterCounts:
    """Count pixels by cluster and true class.

    Args:
        clusters: N.
        classes: C.

    Attributes:
        counts: (N, C) int64.
    """

    def __init__(self, clusters: int, classes: int) -> None:
        self.counts = np.zeros((clusters, classes), dtype=np.int64)

    def update(self, *, clusters: np.ndarray, truth: np.ndarray) -> None:
        """Add pixels: cluster numbers and class ids of one shape; what is not in 0..C-1 does not count.

        Raises:
            ValueError: the shapes differ, or a cluster number is not in 0..N-1.
        """
        if clusters.shape != truth.shape:
            raise ValueError(f"clusters of shape {clusters.shape} for labels of shape {truth.shape}")
        size, classes = self.counts.shape
        if clusters.size and not 0 <= clusters.min() <= clusters.max() < size:
            raise ValueError(f"cluster numbers {clusters.min()}..{clusters.max()}, expected 0..{size - 1}")
        counted = (truth >= 0) & (truth < classes)
        pairs = clusters[counted].astype(np.int64) * classes + truth[counted]
        self.counts += np.bincount(pairs, minlength=size * classes).reshape(size, classes)

    def match(self, *, unmatched: Unmatched = "error") -> np.ndarray:
        """The class of each cluster, int64 (N,): one to one, so that as many pixels as possible are right.

        Clusters beyond the number of classes are `NO_CLASS`, or what `unmatched` says. Of equally good matchings the
        one that scipy finds, always the same.
        """
        result = np.full(len(self.counts), NO_CLASS, dtype=np.int64)
        rows, columns = linear_sum_assignment(self.counts, maximize=True)
        result[rows] = columns
        if unmatched == "majority":
            free = (result == NO_CLASS) & (self.counts.sum(axis=1) > 0)
            result[free] = self.counts[free].argmax(axis=1)
        return result

    def matched(self, classes_of: np.ndarray) -> np.ndarray:
        """Counts by predicted and true class, (C + 1, C) int64; the last row holds pixels of no class."""
        table = np.zeros((self.counts.shape[1] + 1, self.counts.shape[1]), dtype=np.int64)
        np.add.at(table, classes_of, self.counts)  # NO_CLASS is the last row
        return table


def class_ious(table: np.ndarray) -> np.ndarray:
    """IoU of each class (C,) of counts by predicted and true class, (C + 1, C); NaN where it occurs in neither."""
    size = table.shape[1]
    right = table.diagonal()[:size]
    union = table.sum(axis=0) + table[:size].sum(axis=1) - right
    return np.divide(right, union, out=np.full(size, np.nan), where=union > 0)


def class_scores(table: np.ndarray) -> dict[str, float | None]:
    """mIoU and accuracy of counts by predicted and true class, (C + 1, C), each 0..1, or None without a pixel.

    The mean is over classes that occur in truth or prediction.
    """
    found = class_ious(table)
    iou, total = found[~np.isnan(found)], table.sum()
    return {
        "miou": float(iou.mean()) if len(iou) else None,
        "accuracy": float(table.diagonal().sum() / total) if total else None,
    }
