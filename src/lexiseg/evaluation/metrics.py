"""Semantic segmentation metrics from one confusion matrix over a whole split ("pooled").

Values are floats in 0..1, never rounded or turned into percent here; None where a metric does not exist,
such as the mean over unseen classes where every class is seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from lexiseg.errors import DataError
from lexiseg.segmentation import IGNORE_LABEL

AbsentClass = Literal["exclude", "zero"]
NO_NAME = "(no class)"
"""What pixels are called in tables that were predicted as none of the classes."""


class ConfusionMatrix:
    """Count pixels by true and predicted class, over as many images as are added.

    Args:
        classes: the C class names, for messages and tables.
        unnamed: predictions may be of no class, C. Such pixels are wrong, whatever they are.

    Attributes:
        counts: (C, C) int64, rows are true classes, columns predicted ones; with `unnamed` (C, C + 1).
    """

    def __init__(self, classes: Sequence[str], *, unnamed: bool = False) -> None:
        self.classes = tuple(classes)
        self._columns = (*self.classes, NO_NAME) if unnamed else self.classes
        self.counts = np.zeros((len(self.classes), len(self._columns)), dtype=np.int64)

    def update(self, *, truth: torch.Tensor | np.ndarray, prediction: torch.Tensor | np.ndarray) -> np.ndarray:
        """Add pixels.

        Args:
            truth: integers of any shape, 0..C-1, or -100 for pixels to leave out.
            prediction: integers of the same shape, 0..C-1, with `unnamed` also C; anything where truth is -100.

        Returns:
            What was added to `counts`, in its shape.

        Raises:
            DataError: the shapes differ, or a value is outside the classes.
        """
        true, predicted = _array(truth), _array(prediction)
        if true.shape != predicted.shape:
            raise DataError(
                found=f"a prediction of shape {tuple(predicted.shape)} for a truth of shape {tuple(true.shape)}",
                allowed="equal shapes",
                fix="upsample the scores to the size of the label image",
            )
        left_out = true == IGNORE_LABEL
        if left_out.all():
            return np.zeros_like(self.counts)
        self._check(true, predicted, left_out)
        size = len(self._columns)
        # Taking pixels out by a mask costs more than the counting: they are counted as one pair and taken off again.
        pairs = true * np.int64(size)
        pairs += predicted
        np.copyto(pairs, 0, where=left_out)
        counted = np.bincount(pairs.ravel(), minlength=self.counts.size)
        counted[0] -= np.count_nonzero(left_out)
        added = counted.reshape(self.counts.shape)
        self.counts += added
        return added

    def _check(self, true: np.ndarray, predicted: np.ndarray, left_out: np.ndarray) -> None:
        size, columns = len(self.classes), len(self._columns)
        within = predicted.min() >= 0 and true.max() < size and predicted.max() < columns
        if within and np.count_nonzero(true < 0) == np.count_nonzero(left_out):
            return
        kinds = [("label", true, self.classes), ("predicted class", predicted, self._columns)]
        for what, values, names in kinds:
            lowest, highest = int(values[~left_out].min()), int(values[~left_out].max())
            if lowest < 0 or highest >= len(names):
                raise DataError(
                    found=f"the {what} {lowest if lowest < 0 else highest}",
                    allowed=f"0..{len(names) - 1} ({', '.join(names)}), or {IGNORE_LABEL} to leave a pixel out",
                    fix="check that labels and predictions belong to the same vocabulary",
                )

    @property
    def true_pixels(self) -> np.ndarray:
        """(C,) int64 pixels of each class in the truth."""
        return self.counts.sum(axis=1)

    @property
    def predicted_pixels(self) -> np.ndarray:
        """(C,) int64 pixels of each class in the prediction."""
        return self.counts.sum(axis=0)[: len(self.classes)]

    @property
    def iou(self) -> np.ndarray:
        """(C,) float64 intersection over union; NaN for a class that is in neither truth nor prediction."""
        return _ratio(self.counts.diagonal(), self.true_pixels + self.predicted_pixels - self.counts.diagonal())

    @property
    def accuracy(self) -> np.ndarray:
        """(C,) float64 share of a class's true pixels that are predicted as such; NaN without true pixels."""
        return _ratio(self.counts.diagonal(), self.true_pixels)

    def metrics(
        self, *, seen: Sequence[bool] | None, things: Sequence[bool], absent_class: AbsentClass
    ) -> dict[str, float | None]:
        """The headline numbers, 0..1 or None.

        `miou` is the mean IoU over classes; `miou_seen`, `miou_unseen`, `miou_things` and `miou_stuff` are means
        over part of them and `miou_harmonic` is the harmonic mean of seen and unseen. `pixel_accuracy` is the
        share of correct pixels, `mean_accuracy` the mean over classes of `accuracy`, `fw_iou` the IoU weighted
        by each class's share of the true pixels.

        Args:
            seen: C flags, True = labelled in training; None: that says nothing here, and its means are left out.
            things: C flags, True = countable.
            absent_class: classes whose value is NaN (see `iou`, `accuracy`) are left out ("exclude") or
                count as 0 ("zero").
        """
        is_thing = np.asarray(things, dtype=bool)
        iou = self.iou
        total = int(self.counts.sum())
        return {
            "miou": mean_over(iou, absent_class=absent_class),
            **({} if seen is None else _by_training(iou, np.asarray(seen, dtype=bool), absent_class)),
            "miou_things": mean_over(iou[is_thing], absent_class=absent_class),
            "miou_stuff": mean_over(iou[~is_thing], absent_class=absent_class),
            "pixel_accuracy": float(self.counts.trace() / total) if total else None,
            "mean_accuracy": mean_over(self.accuracy, absent_class=absent_class),
            "fw_iou": float((self.true_pixels * np.nan_to_num(iou)).sum() / total) if total else None,
        }

    def confusions(self, *, limit: int = 30) -> list[dict[str, Any]]:
        """The most frequent mistakes, most pixels first.

        Returns:
            Rows of true and predicted name, pixels, share (of the true class's pixels, 0..1).
        """
        wrong = self.counts.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
        rows = []
        for true, predicted in zip(*np.unravel_index(order, wrong.shape), strict=True):
            pixels = int(wrong[true, predicted])
            if not pixels:
                break
            rows.append(
                {
                    "true": self.classes[true],
                    "predicted": self._columns[predicted],
                    "pixels": pixels,
                    "share": pixels / int(self.true_pixels[true]),
                }
            )
        return rows


def _by_training(iou: np.ndarray, seen: np.ndarray, absent_class: AbsentClass) -> dict[str, float | None]:
    miou_seen = mean_over(iou[seen], absent_class=absent_class)
    miou_unseen = mean_over(iou[~seen], absent_class=absent_class)
    harmonic = harmonic_mean(miou_seen, miou_unseen)
    return {"miou_seen": miou_seen, "miou_unseen": miou_unseen, "miou_harmonic": harmonic}


def mean_over(values: Iterable[float] | np.ndarray, *, absent_class: AbsentClass) -> float | None:
    """Mean over classes; NaN means absent and is left out or counts as 0. None when nothing is left."""
    array = np.asarray(values, dtype=np.float64)
    kept = np.nan_to_num(array, nan=0.0) if absent_class == "zero" else array[~np.isnan(array)]
    return float(kept.mean()) if len(kept) else None


def harmonic_mean(first: float | None, second: float | None) -> float | None:
    """2ab / (a + b); 0 when both are 0, None when one is None."""
    if first is None or second is None:
        return None
    return 2 * first * second / (first + second) if first + second else 0.0


def _array(values: torch.Tensor | np.ndarray) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
