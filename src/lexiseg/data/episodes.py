"""Episodes of a prepared data set: pictures that are asked about ONE class each, in two labels, "others" and its name.

Data sets with episodes of their own have them in prepare's output:

    episodes.json    {split: {"classes": [...], "pairs": [[sample id, class], ...], "by_class": true or false}}

For all others they follow from the manifest: every picture with every class in it that is seen (split `train`) or
unseen (any other split).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from lexiseg.data.adapters.base import Episodes
from lexiseg.data.manifest import read_manifest
from lexiseg.errors import DataError
from lexiseg.storage import read_json, write_json
from lexiseg.vocabulary import Vocabulary

OTHERS = "others"
"""The word for everything that is not the class: label 0 of an episode, as in the official LSeg code."""

LABELS = (OTHERS, "class")
"""How predictions of episodes name their two maps: the second one's word differs from episode to episode."""

_FILE = "episodes.json"
_TRAINING = "train"


def write_episodes(prepared: Path, episodes: Mapping[str, Episodes], vocabulary: Vocabulary) -> None:
    """Write the episodes of a data set that has its own, by split.

    Training asks about no class that it must not see the labels of, such as those that `data.unseen` adds to a fold's.
    """
    content = {}
    for split, listed in episodes.items():
        kept = vocabulary.seen_names if split == _TRAINING else listed.classes
        content[split] = {
            "classes": [name for name in listed.classes if name in kept],
            "pairs": [pair for pair in listed.pairs if pair[1] in kept],
            "by_class": listed.by_class,
        }
    write_json(prepared / _FILE, content)


def read_episodes(prepared: Path, split: str) -> Episodes:
    """The episodes of a split: its own, or those that follow from what is in the pictures.

    Raises:
        DataError: there are none.
    """
    path = prepared / _FILE
    if path.is_file():
        entry = read_json(path).get(split, {"classes": (), "pairs": (), "by_class": False})
        pairs = tuple((sample, name) for sample, name in entry["pairs"])
        found = Episodes(tuple(entry["classes"]), pairs, entry["by_class"])
    else:
        found = _derived(prepared, split)
    if not found.pairs:
        kind = "seen" if split == _TRAINING else "unseen"
        raise DataError(
            found=f"no episode in the split `{split}`: no picture of it has a class to ask for",
            allowed=f"labelled pictures with {kind} classes",
            fix="name classes in `data.unseen` of params.yaml that are in the split's pictures, or take another split",
        )
    return found


def _derived(prepared: Path, split: str) -> Episodes:
    vocabulary = Vocabulary.from_json(read_json(prepared / "vocabulary.json"))
    classes = vocabulary.seen_names if split == _TRAINING else vocabulary.unseen_names
    wanted = {vocabulary.index(name): name for name in classes}
    pairs = tuple(
        (row["id"], wanted[value])
        for row in read_manifest(prepared / "manifest.parquet")
        if row["split"] == split and row["readable"]
        for value in row["label_values"] or ()
        if value in wanted
    )
    return Episodes(classes, pairs)


def episode_id(sample: str, name: str) -> str:
    """The id of an episode's prediction."""
    return f"{sample} {name}"


def resize_picture(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3) at (height, width), without keeping the aspect: Pillow's bilinear filter, as the official code.

    It smooths where it shrinks, other than `lexiseg.data.transforms.resize`.
    """
    if image.shape[:2] == tuple(size):
        return image
    return np.array(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def resize_ids(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Class ids (H, W) at (height, width) by the nearest neighbour, as torch's `nearest` picks it (rounding down)."""
    rows, columns = (_nearest(source, target) for source, target in zip(mask.shape, size, strict=True))
    return mask[rows[:, None], columns]


def _nearest(source: int, target: int) -> np.ndarray:
    # In float32, as torch: in float64 some rows would be others.
    places = np.arange(target, dtype=np.float32) * (np.float32(source) / np.float32(target))
    return np.minimum(places.astype(np.int64), source - 1)
