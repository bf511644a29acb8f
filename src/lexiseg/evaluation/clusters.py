"""Clusters of one split: they get the names of classes by labels, then the usual numbers follow.

What needs no label is given beside them: how many clusters are used, how evenly, and how near codes are to the centres.

Letters: N clusters, C classes, H x W pixels of a picture.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lexiseg.data.crops import centre_square
from lexiseg.data.dataset import PreparedSplit
from lexiseg.errors import DataError
from lexiseg.evaluation.cluster_scores import ALPHA, ClusterMaps, cluster_names, read_names
from lexiseg.evaluation.coarse import ClassSet, evaluated_classes
from lexiseg.evaluation.evaluate import (
    ClusterTables,
    Example,
    Refine,
    SplitCounter,
    SplitResult,
    check_complete,
    placed,
    spread,
    without_labels,
)
from lexiseg.evaluation.matching import NO_CLASS, ClusterCounts
from lexiseg.evaluation.metrics import ConfusionMatrix, mean_over
from lexiseg.evaluation.predictions import read_predictions
from lexiseg.evaluation.protocol import EVALUATED, Matching, ProtocolCard
from lexiseg.segmentation import IGNORE_LABEL

USED = 0.001  # the share of the pixels from which on a cluster counts as used


def evaluate_clusters(
    *,
    predictions: Path,
    prepared: Path,
    split: str,
    protocol: ProtocolCard,
    pictures: int = 0,
    refine: Refine | None = None,
    names: Sequence[str | None] | None = None,
) -> SplitResult:
    """Evaluate the clusters of one split, picture by picture.

    Args:
        predictions: folder written by `PredictionWriter`: the maps of `cluster_scores.map_names` of every sample, those
            of the split whose labels name the clusters, too.
        prepared: output of the stage `prepare`.
        split: name of the split; under a card with labels its samples without any are passed over.
        protocol: a resolved card of clusters.
        pictures: number of examples to keep.
        refine: (logits (N, H, W), picture (H, W, 3)) -> scores (N, H, W), for the logits of a linear probe as well;
            None: the logits are compared as they are.
        names: the class of each cluster, where an earlier call under the same card found them on a split of their own;
            None: they are found here.

    Returns:
        metrics: those of `SplitResult`, and linear_miou and linear_pixel_accuracy of a linear probe, whose classes have
        their names by training. In any case clusters_used (share of the clusters that win at least a thousandth of the
        pixels, 0..1), usage_entropy (of the clusters' shares of the pixels, 0..1, 1 = all alike; None for one cluster)
        and mean_cosine (of pixels with their cluster's centre, -1..1). Under a card without labels these three are all,
        and there are no tables of classes.

    Raises:
        DataError: predictions of another kind or for other samples than the split's, samples without a prediction, a
            split without labels, or a linear probe of classes that the data set does not have.
    """
    folders: dict[str, Any] = {"predictions": predictions, "prepared": prepared}
    how: dict[str, Any] = {"protocol": protocol, "refine": refine}
    source = _Source(split, **folders, **how)
    wanted = spread(len(source.data), pictures)
    if not protocol.labelled:
        return _without_names(source, wanted)
    classes = evaluated_classes(protocol, source.data.vocabulary)
    usage, counts = _Usage(source.clusters), ClusterCounts(source.clusters, len(classes.names))
    linear = _LinearProbe(source.linear, classes) if source.linear else None
    # Names are known after the last picture. A second look at scores would repeat what takes longest, the refinement.
    maps: list[tuple[int, _Squeezed]] = []
    for found in source.found(f"clusters of {split}"):
        truth = classes.of(found.truth)
        usage.add(found)
        counts.update(clusters=found.clusters, truth=truth)
        if linear is not None:
            linear.add(truth, found.linear)
        maps.append((found.position, _Squeezed.of(found.clusters)))
    if not maps:
        raise without_labels(split)
    assert isinstance(protocol.matching, Matching)  # resolved
    matched_on = split if protocol.matching.split == EVALUATED else protocol.matching.split
    if names is not None:
        classes_of = np.array([NO_CLASS if name is None else classes.position(name) for name in names])
    else:
        theirs = counts if matched_on == split else _counts(_Source(matched_on, **folders, **how), classes)
        classes_of = theirs.match(unmatched=protocol.matching.unmatched)
    result = _named(source, maps, classes, classes_of, wanted)
    more = linear.metrics(protocol) if linear else {}
    found_names = [None if one == NO_CLASS else classes.names[one] for one in classes_of]
    return replace(
        result,
        metrics=result.metrics | more | usage.metrics(),
        clusters=ClusterTables(
            names=tuple(found_names),
            matched_on=matched_on,
            rows=usage.rows(found_names, _precision(counts, classes_of)),
            counts=counts.counts,
        ),
    )


def count_clusters(predictions: Path, split: str) -> int:
    """The number of clusters that the predictions of a split are maps of.

    Raises:
        DataError: predictions of another kind, or none for this split.
    """
    names, _ = read_predictions(predictions, split)
    return _parts(names, split)[0]


def _parts(names: Sequence[str], split: str) -> tuple[int, tuple[str, ...]]:
    try:
        return read_names(names)
    except ValueError as error:
        raise DataError(
            found=f"predictions of the split {split!r} for the labels {', '.join(names[:5])}",
            allowed="maps of clusters",
            fix="run the predict stage again (`dvc repro` does it)",
        ) from error


def _without_names(source: _Source, wanted: set[int]) -> SplitResult:
    """What can be said of clusters without labels."""
    usage, examples = _Usage(source.clusters), []
    for found in source.found(f"evaluate {source.split}"):
        usage.add(found)
        if found.position in wanted:
            id, prediction = source.data.ids[found.position], found.clusters.astype(np.int64)
            examples.append(Example(id=id, image=found.image, truth=None, prediction=prediction))
    nothing = [None] * source.clusters
    return SplitResult(
        classes=cluster_names(source.clusters),
        metrics=usage.metrics(),
        per_class=[],
        confusions=[],
        examples=examples,
        images=usage.images,
        clusters=ClusterTables(
            names=(),
            matched_on=None,
            rows=usage.rows(nothing, nothing),
            counts=np.zeros((source.clusters, 0), np.int64),
        ),
    )


def _named(
    source: _Source,
    maps: Sequence[tuple[int, _Squeezed]],
    classes: ClassSet,
    classes_of: np.ndarray,
    wanted: set[int],
) -> SplitResult:
    """The usual numbers of maps of clusters with the class of each cluster (N,), or `NO_CLASS`."""
    counter, examples = SplitCounter(classes, source.protocol, unnamed=True), []
    # Beyond the classes lies what has none.
    table = np.where(classes_of == NO_CLASS, len(classes.names), classes_of)
    for position, squeezed in tqdm(maps, desc=f"evaluate {source.split}", mininterval=1, unit="image"):
        image, truth = source.view(position)
        truth, prediction = classes.of(truth), table[squeezed.array]
        counter.add(source.data.ids[position], truth, prediction)
        if position in wanted:
            shown = np.where(prediction == len(classes.names), IGNORE_LABEL, prediction)
            examples.append(Example(id=source.data.ids[position], image=image, truth=truth, prediction=shown))
    return counter.result(examples)


def _counts(source: _Source, classes: ClassSet) -> ClusterCounts:
    """Pixels by cluster and class of a split whose labels name the clusters of others."""
    counts, images = ClusterCounts(source.clusters, len(classes.names)), 0
    for found in source.found(f"clusters of {source.split}"):
        counts.update(clusters=found.clusters, truth=classes.of(found.truth))
        images += 1
    if not images:
        raise DataError(
            found=f"no labelled image in the split {source.split!r}, whose labels are to name the clusters",
            allowed="a split with labels",
            fix="set `stego.match.split` to another one, or to null: each evaluated split names them by its own labels",
        )
    return counts


def _precision(counts: ClusterCounts, classes_of: np.ndarray) -> list[float | None]:
    """The share of each cluster's labelled pixels that are of its class."""
    pixels = counts.counts.sum(axis=1)
    return [
        None if one == NO_CLASS or not pixels[cluster] else float(counts.counts[cluster, one] / pixels[cluster])
        for cluster, one in enumerate(classes_of)
    ]


@dataclass(frozen=True, eq=False)
class _Found:
    """A picture and its clusters.

    Attributes:
        position: in the split.
        image: (H, W, 3) uint8 RGB.
        truth: (H, W) class ids of the vocabulary, -100 = none; without labels, empty.
        clusters: (H, W) numbers of clusters, of the smallest unsigned type.
        cosines: (H, W) float32, of each pixel's code with its cluster's centre.
        linear: (H, W) int64 classes of the linear probe, in its order; empty where there is none.
    """

    position: int
    image: np.ndarray
    truth: np.ndarray
    clusters: np.ndarray
    cosines: np.ndarray
    linear: np.ndarray


class _Source:
    """The predictions of one split, as maps of clusters at the size of the labels.

    Attributes:
        split: its name.
        data: its samples.
        clusters: N.
        linear: names of the linear probe's classes; empty where there is none.
    """

    def __init__(
        self,
        split: str,
        *,
        predictions: Path,
        prepared: Path,
        protocol: ProtocolCard,
        refine: Refine | None,
    ) -> None:
        self.split, self.data, self.protocol = split, PreparedSplit(prepared, split), protocol
        self._refine = refine
        self._names, self._scored = read_predictions(predictions, split)
        self.clusters, self.linear = _parts(self._names, split)

    def found(self, title: str) -> Iterator[_Found]:
        """The pictures that count, in the order of the predictions.

        Raises:
            DataError: a prediction for a sample that the split does not have, or a sample without one.
        """
        done: set[int] = set()
        bar = tqdm(self._scored, desc=title, total=len(self.data), mininterval=1, unit="image")
        for position, scores in placed(bar, self.data):
            done.add(position)
            image, truth = self.view(position)
            if truth.size or not self.protocol.labelled:
                yield self._of(position, scores, image, truth)
        check_complete(self.data, done, self.split, labelled=self.protocol.labelled)

    def view(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Picture and class ids of a sample, cropped as the card says; empty ids where it has or needs none."""
        image = self.data.image(position)
        truth = self.data.semantic(position) if self.protocol.labelled else None
        side = self.protocol.centre_crop
        if side is not None:
            image = centre_square(image, side, nearest=self.protocol.crop_filter == "nearest")
            truth = truth if truth is None else centre_square(truth, side, nearest=True)
        return image, np.empty((0, 0), np.int64) if truth is None else truth

    def _of(self, position: int, scores: np.ndarray, image: np.ndarray, truth: np.ndarray) -> _Found:
        maps = ClusterMaps.unpack(self._names, torch.from_numpy(scores))
        height, width = image.shape[:2]
        size: dict[str, Any] = {"height": height, "width": width, "align_corners": self.protocol.align_corners}
        cosines = maps.cosines(**size)
        if self._refine is None:
            best, clusters = cosines.max(dim=0)
        else:
            clusters = self._best(ALPHA * cosines, image)
            best = cosines.gather(0, clusters[None])[0]
        return _Found(
            position=position,
            image=image,
            truth=truth,
            clusters=clusters.numpy().astype(np.min_scalar_type(self.clusters - 1)),
            cosines=best.numpy(),
            linear=self._best(maps.logits(**size), image).numpy() if self.linear else np.empty((0, 0), np.int64),
        )

    def _best(self, logits: torch.Tensor, image: np.ndarray) -> torch.Tensor:
        refined = logits if self._refine is None else torch.from_numpy(self._refine(logits.numpy(), image))
        return refined.max(dim=0).indices  # three times as fast as argmax


class _Usage:
    """How the pixels of all pictures are divided among N clusters."""

    def __init__(self, clusters: int) -> None:
        self.images = 0
        self._pixels, self._cosines = np.zeros(clusters, np.int64), np.zeros(clusters, np.float64)

    def add(self, found: _Found) -> None:
        """Add one picture."""
        numbers = found.clusters.ravel()
        self._pixels += np.bincount(numbers, minlength=len(self._pixels))
        self._cosines += np.bincount(numbers, weights=found.cosines.ravel(), minlength=len(self._pixels))
        self.images += 1

    def metrics(self) -> dict[str, float | None]:
        """{"clusters_used", "usage_entropy", "mean_cosine"}, see `evaluate_clusters`."""
        total = max(1, int(self._pixels.sum()))
        share = self._pixels / total
        some = share[share > 0]
        entropy = float(-(some * np.log(some)).sum() / np.log(len(share))) if len(share) > 1 else None
        return {
            "clusters_used": float((share >= USED).mean()),
            "usage_entropy": entropy,
            "mean_cosine": float(self._cosines.sum() / total),
        }

    def rows(self, names: Sequence[str | None], precision: Sequence[float | None]) -> list[dict[str, Any]]:
        """See `ClusterTables.rows`."""
        total, pixels = max(1, int(self._pixels.sum())), self._pixels
        return [
            {
                "cluster": cluster,
                "class": names[cluster],
                "pixels": int(pixels[cluster]),
                "share": float(pixels[cluster] / total),
                "cosine": float(self._cosines[cluster] / pixels[cluster]) if pixels[cluster] else None,
                "precision": precision[cluster],
            }
            for cluster in range(len(pixels))
        ]


class _LinearProbe:
    """Counts of a linear probe, whose classes have their names by training.

    Args:
        names: of its classes: those that are evaluated, or parts of them.
        classes: that are evaluated.
    """

    def __init__(self, names: Sequence[str], classes: ClassSet) -> None:
        found = np.array([classes.position(name) for name in names])
        self._table = np.where(found == IGNORE_LABEL, len(classes.names), found)
        self._confusion = ConfusionMatrix(classes.names, unnamed=True)

    def add(self, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Add one picture."""
        self._confusion.update(truth=truth, prediction=self._table[predicted])

    def metrics(self, protocol: ProtocolCard) -> dict[str, float | None]:
        """{"linear_miou", "linear_pixel_accuracy"}, 0..1, or None without a labelled pixel."""
        counts = self._confusion.counts
        total = int(counts.sum())
        return {
            "linear_miou": mean_over(self._confusion.iou, absent_class=protocol.absent_class),
            "linear_pixel_accuracy": float(counts.trace() / total) if total else None,
        }


@dataclass(frozen=True, eq=False)
class _Squeezed:
    """A map of clusters, compressed: those of a large split would not fit into memory otherwise."""

    content: bytes
    shape: tuple[int, ...]
    kind: np.dtype

    @classmethod
    def of(cls, array: np.ndarray) -> _Squeezed:
        return cls(zlib.compress(array.tobytes(), level=1), array.shape, array.dtype)

    @property
    def array(self) -> np.ndarray:
        return np.frombuffer(zlib.decompress(self.content), dtype=self.kind).reshape(self.shape)
