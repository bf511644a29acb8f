"""Stage <method>-predict: compact low-resolution scores of a method on the evaluated splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lexiseg.data.dataset import PreparedSplit
from lexiseg.evaluation.predictions import PredictionWriter
from lexiseg.methods import Scorer, load_scorer

BATCH_PIXELS = 32 * 64 * 64  # pixels computed together: 32 pictures of the world, one photograph


def run(settings: Any, inputs: Mapping[str, Path], outputs: Path, *, method: str) -> None:
    """Write the predictions folder of a trained method."""
    options = getattr(settings, method).predict.model_dump()
    scorer = load_scorer(inputs[f"{method}/train"], encode=inputs["encode"], predict=options)
    write_predictions(scorer, inputs["prepare"], outputs, splits=settings.evaluate.splits)


def write_predictions(scorer: Scorer, prepared: Path, outputs: Path, *, splits: Sequence[str]) -> None:
    """Score every picture of the splits by the data set's class names."""
    with PredictionWriter(outputs) as writer:
        for name in splits:
            split = PreparedSplit(prepared, name)
            labels = split.vocabulary.names
            waiting: list[tuple[str, np.ndarray]] = []
            for index in tqdm(range(len(split)), desc=f"predict {name}", unit="image", mininterval=1):
                image = split.image(index)
                if waiting and (
                    waiting[0][1].shape != image.shape or (len(waiting) + 1) * image[..., 0].size > BATCH_PIXELS
                ):
                    _flush(writer, scorer, name, labels, waiting)
                waiting.append((split.ids[index], image))
            _flush(writer, scorer, name, labels, waiting)


def _flush(
    writer: PredictionWriter, scorer: Scorer, split: str, labels: Sequence[str], waiting: list[tuple[str, np.ndarray]]
) -> None:
    if waiting:
        for (identifier, _), scores in zip(
            waiting, scorer.scores([image for _, image in waiting], labels), strict=True
        ):
            writer.add(split, labels, identifier, scores)
        waiting.clear()
