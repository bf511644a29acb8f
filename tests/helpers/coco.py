"""Data sets of a few tiny pictures in the layouts of COCO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from helpers.micro import HEIGHT, WIDTH, picture, save
from lexiseg.storage import write_json, write_text

# With gaps between the ids, as COCO's have them.
CATEGORIES = [
    {"id": id, "name": name, "isthing": thing}
    for id, name, thing in ((1, "person", 1), (6, "bus", 1), (159, "snow", 0), (193, "grass-merged", 0))
]
SEEDS = {"train2017": (10, 11, 12), "val2017": (20, 21), "captions_only": (30, 31)}
CAPTIONS = ["a bus in snow", "people on grass"]


def segment_ids(seed: int, *, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """int64 H x W: five upright stripes, the first of no segment (0), then the segments of `segments`."""
    stripes = np.arange(width) * 5 // width
    return np.broadcast_to(np.where(stripes > 0, 70_001 * stripes + seed, 0), (height, width))


def segments(seed: int, categories: list[dict[str, Any]] = CATEGORIES) -> list[dict[str, Any]]:
    """Four segments, of as many categories where there are enough; other pictures go on in the list of them."""
    return [
        {"id": 70_001 * stripe + seed, "category_id": categories[(4 * seed + stripe - 1) % len(categories)]["id"]}
        for stripe in (1, 2, 3, 4)
    ]


def colours(ids: np.ndarray) -> np.ndarray:
    """uint8 H x W x 3, as COCO stores the ids of segments."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)


def write_coco(folder: Path, *, categories: list[dict[str, Any]] = CATEGORIES, size: int = 1) -> Path:
    """A data set as COCO publishes it: 3 train, 2 val, each with two captions; pictures of 20 x 24 times `size`."""
    for name in ("train2017", "val2017"):
        images = _write_labelled(
            name,
            folder / name,
            masks=folder / f"annotations/panoptic_{name}",
            lists=folder / f"annotations/panoptic_{name}.json",
            categories=categories,
            size=size,
        )
        texts = [{"image_id": image["id"], "caption": f"{text} \n"} for text in CAPTIONS for image in images]
        write_json(folder / f"annotations/captions_{name}.json", {"images": images, "annotations": texts})
    return folder


def write_captioned(folder: Path, splits: tuple[str, ...] = ("captions_only",)) -> None:
    """Add two photographs without labels, and the list of the captions of these splits."""
    for seed in SEEDS["captions_only"]:
        save(folder / f"images/captions_only/{seed:012d}.jpg", picture(seed))
    images = [f"images/{name}/{seed:012d}.jpg" for name in splits for seed in SEEDS[name]]
    lines = [json.dumps({"image": image, "captions": CAPTIONS}) for image in images]
    write_text(folder / "captions.jsonl", "\n".join(lines) + "\n")


def write_selection(folder: Path) -> Path:
    """A data set as a selection: 3 train without captions, 2 val with them, 2 with captions alone."""
    for name in ("train2017", "val2017"):
        _write_labelled(
            name,
            folder / f"images/{name}",
            masks=folder / f"panoptic/{name}",
            lists=folder / f"panoptic/panoptic_{name}.json",
            categories=CATEGORIES,
            size=1,
        )
    write_json(folder / "categories.json", [{"id": 0, "name": "unlabeled", "isthing": 0}, *CATEGORIES])
    write_captioned(folder, ("val2017", "captions_only"))
    return folder


def _write_labelled(
    name: str, pictures: Path, *, masks: Path, lists: Path, categories: list[dict[str, Any]], size: int
) -> list[dict[str, Any]]:
    shape = {"height": size * HEIGHT, "width": size * WIDTH}
    images = [{"id": seed, "file_name": f"{seed:012d}.jpg"} for seed in SEEDS[name]]
    annotations = [
        {
            "image_id": seed,
            "file_name": f"{seed:012d}.png",
            "segments_info": [{**one, "iscrowd": 0} for one in segments(seed, categories)],
        }
        for seed in SEEDS[name]
    ]
    for seed in SEEDS[name]:
        save(pictures / f"{seed:012d}.jpg", picture(seed, **shape))
        save(masks / f"{seed:012d}.png", colours(segment_ids(seed, **shape)))
    # COCO's own lists are in no order.
    write_json(lists, {"images": images, "annotations": annotations[::-1], "categories": categories})
    return images
