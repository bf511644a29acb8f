"""Episodes with two labels: the meter of the few-shot benchmarks, and the evaluation of a split by it.

In an episode the only question is where ONE class is; everything else is "others". Pixels are added up per class
over all episodes that ask for it, so large objects count more and a question that is asked twice counts twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lexiseg.data.dataset import PreparedSplit
from lexiseg.data.episodes import LABELS, OTHERS, episode_id, read_episodes, resize_ids, resize_picture
from lexiseg.errors import DataError
from lexiseg.evaluation.evaluate import Example, Refine, SplitResult, spread
from lexiseg.evaluation.image_counts import ImageCounter
from lexiseg.evaluation.metrics import AbsentClass, mean_over
from lexiseg.evaluation.predictions import read_predictions
from lexiseg.evaluation.protocol import ProtocolCard
from lexiseg.segmentation import IGNORE_LABEL, upsample_argmax

_COUNTED = ("intersection", "true", "predicted")


class EpisodeMeter:
    """Count pixels of two-label episodes by class.

    Args:
        classes: the C names that may be asked for; the mean is over all of them.

    Attributes:
        episodes: (C,) int64, how often each class was asked for.
        intersection: (C, 2) int64 pixels where prediction and truth agree: on "others", on the class.
        union: (C, 2) int64 pixels where prediction or truth says "others", where one of them says the class.

    Example:
        >>> meter = EpisodeMeter(["dog", "cat"])
        >>> meter.update([[0, 1]], [[1, 1]], None, "dog")
        >>> meter.miou(absent_class="zero"), meter.fb_iou
        (0.25, 0.25)
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self._position = {name: position for position, name in enumerate(self.classes)}
        self.episodes = np.zeros(len(self.classes), np.int64)
        self.intersection = np.zeros((len(self.classes), 2), np.int64)
        self.union = np.zeros((len(self.classes), 2), np.int64)

    def update(self, prediction: Any, truth: Any, ignore: Any, name: str, *, times: int = 1) -> tuple[int, int, int]:
        """Add an episode.

        Args:
            prediction: (H, W) array or tensor, 0 = others, 1 = the class.
            truth: the same.
            ignore: (H, W), true where a pixel counts nowhere; or None.
            name: the class that was asked for.
            times: how often the episode counts.

        Returns:
            Pixels of the class, times `times`: where prediction and truth agree, of the truth, and of the prediction.

        Raises:
            DataError: the shapes differ, or the class is not in the meter.
        """
        ours, theirs = np.asarray(prediction), np.asarray(truth)
        counted = np.ones(theirs.shape, bool) if ignore is None else ~np.asarray(ignore).astype(bool)
        if not ours.shape == theirs.shape == counted.shape or name not in self._position:
            raise DataError(
                found=f"an episode of {name!r}: a prediction of shape {ours.shape} for a truth of shape {theirs.shape} "
                f"and ignored pixels of shape {counted.shape}",
                allowed=f"equal shapes, and one of the classes {', '.join(self.classes[:10])}",
                fix="upsample the scores to the size of the truth, and check that both are of one data set",
            )
        is_class, should_be = ours[counted] == 1, theirs[counted] == 1
        both, one = int((is_class & should_be).sum()), int((is_class | should_be).sum())
        position, pixels = self._position[name], is_class.size
        self.intersection[position] += times * np.array([pixels - one, both])
        self.union[position] += times * np.array([pixels - both, one])
        self.episodes[position] += times
        return times * both, times * int(should_be.sum()), times * int(is_class.sum())

    @property
    def iou(self) -> np.ndarray:
        """(C,) float64 foreground IoU, 0..1; NaN for a class without a pixel in truth and prediction of any episode."""
        whole = self.union[:, 1]
        return np.divide(self.intersection[:, 1], whole, out=np.full(len(whole), np.nan), where=whole > 0)

    def miou(self, *, absent_class: AbsentClass) -> float | None:
        """Mean of `iou` over classes; NaN counts as 0 ("zero", as the benchmarks do) or is left out ("exclude")."""
        return mean_over(self.iou, absent_class=absent_class)

    @property
    def fb_iou(self) -> float | None:
        """Mean of two ratios over all classes' pixels together, that of "others" and that of the class; or None."""
        union = self.union.sum(axis=0)
        return float((self.intersection.sum(axis=0) / union).mean()) if union.all() else None

    def result(self, *, absent_class: AbsentClass = "zero") -> dict[str, float | None]:
        """{"miou", "fb_iou"}, 0..1."""
        return {"miou": self.miou(absent_class=absent_class), "fb_iou": self.fb_iou}


def evaluate_episodes(
    *,
    predictions: Path,
    prepared: Path,
    split: str,
    protocol: ProtocolCard,
    pictures: int = 0,
    refine: Refine | None = None,
) -> SplitResult:
    """Evaluate the episodes of one split, one by one.

    Args:
        predictions: folder written by `PredictionWriter`: the maps `LABELS` of every episode, once.
        prepared: output of the stage `prepare`.
        split: name of the split.
        protocol: a resolved card with the size of the pictures in `episodes`.
        pictures: number of examples to keep.
        refine: see `Refine`.

    Returns:
        metrics: `EpisodeMeter.result` and the number of episodes. per_class: class, seen, episodes, iou,
        intersection, union. classes: "others", then those that are asked for.

    Raises:
        DataError: no episodes, predictions for other labels or episodes, or episodes without a prediction.
    """
    assert isinstance(protocol.episodes, tuple)  # resolved
    data, asked, size = PreparedSplit(prepared, split), read_episodes(prepared, split), protocol.episodes
    names, scored = read_predictions(predictions, split)
    times = Counter(asked.pairs)
    waiting = {episode_id(*pair): pair for pair in times}
    again = "run the predict stage again (`dvc repro` does it)"
    if names != LABELS:
        raise DataError(
            found=f"predictions of the split {split!r} for the labels {', '.join(names[:5])}",
            allowed=f"predictions of episodes, with the labels {', '.join(LABELS)}",
            fix=again,
        )
    meter, by_image, examples = EpisodeMeter(asked.classes), ImageCounter(asked.classes), []
    positions = {id: position for position, id in enumerate(data.ids)}
    wanted = spread(len(waiting), pictures)
    bar = tqdm(scored, desc=f"evaluate {split}", total=len(waiting), mininterval=1, unit="episode")
    for number, (id, scores) in enumerate(bar):
        if id not in waiting:
            raise DataError(
                found=f"a prediction for {id!r}, which is no episode of the prepared split",
                allowed="predictions for the episodes of the data set as it is now",
                fix=again,
            )
        sample, name = pair = waiting.pop(id)
        row = data[positions[sample]]
        truth = resize_ids(row["semantic"], size)
        is_class, ignored = truth == data.vocabulary.index(name), truth == IGNORE_LABEL
        image = resize_picture(row["image"], size)
        if refine is not None:
            scores = refine(scores, image)
        best = upsample_argmax(
            torch.from_numpy(scores)[None], height=size[0], width=size[1], align_corners=protocol.align_corners
        )
        found = best[0].numpy()
        counted = meter.update(found, is_class, ignored, name, times=times[pair])
        of_class = np.arange(len(asked.classes)) == asked.classes.index(name)
        by_image.add(sample, **{key: n * of_class for key, n in zip(_COUNTED, counted, strict=True)})
        if number in wanted:
            label = 1 + asked.classes.index(name)
            examples.append(
                Example(
                    id=f"{sample}, {name}",
                    image=image,
                    truth=np.where(ignored, IGNORE_LABEL, np.where(is_class, label, 0)),
                    prediction=np.where(found == 1, label, 0),
                )
            )
    if waiting:
        raise DataError(
            found=f"no prediction for {len(waiting)} episode(s) of the split {split!r}: {', '.join([*waiting][:5])}",
            allowed="a prediction for every episode, or the mean would be of easier questions",
            fix=again,
        )
    seen = dict(zip(data.vocabulary.names, data.vocabulary.seen, strict=True))
    return SplitResult(
        classes=(OTHERS, *asked.classes),
        metrics={**meter.result(absent_class=protocol.absent_class), "episodes": int(meter.episodes.sum())},
        per_class=[
            {
                "class": name,
                "seen": seen[name],
                "episodes": int(meter.episodes[position]),
                "iou": None if np.isnan(meter.iou[position]) else float(meter.iou[position]),
                "intersection": int(meter.intersection[position, 1]),
                "union": int(meter.union[position, 1]),
            }
            for position, name in enumerate(asked.classes)
        ],
        confusions=[],
        examples=examples,
        images=len(times),
        by_image=by_image.result(),
    )
