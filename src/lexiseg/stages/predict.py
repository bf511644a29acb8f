"""Stage <method>-predict: compact low-resolution scores of a method on the evaluated splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lexiseg.data.dataset import PreparedSplit
from lexiseg.data.episodes import LABELS, OTHERS, episode_id, read_episodes, resize_picture
from lexiseg.evaluation.predictions import PredictionWriter
from lexiseg.methods import Scorer, load_scorer

BATCH_PIXELS = 32 * 64 * 64  # pixels computed together: 32 pictures of the world, one photograph

_Question = tuple[str, int, tuple[str, ...]]
"""Id of a prediction, number of its picture, and the labels that the picture is scored by."""


def run(settings: Any, inputs: Mapping[str, Path], outputs: Path, *, method: str) -> None:
    """Write the predictions folder of a trained method."""
    options, asked = getattr(settings, method).predict.model_dump(), settings.evaluate
    scorer = load_scorer(inputs[f"{method}/train"], encode=inputs["encode"], predict=options)
    write_predictions(scorer, inputs["prepare"], outputs, splits=asked.splits, episodes=asked.episodes)


def write_predictions(
    scorer: Scorer, prepared: Path, outputs: Path, *, splits: Sequence[str], episodes: tuple[int, int] | None = None
) -> None:
    """Score every picture of the splits by the data set's class names; or by one class at a time, in its episodes.

    Args:
        scorer: the method.
        prepared: output of the stage prepare.
        outputs: folder to write to.
        splits: names of the splits.
        episodes: [height, width] of the pictures of episodes. Each episode is then scored once, however often it is
            asked, by "others" and its class, and kept as `lexiseg.data.episodes.LABELS`.
    """
    with PredictionWriter(outputs) as writer:
        for name in splits:
            split = PreparedSplit(prepared, name)
            names = LABELS if episodes else split.vocabulary.names
            questions = _of_episodes(split, prepared) if episodes else _of_pictures(split)
            waiting: list[tuple[str, np.ndarray]] = []
            together: tuple[str, ...] = ()  # the labels of those that wait
            for identifier, index, labels in tqdm(questions, desc=f"predict {name}", unit="image", mininterval=1):
                image = split.image(index)
                if episodes:
                    image = resize_picture(image, episodes)
                if waiting and (
                    labels != together
                    or waiting[0][1].shape != image.shape
                    or (len(waiting) + 1) * image[..., 0].size > BATCH_PIXELS
                ):
                    _flush(writer, scorer, name, names, together, waiting)
                together = labels
                waiting.append((identifier, image))
            _flush(writer, scorer, name, names, together, waiting)


def _of_pictures(split: PreparedSplit) -> list[_Question]:
    return [(identifier, index, split.vocabulary.names) for index, identifier in enumerate(split.ids)]


def _of_episodes(split: PreparedSplit, prepared: Path) -> list[_Question]:
    asked, rows = read_episodes(prepared, split.split), {id: row for row, id in enumerate(split.ids)}
    position = {name: number for number, name in enumerate(asked.classes)}
    # By class, so that pictures which are asked about the same one can be computed together.
    pairs = sorted(set(asked.pairs), key=lambda pair: (position[pair[1]], rows[pair[0]]))
    return [(episode_id(sample, name), rows[sample], (OTHERS, name)) for sample, name in pairs]


def _flush(
    writer: PredictionWriter,
    scorer: Scorer,
    split: str,
    names: Sequence[str],
    labels: Sequence[str],
    waiting: list[tuple[str, np.ndarray]],
) -> None:
    if waiting:
        scored = scorer.scores([image for _, image in waiting], labels)
        for (identifier, _), scores in zip(waiting, scored, strict=True):
            writer.add(split, names, identifier, scores)
        waiting.clear()
