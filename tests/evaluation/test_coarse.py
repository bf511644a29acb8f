"""Coarse classes by the names of a vocabulary."""

import numpy as np
import pytest

from lexiseg.data.label_maps import CITYSCAPES27, COCOSTUFF27, COCOSTUFF_VALUES, POTSDAM3, cocostuff27
from lexiseg.errors import DataError
from lexiseg.evaluation.coarse import ClassSet, evaluated_classes
from lexiseg.evaluation.protocol import load_protocol, read_class_list
from lexiseg.vocabulary import Vocabulary

COCO_STUFF = read_class_list("coco_stuff")
POTSDAM = ("impervious surfaces", "building", "low vegetation", "tree", "car", "clutter")


def coarse(card: str, *names: str, **flags) -> ClassSet:
    return evaluated_classes(load_protocol(card), Vocabulary(names=names, **flags))


def groups(classes: ClassSet) -> dict[str, str | None]:
    """Name of the vocabulary -> name of its coarse class."""
    names = classes.vocabulary.names
    found = classes.of(np.arange(len(names)))
    return {name: classes.names[to] if to >= 0 else None for name, to in zip(names, found, strict=True)}


def test_pixel_values_of_coco_stuff():
    """171 of 182 values are used; these pairs are those of COCO's own list (its ids less one)."""
    assert len(COCOSTUFF_VALUES) == len(COCO_STUFF) == 171
    value = dict(zip(COCO_STUFF, COCOSTUFF_VALUES, strict=True))
    official = {
        "person": 0, "fire hydrant": 10, "stop sign": 12, "bear": 22, "backpack": 26, "umbrella": 27, "handbag": 30,
        "bottle": 43, "wine glass": 45, "dining table": 66, "toilet": 69, "tv": 71, "refrigerator": 81, "book": 83,
        "toothbrush": 89, "banner": 91, "tree": 168, "sky-other": 156, "wood": 181,
    }  # fmt: skip
    assert {name: value[name] for name in official} == official


def test_cocostuff27():
    classes = coarse("cocostuff27", *COCO_STUFF)
    assert classes.names == COCOSTUFF27
    assert sum(classes.things) == 12
    found = groups(classes)
    assert set(found.values()) == set(COCOSTUFF27)  # each has a part, and every name belongs somewhere
    wanted = {
        "person": "person", "tree": "plant", "sky-other": "sky", "clouds": "sky", "sea": "water",
        "cat": "animal", "car": "vehicle", "tv": "electronic", "oven": "appliance", "pizza": "food (things)",
        "chair": "furniture (things)", "salad": "food (stuff)", "shelf": "furniture (stuff)", "cup": "kitchen",
        "tie": "accessory", "skis": "sports", "bench": "outdoor", "vase": "indoor", "rug": "textile",
        "wall-tile": "wall", "window-blind": "window", "house": "building", "road": "ground", "stone": "solid",
        "fence": "structural", "metal": "rawmaterial", "ceiling-tile": "ceiling", "floor-wood": "floor",
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted
    assert set(wanted.values()) == set(COCOSTUFF27)


def test_by_name_and_by_pixel_value_are_the_same():
    classes = coarse("cocostuff27", *COCO_STUFF)
    assert classes.of(np.arange(171)).tolist() == cocostuff27(np.array(COCOSTUFF_VALUES)).tolist()
    # And without the order of the official ids.
    turned = coarse("cocostuff27", *COCO_STUFF[::-1])
    assert groups(turned) == groups(classes)


def test_cityscapes27():
    everything = coarse("cityscapes27", "unlabeled", "static", *CITYSCAPES27, "license plate")
    assert everything.names == CITYSCAPES27
    assert groups(everything)["static"] is None
    assert groups(everything)["rail track"] == "rail track"
    assert [name for name, thing in zip(everything.names, everything.things, strict=True) if thing] == [
        *("person", "rider", "car", "truck", "bus", "caravan", "trailer", "train", "motorcycle", "bicycle"),
    ]
    usual = coarse("cityscapes27", *read_class_list("cityscapes"))
    assert set(usual.names) == set(read_class_list("cityscapes"))
    assert usual.names[:4] == ("road", "sidewalk", "building", "wall")  # those that are not there are no classes
    assert all(name == group for name, group in groups(usual).items())


@pytest.mark.parametrize(
    "names",
    [POTSDAM, ("Road", "Buildings", "Grass", "Trees", "Cars", "Clutter/Background"), tuple(reversed(POTSDAM))],
)
def test_potsdam3(names):
    classes = coarse("potsdam3", *names)
    assert classes.names == POTSDAM3
    by_group: dict[str | None, set[str]] = {}
    for name, group in groups(classes).items():
        by_group.setdefault(group, set()).add(name.lower()[:3])
    roads, buildings, plants = (by_group[name] for name in POTSDAM3)
    assert roads in ({"imp", "car"}, {"roa", "car"})
    assert buildings == {"bui", "clu"}
    assert plants in ({"low", "tre"}, {"gra", "tre"})


def test_stuff_and_thing():
    classes = coarse(
        "world_clusters11",
        "ring",
        "sky",
        "star",
        "sand",
        things=(True, False, True, False),
        seen=(True, True, False, False),
    )
    assert classes.names == ("sky", "sand", "thing")
    assert classes.things == (False, False, True)
    assert classes.seen == (True, False, True)  # one of its parts is
    assert groups(classes) == {"ring": "thing", "sky": "sky", "star": "thing", "sand": "sand"}


def test_the_world_has_eleven_coarse_classes(tmp_path):
    from helpers.micro import write_world

    from lexiseg.data.adapters import open_adapter

    vocabulary = open_adapter("world", write_world(tmp_path / "world")).vocabulary()
    assert len(evaluated_classes(load_protocol("world_clusters11"), vocabulary).names) == 11
    assert len(evaluated_classes(load_protocol("world_clusters"), vocabulary).names) == 20


def test_without_coarse_classes_they_are_those_of_the_card():
    words = Vocabulary(names=("ring", "sky", "sea"), things=(True, False, False), seen=(True, False, True))
    assert evaluated_classes(load_protocol("clusters"), words).names == words.names
    seen = evaluated_classes(load_protocol("generic").model_copy(update={"label_set": "seen"}), words)
    assert (seen.names, seen.things) == (("ring", "sea"), (True, False))
    assert seen.of(np.array([[0, 1], [2, -100]])).tolist() == [[0, -100], [1, -100]]


def test_a_vocabulary_without_names_has_no_classes():
    classes = coarse("unlabelled")
    assert classes.names == ()
    assert classes.of(np.full((2, 2), -100)).tolist() == [[-100, -100], [-100, -100]]


@pytest.mark.parametrize(
    ("card", "names", "found", "allowed"),
    [
        (
            "cocostuff27",
            ("person", "Himmel", "Baum"),
            "a vocabulary with Himmel, Baum",
            "names of COCO-Stuff: person, b",
        ),
        ("cityscapes27", ("road", "sky", "lava"), "a vocabulary with lava", "names of Cityscapes: road, sidewalk"),
        ("cityscapes27", ("static", "dynamic"), "without any class of the card", "names of Cityscapes"),
        ("potsdam3", (*POTSDAM, "water"), "a vocabulary with water", "low vegetation"),
        ("potsdam3", tuple("abcdefg"), "a vocabulary with a, b, c, d, e, …", "names of Potsdam"),
        ("world_clusters11", ("sky", "sea"), "a vocabulary without any thing", "marked as things"),
    ],
)
def test_a_vocabulary_that_does_not_fit(card, names, found, allowed):
    with pytest.raises(DataError) as caught:
        coarse(card, *names)
    assert found in caught.value.found
    assert allowed in caught.value.allowed
    assert "`stego.protocol: clusters`" in caught.value.fix


def test_stuff_must_not_be_called_thing():
    with pytest.raises(DataError, match="a class of stuff with the name 'thing'") as caught:
        coarse("world_clusters11", "thing", "ring", things=(False, True))
    assert "not called 'thing'" in caught.value.allowed


def test_a_label_outside_of_the_vocabulary():
    with pytest.raises(DataError) as caught:
        coarse("clusters", "sky", "sea").of(np.array([0, 2]))
    assert caught.value.found == "the label 2 in the prepared data"
    assert "0..1 (sky, sea)" in caught.value.allowed
    assert "prepare and validate" in caught.value.fix


def test_positions_of_names():
    classes = coarse("world_clusters11", "ring", "sky", "star", things=(True, False, True))
    assert [classes.position(name) for name in ("sky", "thing", "ring", "star")] == [0, 1, 1, 1]
    with pytest.raises(DataError, match="the class 'hoop'") as caught:
        classes.position("hoop")
    assert "sky, thing, ring, star" in caught.value.allowed
    for way in ("a card whose classes they are", "`stego.probe.linear: false`", "where the data set changed"):
        assert way in caught.value.fix
