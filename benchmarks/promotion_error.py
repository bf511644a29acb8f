"""How often the gate `difference` of a promotion would call one of two equal models better.

    python benchmarks/promotion_error.py --out benchmarks/results/promotion_error.json

Takes the pixels by picture of models that `dvc repro` evaluated. A pair of equal models is made of two of them: for
each picture a coin says which model's answer is whose, so neither can be better but by chance. Of each pair pictures
are drawn without putting any back. A pair is promoted where the interval of the difference is above 0, as in
lexiseg.promotion.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lexiseg.evaluation.image_counts import ImageCounts
from lexiseg.promotion.bootstrap import paired_difference
from lexiseg.promotion.candidate import read_counts
from lexiseg.provenance import made_with
from lexiseg.storage import write_json

ROOT = Path(__file__).parents[1]
MODELS = (("lseg", "tcl"), ("baselines/linear", "baselines/maskclip"))
IMAGES = (1, 4, 10, 50, 200, 500)
CONFIDENCE, RESAMPLES = 0.95, 2000  # the defaults of params.yaml


def counts_of(model: str, split: str) -> ImageCounts:
    """What a model was counted to get right, by picture."""
    tables = ROOT / "outputs" / model / "evaluate/tables"
    return read_counts(tables / f"{split}_images.parquet", tables / f"{split}_per_class.csv")


def exchanged(first: ImageCounts, second: ImageCounts, rows: np.ndarray, coin: np.ndarray) -> list[ImageCounts]:
    """Two equal models: of the pictures `rows`, each answers as the first model where its coin (I,) says so."""
    ids = tuple(first.ids[row] for row in rows)

    def mixed(side: np.ndarray) -> ImageCounts:
        parts = [
            np.where(side[:, None], getattr(first, name)[rows], getattr(second, name)[rows])
            for name in ("intersection", "predicted")
        ]
        return ImageCounts(ids, first.classes, parts[0], first.true[rows], parts[1])

    return [mixed(coin), mixed(~coin)]


def promoted(first: ImageCounts, second: ImageCounts, *, images: int, pairs: int, seed: int) -> dict[str, int]:
    """Of so many pairs, how many the gate promotes, and how many it would promote the other way round."""
    rng = np.random.default_rng(seed)
    found = {"promoted": 0, "the other way round": 0}
    for pair in tqdm(range(pairs), desc=f"{images} pictures", unit="pair", mininterval=1):
        rows, coin = rng.permutation(len(first.ids))[:images], rng.random(images) < 0.5
        one, other = exchanged(first, second, rows, coin)
        measured = paired_difference(
            one, other, absent_class="exclude", confidence=CONFIDENCE, resamples=RESAMPLES, seed=pair
        )
        found["promoted"] += measured.low > 0
        found["the other way round"] += measured.high < 0
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="How often promotion calls one of two equal models better.")
    parser.add_argument("--pairs", type=int, default=200, help="pairs for each number of pictures and two models")
    parser.add_argument("--images", type=int, action="append", help="pictures of a pair; may be given again")
    parser.add_argument("--split", default="test", help="whose pictures")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for number, models in enumerate(MODELS):
        first = counts_of(models[0], given.split)
        second = counts_of(models[1], given.split).ordered(first.ids)
        for images in given.images or IMAGES:
            found = promoted(first, second, images=images, pairs=given.pairs, seed=1000 * number + images)
            rows.append({"models": list(models), "images": images, "pairs": given.pairs, **found})
            print(rows[-1], flush=True)
    total, pairs = sum(row["promoted"] for row in rows), sum(row["pairs"] for row in rows)
    print(f"promoted {total} of {pairs} pairs of equal models, {100 * total / pairs:.1f} %")
    if given.out:
        setting = {"confidence": CONFIDENCE, "resamples": RESAMPLES, "split": given.split}
        write_json(given.out, {"rows": rows, **setting, "made_with": made_with(ROOT)})
        print(f"written to {given.out}")


if __name__ == "__main__":
    sys.exit(main())
