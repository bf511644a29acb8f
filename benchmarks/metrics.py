"""Pooled mIoU: lexiseg's ConfusionMatrix beside torchmetrics.

    python benchmarks/metrics.py --out

The peer is `MulticlassJaccardIndex(average="macro", ignore_index=-100)`: one confusion matrix over all pictures, and
the mean over the classes that occur, as lexiseg has it. `torchmetrics.segmentation.MeanIoU` is no peer: it averages
the values of single pictures, and it has no label to ignore. lexiseg always checks the range of what it is given;
torchmetrics by default counts the different values instead, and "unchecked" is torchmetrics without that. All get
the same int64 tensors, picture by picture. A run makes the metric, updates it by every picture, and reads its value.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from lexiseg.environment import keep_memory
from lexiseg.evaluation.metrics import ConfusionMatrix, mean_over
from lexiseg.segmentation import IGNORE_LABEL

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import arguments_for, compare, table, use_threads, write_result

TOLERANCE = 1e-6  # torchmetrics divides in float32

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]


def label_maps(classes: int, *, pictures: int, size: int, cell: int = 16, seed: int = 0) -> Pairs:
    """Pairs of truth and prediction, int64 (size, size): squares of one class; a fifth of the prediction is noise.

    A twentieth of the truth is to be ignored.
    """
    rng = np.random.default_rng(seed)
    cells, shape = -(-size // cell), (size, size)
    pairs = []
    for _ in range(pictures):
        squares = rng.integers(0, classes, (cells, cells)).repeat(cell, axis=0).repeat(cell, axis=1)[:size, :size]
        prediction = np.where(rng.random(shape) < 0.2, rng.integers(0, classes, shape), squares)
        truth = np.where(rng.random(shape) < 0.05, IGNORE_LABEL, squares)
        pairs.append((torch.from_numpy(truth), torch.from_numpy(prediction)))
    return pairs


def ours(classes: int, pairs: Pairs) -> float | None:
    """Mean IoU by lexiseg."""
    confusion = ConfusionMatrix([str(number) for number in range(classes)])
    for truth, prediction in pairs:
        confusion.update(truth=truth, prediction=prediction)
    return mean_over(confusion.iou, absent_class="exclude")


def peer(classes: int, pairs: Pairs, *, checked: bool) -> float:
    """Mean IoU by torchmetrics."""
    index = MulticlassJaccardIndex(classes, average="macro", ignore_index=IGNORE_LABEL, validate_args=checked)
    for truth, prediction in pairs:
        index.update(prediction, truth)
    return float(index.compute())


def main(argv: Sequence[str] | None = None) -> None:
    """Check that the values are equal, then time."""
    parser = arguments_for(__doc__, repeats=15)
    parser.add_argument("--classes", type=int, nargs="+", default=[11, 150, 847])
    parser.add_argument("--pictures", type=int, default=20, help="per run")
    parser.add_argument("--size", type=int, default=512, help="side of the label maps in pixels")
    given = parser.parse_args(argv)
    use_threads(given.threads)
    keep_memory()  # as in the stage that evaluates
    rows = []
    for classes in given.classes:
        pairs = label_maps(classes, pictures=given.pictures, size=given.size)
        candidates = {
            "lexiseg": lambda classes=classes, pairs=pairs: ours(classes, pairs),
            "torchmetrics": lambda classes=classes, pairs=pairs: peer(classes, pairs, checked=True),
            "torchmetrics, unchecked": lambda classes=classes, pairs=pairs: peer(classes, pairs, checked=False),
        }
        values = {name: candidate() for name, candidate in candidates.items()}
        if max(abs(value - values["lexiseg"]) for value in values.values()) > TOLERANCE:
            raise AssertionError(f"{classes} classes: the values differ: {values}")
        timed = compare(candidates, repeats=given.repeats, title=f"{classes} classes")
        rows.append({"classes": classes, "miou": values, **timed})
        print(f"{classes} classes, mIoU {values['lexiseg']:.6f}\n{table(timed, per=given.pictures, unit='picture')}")
    write_result("metrics", rows, given=given, precision="int64", peers=["torchmetrics"])


if __name__ == "__main__":
    main()
