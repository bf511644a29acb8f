"""Predictions of one split against its labels, under one protocol card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lexiseg.data.dataset import PreparedSplit
from lexiseg.errors import DataError
from lexiseg.evaluation.boundary import BoundaryScore
from lexiseg.evaluation.metrics import AbsentClass, ConfusionMatrix
from lexiseg.evaluation.predictions import read_predictions
from lexiseg.evaluation.protocol import ProtocolCard
from lexiseg.segmentation import IGNORE_LABEL, upsample_argmax
from lexiseg.vocabulary import Vocabulary

# Images of one shape are upsampled together; more than this many gains nothing on a CPU.
_BATCH = 16


@dataclass(frozen=True, eq=False)
class Example:
    """One picture to look at.

    Attributes:
        id: the sample's id.
        image: (H, W, 3) uint8 RGB.
        truth: (H, W) int64 class ids of `SplitResult.classes`, -100 where ignored.
        prediction: (H, W) int64 class ids of `SplitResult.classes`.
    """

    id: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray


@dataclass(frozen=True, eq=False)
class SplitResult:
    """What evaluation says about one split.

    Attributes:
        classes: names that were evaluated, by id.
        metrics: {miou, miou_seen, miou_unseen, miou_harmonic, miou_things, miou_stuff, pixel_accuracy,
            mean_accuracy, fw_iou, boundary_f}, each 0..1, or None where it does not exist.
        per_class: a row per class: class, seen, thing, iou, accuracy, boundary_f, pixels_true, pixels_predicted.
        confusions: rows of true, predicted, pixels, share; most pixels first.
        examples: a few pictures, spread evenly over the split.
        images: number of labelled images that were counted.
    """

    classes: tuple[str, ...]
    metrics: dict[str, float | None]
    per_class: list[dict[str, Any]]
    confusions: list[dict[str, Any]]
    examples: list[Example]
    images: int


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
    counter = _Counter(data.vocabulary, protocol)
    positions = {id: position for position, id in enumerate(data.ids)}
    wanted = spread(len(data.ids), pictures)
    examples: list[Example] = []
    done: set[str] = set()
    # The order of the labels is the writer's; from here on rows are in the order of the evaluated classes.
    rows = [names.index(name) for name in counter.classes]
    bar = tqdm(scored, desc=f"evaluate {split}", total=len(positions), mininterval=1, unit="image")
    for batch in _batches(_labelled(bar, data, positions, rows, done, refine)):
        maps = _label_maps(batch, protocol, counter.classes, overlapping=overlapping)
        for sample, prediction in zip(batch, maps, strict=True):
            truth = counter.add(sample.truth, prediction)
            if sample.position in wanted:
                examples.append(Example(id=sample.id, image=sample.image, truth=truth, prediction=prediction))
    _check_complete(data, done, split)
    if not counter.images:
        raise DataError(
            found=f"no labelled image in the split {split!r}",
            allowed="a split with labels",
            fix="take another split in `evaluate.splits` of params.yaml",
        )
    return counter.result(examples)


@dataclass(frozen=True, eq=False)
class _Sample:
    id: str
    position: int
    scores: np.ndarray
    image: np.ndarray
    truth: np.ndarray


class _Counter:
    """Everything that is counted over the images of a split."""

    def __init__(self, vocabulary: Vocabulary, protocol: ProtocolCard) -> None:
        ids = protocol.classes(vocabulary)
        self.classes = tuple(vocabulary.names[id] for id in ids)
        self.images = 0
        self._seen = [vocabulary.seen[id] for id in ids]
        self._things = [vocabulary.things[id] for id in ids]
        self._absent: AbsentClass = protocol.absent_class
        self._all = vocabulary.names
        # Class id -> position among the evaluated ones; the extra last entry is where -100 looks up itself.
        self._position = np.full(len(vocabulary) + 1, IGNORE_LABEL, dtype=np.int64)
        self._position[list(ids)] = np.arange(len(ids))
        self._confusion = ConfusionMatrix(self.classes)
        self._boundary = BoundaryScore(self.classes, tolerance=protocol.boundary_tolerance or 0.0)

    def add(self, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """Count one image; returns its truth among the evaluated classes."""
        highest = int(truth.max(initial=IGNORE_LABEL))
        if highest >= len(self._all):
            raise DataError(
                found=f"the label {highest} in the prepared data",
                allowed=f"0..{len(self._all) - 1} ({', '.join(self._all)})",
                fix="run the stages prepare and validate again",
            )
        truth = self._position[np.where(truth == IGNORE_LABEL, len(self._all), truth)]
        self._confusion.update(truth=truth, prediction=prediction)
        self._boundary.update(truth=truth, prediction=prediction)
        self.images += 1
        return truth

    def result(self, examples: list[Example]) -> SplitResult:
        confusion, boundary = self._confusion, self._boundary
        metrics = confusion.metrics(seen=self._seen, things=self._things, absent_class=self._absent)
        iou, accuracy, boundary_f = confusion.iou, confusion.accuracy, boundary.f_score
        true, predicted = confusion.true_pixels, confusion.predicted_pixels
        return SplitResult(
            classes=self.classes,
            metrics={**metrics, "boundary_f": boundary.mean(absent_class=self._absent)},
            per_class=[
                {
                    "class": name,
                    "seen": self._seen[id],
                    "thing": self._things[id],
                    "iou": _number(iou[id]),
                    "accuracy": _number(accuracy[id]),
                    "boundary_f": _number(boundary_f[id]),
                    "pixels_true": int(true[id]),
                    "pixels_predicted": int(predicted[id]),
                }
                for id, name in enumerate(self.classes)
            ],
            confusions=confusion.confusions(),
            examples=examples,
            images=self.images,
        )


def _labelled(
    scored: Any,
    data: PreparedSplit,
    positions: dict[str, int],
    rows: list[int],
    done: set[str],
    refine: Refine | None,
) -> Iterator[_Sample]:
    for id, scores in scored:
        if id not in positions:
            raise DataError(
                found=f"a prediction for {id!r}, which is not in the prepared split",
                allowed="predictions for the samples of the data set as it is now",
                fix="run the predict stage again (`dvc repro` does it)",
            )
        done.add(id)
        sample = data[positions[id]]
        if sample["semantic"] is not None:
            scores = scores[..., rows, :, :] if refine is None else refine(scores[..., rows, :, :], sample["image"])
            yield _Sample(id, positions[id], scores, sample["image"], sample["semantic"])


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


def _check_complete(data: PreparedSplit, done: set[str], split: str) -> None:
    left = [position for position, id in enumerate(data.ids) if id not in done]
    missing = [data.ids[position] for position in left if data[position]["semantic"] is not None]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise DataError(
            found=f"no prediction for {len(missing)} labelled sample(s) of the split {split!r}: {shown}",
            allowed="a prediction for every labelled sample, or the mean would be of an easier set",
            fix="run the predict stage again (`dvc repro` does it)",
        )


def spread(size: int, count: int) -> set[int]:
    """At most `count` of the numbers below `size`, evenly spread, the first and the last among them."""
    return {int(position) for position in np.linspace(0, size - 1, min(size, count)).round()} if size else set()


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
