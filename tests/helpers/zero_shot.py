"""The three zero-shot data sets with a few tiny pictures, laid out as their adapters expect them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from helpers.micro import picture, save
from lexiseg.data.adapters.coco20i import CLASSES

FOLDS = range(4)
HEIGHT, WIDTH = 12, 16


def two_classes(first: int, second: int, *, border: int | None = None) -> np.ndarray:
    """uint8 mask: background above, `first` and `second` beside each other below; the last row is the border."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[4:, :8], mask[4:, 8:] = first, second
    if border is not None:
        mask[-1] = border
    return mask


def write_pascal5i(folder: Path) -> Path:
    """Every fold: two training and two test pictures, one of which is asked about two classes.

    Picture k of fold i and part p is 2007_ipk; its mask holds class 5i + 1 + k on the left and 5i + 2 + k on the right.
    """
    for part, number in (("trn", 0), ("val", 1)):
        for fold in FOLDS:
            lines = []
            for k in (0, 1):
                name, first = f"2007_{fold}{number}{k}", 5 * fold + 1 + k
                pixels = picture(100 * number + 10 * fold + k, height=HEIGHT, width=WIDTH)
                save(folder / f"VOC2012/JPEGImages/{name}.jpg", pixels)
                mask = two_classes(first, first + 1, border=255)
                save(folder / f"VOC2012/SegmentationClassAug/{name}.png", mask)
                lines += [f"{name}__{first:02}"] + [f"{name}__{first + 1:02}"] * (k == 0)
            path = folder / f"splits/pascal/{part}/fold{fold}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{line}\n" for line in lines))
    return folder


def write_coco20i(folder: Path) -> Path:
    """Every class k has the training picture and the test picture of fold k mod 4; there are two per fold and part."""
    for part, split in (("trn", "train2014"), ("val", "val2014")):
        names = {}
        for fold in FOLDS:
            names[fold] = [f"{split}/COCO_{split}_{fold}{k}.jpg" for k in (0, 1)]
            for k, name in enumerate(names[fold]):
                seed = 1000 * len(part + split) + 10 * fold + k
                save(folder / "COCO2014" / name, picture(seed, height=HEIGHT, width=WIDTH))
                mask = two_classes(fold + 1, fold + 5, border=255)  # no border in COCO: crowds
                save(folder / "COCO2014/annotations" / name.replace(".jpg", ".png"), mask)
        for fold in FOLDS:
            kept = [k for k in range(len(CLASSES)) if (k % 4 == fold) == (part == "val")]
            table = {k: names[k % 4] if k in kept else [] for k in range(len(CLASSES))}
            write_pickle(folder / f"splits/coco/{part}/fold{fold}.pkl", table)
    return folder


def write_pickle(path: Path, content: Any) -> None:
    """A pickle file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))


def write_fss(folder: Path) -> Path:
    """Two pictures per class; the second mask of a class is a colour picture, and one list ends its lines with CRLF."""
    parts = {"trn": ["zebra_x", "abacus"], "val": ["carpenter's_hammer"], "test": ["bus", "ab_wheel"]}
    for part, names in parts.items():
        for name in names:
            for k in (1, 10):
                folder_of = folder / "FSS-1000" / name
                seed = sum(map(ord, name)) * 20 + k
                save(folder_of / f"{k}.jpg", picture(seed, height=HEIGHT, width=WIDTH))
                grey = two_classes(128, 127)
                save(folder_of / f"{k}.png", grey if k == 1 else np.repeat(grey[..., None], 3, axis=2))
        path = folder / f"splits/fss/{part}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(("\r\n" if part == "test" else "\n").join([*names, ""]).encode())
    return folder
