"""The 133 classes of COCO panoptic in COCO's own order and spelling, each with other words for it.

COCO spells some names for machines. A rule takes the endings -merged, -other and -stuff off, so that `grass-merged`
answers to "grass"; the tables hold every other word. Among the words of a merged class are those of the classes that
COCO merged into it (moss and straw into grass). No word means two classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

THINGS: dict[str, str] = {
    "person": "man, woman, child, boy, girl, people, human, pedestrian",
    "bicycle": "bike",
    "car": "automobile",
    "motorcycle": "motorbike",
    "airplane": "aeroplane, plane, jet",
    "bus": "coach",
    "train": "locomotive",
    "truck": "lorry",
    "boat": "ship",
    "traffic light": "stoplight",
    "fire hydrant": "hydrant",
    "stop sign": "",
    "parking meter": "",
    "bench": "",
    "bird": "",
    "cat": "kitten",
    "dog": "puppy",
    "horse": "pony",
    "sheep": "lamb",
    "cow": "cattle, bull",
    "elephant": "",
    "bear": "",
    "zebra": "",
    "giraffe": "",
    "backpack": "rucksack",
    "umbrella": "parasol",
    "handbag": "purse",
    "tie": "necktie",
    "suitcase": "luggage",
    "frisbee": "flying disc",
    "skis": "ski",
    "snowboard": "",
    "sports ball": "ball",
    "kite": "",
    "baseball bat": "",
    "baseball glove": "baseball mitt",
    "skateboard": "",
    "surfboard": "",
    "tennis racket": "racket",
    "bottle": "",
    "wine glass": "wineglass",
    "cup": "mug",
    "fork": "",
    "knife": "",
    "spoon": "",
    "bowl": "",
    "banana": "",
    "apple": "",
    "sandwich": "hamburger",
    "orange": "",
    "broccoli": "",
    "carrot": "",
    "hot dog": "",
    "pizza": "",
    "donut": "doughnut",
    "cake": "",
    "chair": "armchair",
    "couch": "sofa",
    "potted plant": "houseplant, pottedplant",
    "bed": "",
    "dining table": "diningtable",
    "toilet": "",
    "tv": "television, tvmonitor, monitor",
    "laptop": "notebook computer",
    "mouse": "computer mouse",
    "remote": "remote control",
    "keyboard": "computer keyboard",
    "cell phone": "mobile phone, smartphone, phone",
    "microwave": "microwave oven",
    "oven": "stove",
    "toaster": "",
    "sink": "washbasin",
    "refrigerator": "fridge",
    "book": "",
    "clock": "",
    "vase": "",
    "scissors": "",
    "teddy bear": "teddy",
    "hair drier": "hair dryer",
    "toothbrush": "",
}
"""Countable objects: name -> other words, best first."""

STUFF: dict[str, str] = {
    "banner": "",
    "blanket": "",
    "bridge": "",
    "cardboard": "cardboard box",
    "counter": "countertop",
    "curtain": "drapes",
    "door-stuff": "",
    "floor-wood": "wooden floor, wood floor, parquet",
    "flower": "flowers",
    "fruit": "",
    "gravel": "",
    "house": "",
    "light": "lamp",
    "mirror-stuff": "",
    "net": "",
    "pillow": "cushion",
    "platform": "",
    "playingfield": "playing field, sports field",
    "railroad": "railway, rails",
    "river": "stream",
    "road": "street",
    "roof": "",
    "sand": "beach",
    "sea": "ocean",
    "shelf": "bookshelf",
    "snow": "",
    "stairs": "staircase",
    "tent": "",
    "towel": "",
    "wall-brick": "brick wall",
    "wall-stone": "stone wall",
    "wall-tile": "tiled wall, tile wall",
    "wall-wood": "wooden wall, wood wall",
    "water-other": "",
    "window-blind": "window blind, blinds",
    "window-other": "",
    "tree-merged": "bush, leaves, branch",
    "fence-merged": "railing, cage",
    "ceiling-merged": "",
    "sky-other-merged": "clouds, fog",
    "cabinet-merged": "cupboard",
    "table-merged": "desk",
    "floor-other-merged": "tiled floor, marble floor",
    "pavement-merged": "sidewalk",
    "mountain-merged": "hill",
    "grass-merged": "lawn, moss, straw",
    "dirt-merged": "mud, soil",
    "paper-merged": "napkin",
    "food-other-merged": "salad, vegetable",
    "building-other-merged": "skyscraper",
    "rock-merged": "stone",
    "wall-other-merged": "concrete wall",
    "rug-merged": "carpet, mat",
}
"""Everything else: name -> other words, best first."""

_ENDING = re.compile(r"(-other|-stuff)?(-merged)?$")


def synonyms(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Other words for the class names of a data set in COCO's spelling.

    A word that is itself the name of a class stands for that class alone.

    Args:
        names: the data set's classes; some of COCO's, all of them, or others.

    Returns:
        For each name its words, best first; names without any are left out.
    """
    tables, taken, found = THINGS | STUFF, set(names), {}
    for name in names:
        listed = (word.strip() for word in tables.get(name, "").split(","))
        words = [word for word in (_ENDING.sub("", name), *listed) if word and word not in taken]
        if words:
            found[name] = tuple(words)
            taken |= set(words)
    return found
