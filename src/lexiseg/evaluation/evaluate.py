"""Predictions of one split against its labels, under one protocol card."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lexiseg.data.dataset import PreparedSplit
from lexiseg.errors import DataError
from lexiseg.evaluation.boundary import BoundaryScore
from lexiseg.evaluation.coarse import ClassSet, evaluated_classes
from lexiseg.evaluation.image_counts import ImageCounter, ImageCounts
from lexiseg.evaluation.metrics import AbsentClass, ConfusionMatrix
from lexiseg.evaluation.predictions import read_predictions
from lexiseg.evaluation.protocol import ProtocolCard
from lexiseg.segmentation import upsample_argmax
from lexiseg.vocabulary import Vocabulary

# Images of one shape are upsampled together; more than this many gains nothing on a CPU.
_BATCH = 16


@dataclass(frozen=True, eq=False)
class Example:
    """One picture to look at.

    Attributes:
        id: the sample's id.
        image: (H, W, 3) uint8 RGB.
        truth: (H, W) int64 class ids of `SplitResult.classes`, -100 where ignored; None: no labels were read.
        prediction: (H, W) int64 class ids of `SplitResult.classes`, -100 where a cluster has no class.
    """

    id: str
    image: np.ndarray
    truth: np.ndarray | None
    prediction: np.ndarray


@dataclass(frozen=True, eq=False)
class ClusterTables:
    """What evaluation says about the clusters of one split.

    Attributes:
        names: the class of each cluster by its labels, or None where it has none; empty without labels.
        matched_on: the split whose labels those are; None without labels.
        rows: a row per cluster: cluster, class, pixels, share (of all pixels, 0..1), cosine (mean of its pixels' codes
            with its centre), precision (share of its labelled pixels that are of its class, 0..1).
        counts: (N, C) int64 labelled pixels by cluster and true class.
    """

    names: tuple[str | None, ...]
    matched_on: str | None
    rows: list[dict[str, Any]]
    counts: np.ndarray


@dataclass(frozen=True, eq=False)
class SplitResult:
    """What evaluation says about one split.

    Attributes:
        classes: names that were evaluated, by id; of clusters without labels, the clusters' own.
        metrics: {miou, miou_seen, miou_unseen, miou_harmonic, miou_things, miou_stuff, pixel_accuracy,
            mean_accuracy, fw_iou, boundary_f}, each 0..1, or None where it does not exist. Of clusters without
            miou_seen, miou_unseen and miou_harmonic: no class was labelled in their training.
        per_class: a row per class: class, seen (not of clusters), thing, iou, accuracy, boundary_f, pixels_true,
            pixels_predicted.
        confusions: rows of true, predicted, pixels, share; most pixels first.
        examples: a few pictures, spread evenly over the split.
        images: number of labelled images that were counted; without labels, of all.
        by_image: what was counted in each of them; None without labels.
        clusters: of methods of clusters; None for the others.
    """

    classes: tuple[str, ...]
    metrics: dict[str, float | None]
    per_class: list[dict[str, Any]]
    confusions: list[dict[str, Any]]
    examples: list[Example]
    images: int
    by_image: ImageCounts | None = None
    clusters: ClusterTables | None = None


Refine = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""What a method does to its scores before they are compared: (saved scores, picture (H, W, 3)) -> (N, h, w)."""


def evaluate_split(
    *,
    predictions: Path,
    prepared: Path,
    split: str,
    protocol: ProtocolCard,
    pictures: int = 0,
    refine: Refine | None = None,
    overlapping: bool = False,
) -> SplitResult:
    """Evaluate one split, image by image, so that memory does not grow with it.

    Args:
        predictions: folder written by `PredictionWriter`.
        prepared: output of the stage `prepare`.
        split: name of the split; its samples without labels are passed over.
        protocol: a resolved card (see `ProtocolCard.resolve`).
        pictures: number of examples to keep.
        refine: see `Refine`; None: the saved scores are compared as they are.
        overlapping: what is compared are soft masks, 0..1, not logits.

    Raises:
        DataError: predictions for other labels or samples than the split's, labelled samples without a
            prediction, or a split without labels.
    """
    data = PreparedSplit(prepared, split)
    names, scored = read_predictions(predictions, split)
    _check_labels(names, data.vocabulary, split)
    classes = evaluated_classes(protocol, data.vocabulary)
    counter = SplitCounter(classes, protocol)
    wanted = spread(len(data.ids), pictures)
    examples: list[Example] = []
    done: set[int] = set()
    # The order of the labels is the writer's; from here on rows are in the order of the evaluated classes.
    rows = [names.index(name) for name in classes.names]
    bar = tqdm(scored, desc=f"evaluate {split}", total=len(data), mininterval=1, unit="image")
    for batch in _batches(_labelled(placed(bar, data), data, rows, done, refine)):
        maps = _label_maps(batch, protocol, classes.names, overlapping=overlapping)
        for sample, prediction in zip(batch, maps, strict=True):
            truth = classes.of(sample.truth)
            id = data.ids[sample.position]
            counter.add(id, truth, prediction)
            if sample.position in wanted:
                examples.append(Example(id=id, image=sample.image, truth=truth, prediction=prediction))
    check_complete(data, done, split)
    if not counter.images:
        raise without_labels(split)
    return counter.result(examples)


@dataclass(frozen=True, eq=False)
class _Sample:
    position: int
    scores: np.ndarray
    image: np.ndarray
    truth: np.ndarray


class SplitCounter:
    """Everything that is counted over the images of a split.

    Args:
        classes: the C classes.
        protocol: a resolved card.
        unnamed: predictions may be of no class, C.

    Attributes:
        images: number of images that were counted.
    """

    def __init__(self, classes: ClassSet, protocol: ProtocolCard, *, unnamed: bool = False) -> None:
        self.images = 0
        self._classes = classes
        self._seen = None if protocol.of_clusters else classes.seen
        self._absent: AbsentClass = protocol.absent_class
        self._confusion = ConfusionMatrix(classes.names, unnamed=unnamed)
        self._by_image = ImageCounter(classes.names)
        self._boundary = BoundaryScore(classes.names, tolerance=protocol.boundary_tolerance or 0.0)

    def add(self, id: str, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Count one image: (H, W) integers 0..C-1; -100 in the truth is ignored, C in the prediction is no class."""
        counted = self._confusion.update(truth=truth, prediction=prediction)
        predicted = counted.sum(axis=0)[: len(self._classes.names)]  # beyond them, what has no class
        self._by_image.add(id, intersection=counted.diagonal(), true=counted.sum(axis=1), predicted=predicted)
        self._boundary.update(truth=truth, prediction=prediction)
        self.images += 1

    def result(self, examples: list[Example]) -> SplitResult:
        """The numbers of all images."""
        classes, confusion, boundary = self._classes, self._confusion, self._boundary
        metrics = confusion.metrics(seen=self._seen, things=classes.things, absent_class=self._absent)
        iou, accuracy, boundary_f = confusion.iou, confusion.accuracy, boundary.f_score
        true, predicted = confusion.true_pixels, confusion.predicted_pixels
        return SplitResult(
            classes=classes.names,
            metrics={**metrics, "boundary_f": boundary.mean(absent_class=self._absent)},
            per_class=[
                {
                    "class": name,
                    **({} if self._seen is None else {"seen": self._seen[id]}),
                    "thing": classes.things[id],
                    "iou": _number(iou[id]),
                    "accuracy": _number(accuracy[id]),
                    "boundary_f": _number(boundary_f[id]),
                    "pixels_true": int(true[id]),
                    "pixels_predicted": int(predicted[id]),
                }
                for id, name in enumerate(classes.names)
            ],
            confusions=confusion.confusions(),
            examples=examples,
            images=self.images,
            by_image=self._by_image.result(),
        )


def placed(scored: Iterable[tuple[str, np.ndarray]], data: PreparedSplit) -> Iterator[tuple[int, np.ndarray]]:
    """Predictions (id, scores) -> (position in the split, scores).

    Raises:
        DataError: an id that the split does not have.
    """
    positions = {id: position for position, id in enumerate(data.ids)}
    for id, scores in scored:
        if id not in positions:
            raise DataError(
                found=f"a prediction for {id!r}, which is not in the prepared split",
                allowed="predictions for the samples of the data set as it is now",
                fix="run the predict stage again (`dvc repro` does it)",
            )
        yield positions[id], scores


def _labelled(
    scored: Iterator[tuple[int, np.ndarray]],
    data: PreparedSplit,
    rows: list[int],
    done: set[int],
    refine: Refine | None,
) -> Iterator[_Sample]:
    for position, scores in scored:
        done.add(position)
        truth = data.semantic(position)
        if truth is not None:
            image = data.image(position)
            scores = scores[..., rows, :, :] if refine is None else refine(scores[..., rows, :, :], image)
            yield _Sample(position, scores, image, truth)


def _batches(samples: Iterator[_Sample]) -> Iterator[list[_Sample]]:
    """Neighbours of equal shapes together."""
    batch: list[_Sample] = []
    for sample in samples:
        if batch and (
            len(batch) == _BATCH
            or batch[0].scores.shape != sample.scores.shape
            or batch[0].truth.shape != sample.truth.shape
        ):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def _label_maps(
    batch: list[_Sample], protocol: ProtocolCard, classes: tuple[str, ...], *, overlapping: bool
) -> np.ndarray:
    background = protocol.background
    scores = torch.from_numpy(np.stack([sample.scores for sample in batch]))
    if background.threshold is not None and background.label in classes:
        # With a constant map for background, "no class reaches the threshold" is an ordinary argmax.
        position = classes.index(background.label)
        if not overlapping:
            scores[:, position] = -torch.inf
            scores = scores.softmax(dim=1)
        scores[:, position] = background.threshold
    height, width = batch[0].truth.shape
    found = upsample_argmax(scores, height=height, width=width, align_corners=protocol.align_corners)
    return found.long().numpy()


def _check_labels(names: tuple[str, ...], vocabulary: Vocabulary, split: str) -> None:
    missing = [name for name in vocabulary.names if name not in names]
    extra = [name for name in names if name not in vocabulary.names]
    if missing or extra:
        raise DataError(
            found=f"predictions of the split {split!r} that lack {', '.join(missing) or 'nothing'}"
            f" and have {', '.join(extra) or 'nothing'} beyond the vocabulary",
            allowed=f"the vocabulary's names: {', '.join(vocabulary.names)}",
            fix="run the predict stage again on this data set (`dvc repro` does it)",
        )


def check_complete(data: PreparedSplit, done: set[int], split: str, *, labelled: bool = True) -> None:
    """Refuse a split of which samples lack a prediction.

    Args:
        data: the split.
        done: positions of those that have one.
        split: its name.
        labelled: only samples with labels have to have one.

    Raises:
        DataError: at least one is missing.
    """
    left = [position for position in range(len(data)) if position not in done]
    missing = [data.ids[position] for position in left if not labelled or data.semantic(position) is not None]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        kind = "labelled sample(s)" if labelled else "sample(s)"
        raise DataError(
            found=f"no prediction for {len(missing)} {kind} of the split {split!r}: {shown}",
            allowed=f"a prediction for every {kind.removesuffix('(s)')}, or the mean would be of an easier set",
            fix="run the predict stage again (`dvc repro` does it)",
        )


def without_labels(split: str) -> DataError:
    """The error of a split without labels, under a card that compares with labels."""
    return DataError(
        found=f"no labelled image in the split {split!r}",
        allowed="a split with labels, which miou, pixel_accuracy, boundary_f and all other comparisons with a truth "
        "need; clusters can be described without (clusters_used, usage_entropy, mean_cosine, pictures of the clusters)",
        fix="take another split in `evaluate.splits` of params.yaml; or, for STEGO alone, set "
        "`stego.protocol: unlabelled`, and `run: false` for the methods that know classes",
    )


def spread(size: int, count: int) -> set[int]:
    """At most `count` of the numbers below `size`, evenly spread, the first and the last among them."""
    return {int(position) for position in np.linspace(0, size - 1, min(size, count)).round()} if size else set()


def _number(value: float) -> float | None:
    """A float, or None for NaN."""
    return None if np.isnan(value) else float(value)
