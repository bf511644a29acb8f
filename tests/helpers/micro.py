"""Data sets of a few tiny pictures, laid out as the adapters expect them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lexiseg.data.settings import DataSettings
from lexiseg.settings import parse, read_yaml

CAMVID_NAMES = [
    *("Sky", "Building", "Pole", "Road", "Pavement", "Tree"),
    *("SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist", "Unlabelled"),
]
COUNTS = {"train": 4, "val": 2, "test": 2}
HEIGHT, WIDTH = 20, 24


def picture(seed: int, *, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 H x W x 3, another one for every seed."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def mask(seed: int, *, classes: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 H x W, ids below `classes`."""
    return np.random.default_rng(seed).integers(0, classes, (height, width), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    """Write an array as a picture file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_camvid(folder: Path) -> Path:
    """A data set in CamVid's layout: 4 train, 2 val, 2 test, ids 0..11 with 11 = void."""
    folder.mkdir(parents=True)
    lines = ["# id name R G B", *(f"{id} {name} 0 0 {id}" for id, name in enumerate(CAMVID_NAMES))]
    (folder / "classes.txt").write_text("\n".join(lines) + "\n")
    for number, (split, count) in enumerate(COUNTS.items()):
        names = [f"{split}_{index}.png" for index in range(count)]
        for index, name in enumerate(names):
            save(folder / split / name, picture(100 * number + index))
            save(folder / f"{split}annot" / name, mask(100 * number + index, classes=12))
        (folder / f"{split}.txt").write_text("".join(f"{split}/{name} {split}annot/{name}\n" for name in names))
    return folder


def write_folder(folder: Path) -> Path:
    """A data set in the folder layout: 4 train, 2 val, 2 test, three classes, the first picture captioned."""
    folder.mkdir(parents=True)
    (folder / "classes.txt").write_text("0 grass | lawn\n1 potted plant | houseplant, plant [thing]\n2 sea [unseen]\n")
    for number, (split, count) in enumerate(COUNTS.items()):
        for index in range(count):
            save(folder / f"images/{split}/{index}.png", picture(200 + 100 * number + index))
            save(folder / f"masks/{split}/{index}.png", mask(index, classes=3))
    line = json.dumps({"image": "train/0.png", "captions": ["a plant on grass", "grass"]})
    (folder / "captions.jsonl").write_text(line + "\n")
    return folder


def write_photos(folder: Path, *, count: int = 3) -> Path:
    """Pictures without anything else, of several sizes, all in images/train/."""
    for index in range(count):
        more = 4 * (index % 3)
        save(folder / f"images/train/{index}.png", picture(600 + index, height=20 + more, width=40 - more))
    return folder


def write_world(folder: Path) -> Path:
    """The embedded world with few pictures: 4 train, 3 iconic, 2 of each other split."""
    recipe = read_yaml(Path(__file__).parents[2] / "data/world/world.yaml")
    for split, values in recipe["splits"].items():
        values["count"] = {"train": 4, "iconic": 3}.get(split, 2)
    folder.mkdir(parents=True)
    (folder / "world.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return folder


def settings(**data: Any) -> SimpleNamespace:
    """Root settings with the block `data` alone: the embedded one with changes; one process unless said."""
    embedded = read_yaml(Path(__file__).parents[2] / "profiles/embedded.yaml")["data"]
    return SimpleNamespace(data=parse({**embedded, "workers": 1, **data}, DataSettings))


def shared(relative: str) -> Path:
    """A folder of the shared material (`LEXISEG_SHARED`, or ../shared beside the repository); skips without it."""
    root = Path(os.environ.get("LEXISEG_SHARED") or Path(__file__).parents[3] / "shared")
    if not (root / relative).exists():
        pytest.skip(f"{relative} is not in {root}; set LEXISEG_SHARED to the folder that has it")
    return root / relative
