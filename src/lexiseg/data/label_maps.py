"""Fine labels -> the coarse classes that unsupervised segmentation is evaluated on (IIC's and STEGO's protocols)."""

from __future__ import annotations

import numpy as np

from lexiseg.segmentation import IGNORE_LABEL

# The authors have the names food and furniture twice, once among things and once among stuff.
COCOSTUFF27: tuple[str, ...] = (
    "electronic",
    "appliance",
    "food (things)",
    "furniture (things)",
    "indoor",
    "kitchen",
    "accessory",
    "animal",
    "outdoor",
    "person",
    "sports",
    "vehicle",
    "ceiling",
    "floor",
    "food (stuff)",
    "furniture (stuff)",
    "rawmaterial",
    "textile",
    "wall",
    "window",
    "building",
    "ground",
    "plant",
    "sky",
    "solid",
    "structural",
    "water",
)
CITYSCAPES27: tuple[str, ...] = (
    "road",
    "sidewalk",
    "parking",
    "rail track",
    "building",
    "wall",
    "fence",
    "guard rail",
    "bridge",
    "tunnel",
    "pole",
    "polegroup",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "caravan",
    "trailer",
    "train",
    "motorcycle",
    "bicycle",
)
POTSDAM3: tuple[str, ...] = ("roads and cars", "buildings and clutter", "trees and vegetation")

# Which of the coarse classes are things: the first twelve, and from "person" on.
COCOSTUFF27_THINGS = tuple(number < 12 for number in range(len(COCOSTUFF27)))
CITYSCAPES27_THINGS = tuple(number >= 17 for number in range(len(CITYSCAPES27)))

# Pixel values of COCO-Stuff are COCO's ids less one; of its 91 ids of things, eleven were never used.
_UNUSED = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
COCOSTUFF_VALUES = tuple(value for value in range(182) if value not in _UNUSED)
"""The pixel values of COCO-Stuff's 171 classes, in the order of their ids."""

# Pixel values of COCO-Stuff, 0..181, of each of the 27 classes, as first and last value.
_COCO_RANGES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((71, 76),),
    ((77, 82),),
    ((51, 60),),
    ((61, 70),),
    ((83, 90),),
    ((43, 50),),
    ((25, 32),),
    ((15, 24),),
    ((9, 14),),
    ((0, 0),),
    ((33, 42),),
    ((1, 8),),
    ((101, 102),),
    ((100, 100), (113, 117)),
    ((120, 121), (152, 152), (169, 169)),
    (
        (97, 97),
        (106, 107),
        (109, 109),
        (111, 111),
        (122, 122),
        (129, 129),
        (132, 132),
        (155, 155),
        (160, 160),
        (164, 164),
    ),
    ((99, 99), (131, 131), (138, 138), (142, 142)),
    ((91, 92), (103, 104), (108, 108), (130, 130), (136, 136), (140, 140), (151, 151), (166, 167)),
    ((170, 176),),
    ((179, 180),),
    ((94, 95), (127, 127), (150, 150), (157, 157), (165, 165)),
    ((110, 110), (124, 125), (135, 135), (139, 139), (143, 144), (146, 146), (148, 148), (153, 153), (158, 158)),
    ((93, 93), (96, 96), (118, 118), (123, 123), (128, 128), (133, 133), (141, 141), (162, 162), (168, 168)),
    ((105, 105), (156, 156)),
    ((126, 126), (134, 134), (149, 149), (159, 159), (161, 161), (181, 181)),
    ((98, 98), (112, 112), (137, 137), (145, 145), (163, 163)),
    ((119, 119), (147, 147), (154, 154), (177, 178)),
)


def _table(size: int, ranges: tuple[tuple[tuple[int, int], ...], ...]) -> np.ndarray:
    table = np.full(size, IGNORE_LABEL, dtype=np.int64)
    for coarse, parts in enumerate(ranges):
        for first, last in parts:
            table[first : last + 1] = coarse
    return table


def cocostuff27(labels: np.ndarray) -> np.ndarray:
    """COCO-Stuff's pixel values (any shape, 0..181, 255 = none) -> 0..26, -100 = none."""
    return _looked_up(labels, _table(182, _COCO_RANGES))


def cityscapes27(labels: np.ndarray) -> np.ndarray:
    """Cityscapes' labelIds (any shape, -1..33) -> 0..26, -100 = none: the first seven are no classes."""
    coarse = np.asarray(labels).astype(np.int64) - 7
    return np.where((coarse >= 0) & (coarse < len(CITYSCAPES27)), coarse, IGNORE_LABEL)


def potsdam3(labels: np.ndarray) -> np.ndarray:
    """Potsdam's six classes (any shape, 255 = none) -> 0..2, -100 = none."""
    return _looked_up(labels, np.array([0, 1, 2, 2, 0, 1], dtype=np.int64))


def _looked_up(labels: np.ndarray, table: np.ndarray) -> np.ndarray:
    values = np.asarray(labels).astype(np.int64)
    known = (values >= 0) & (values < len(table))
    return np.where(known, table[np.where(known, values, 0)], IGNORE_LABEL)
