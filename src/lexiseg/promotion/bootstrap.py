"""How sure the difference between two models is: a paired bootstrap over pictures.

Both models saw the same pictures, and mIoU is pooled over them. So pictures are drawn again with replacement, the same
for both, their pixel counts are added up, and the two means are subtracted; the interval is that of the percentiles
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lexiseg.evaluation.image_counts import ImageCounts
from lexiseg.evaluation.metrics import AbsentClass

_CHUNK = 256  # resamples counted together: weights of 256 x pictures


@dataclass(frozen=True)
class Difference:
    """The difference of two models' mIoU, and what it is known to within.

    Attributes:
        estimate: of the pictures themselves, -1..1; above 0 the first model is better.
        low, high: ends of the interval.
        confidence: of the interval, two-sided.
        images: number of pictures.
        resamples: of the bootstrap.
    """

    estimate: float
    low: float
    high: float
    confidence: float
    images: int
    resamples: int


def paired_difference(
    first: ImageCounts,
    second: ImageCounts,
    *,
    absent_class: AbsentClass,
    confidence: float,
    resamples: int,
    seed: int = 0,
) -> Difference:
    """mIoU of the first model minus that of the second, with its interval.

    Args:
        first, second: counts of the same pictures and classes, in the same order.
        absent_class: of the protocol card; applied in every resample anew.
        confidence: two-sided, 0..1.
        resamples: how many.
        seed: of the draws.

    Raises:
        ValueError: other pictures or classes.
    """
    if first.ids != second.ids or first.classes != second.classes or not first.ids:
        raise ValueError("counts of the same pictures and classes, in the same order, and at least of one")
    images, rng = len(first.ids), np.random.default_rng(seed)
    tables = [np.concatenate([one.intersection, one.union], axis=1).astype(np.float64) for one in (first, second)]

    def difference(weights: np.ndarray) -> np.ndarray:
        ours, theirs = (_miou(weights @ table, absent_class) for table in tables)
        return ours - theirs

    drawn: list[np.ndarray] = []
    for start in range(0, resamples, _CHUNK):
        weights = rng.multinomial(images, np.full(images, 1 / images), size=min(_CHUNK, resamples - start))
        drawn.append(difference(weights.astype(np.float64)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail])
    return Difference(
        estimate=float(difference(np.ones((1, images)))[0]),
        low=float(low),
        high=float(high),
        confidence=confidence,
        images=images,
        resamples=resamples,
    )


def pooled_iou(counts: ImageCounts) -> np.ndarray:
    """(C,) float64 IoU of each class over all pictures; NaN for a class in neither truth nor prediction."""
    union = counts.union.sum(axis=0)
    return np.divide(counts.intersection.sum(axis=0), union, out=np.full(len(union), np.nan), where=union > 0)


def _miou(sums: np.ndarray, absent_class: AbsentClass) -> np.ndarray:
    """(B,) means of (B, 2C) sums of intersections and unions."""
    intersection, union = np.split(sums, 2, axis=1)
    there = union > 0
    iou = np.divide(intersection, union, out=np.zeros_like(intersection), where=there)
    number = there.sum(axis=1) if absent_class == "exclude" else there.shape[1]
    return iou.sum(axis=1) / np.maximum(number, 1)
