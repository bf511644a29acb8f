import numpy as np
import pytest

from lexiseg.data.world import World
from lexiseg.data.world.shapes import EXTENT, TABLE_SIZE, distance_table
from lexiseg.errors import DataError


def _same(one, other) -> bool:
    arrays = all(np.array_equal(getattr(one, key), getattr(other, key)) for key in ("image", "semantic", "panoptic"))
    texts = ("segments", "captions", "phrases", "questions", "regions", "things")
    return arrays and all(getattr(one, key) == getattr(other, key) for key in texts)


def test_a_scene_does_not_depend_on_what_was_rendered_before(world, val_scenes):
    other = World(world.recipe)
    for index in (200, 5, 31, 5):
        other.render("iconic", index)
        assert _same(other.render("val", index), val_scenes[index])


def test_scenes_differ_within_and_across_splits(world):
    images = [world.render(split, index).image.tobytes() for split in ("val", "test", "stress") for index in range(50)]
    assert len(set(images)) == 150


def test_form_of_a_scene(world):
    for split, size in (("train", 64), ("iconic", 32)):
        scene = world.render(split, 3)
        assert (scene.image.dtype, scene.image.shape) == (np.uint8, (size, size, 3))
        assert scene.image.flags.c_contiguous
        for mask in (scene.semantic, scene.panoptic):
            assert (mask.dtype, mask.shape) == (np.uint16, (size, size))


def test_labels_agree_with_segments(world, val_scenes):
    first_thing = len(world.recipe.stuff)
    for scene in val_scenes:
        ids = [segment["id"] for segment in scene.segments]
        assert ids == list(range(1, len(ids) + 1))
        assert np.array_equal(np.unique(scene.panoptic), ids)
        table = np.array([0] + [segment["class_id"] for segment in scene.segments])
        assert np.array_equal(table[scene.panoptic], scene.semantic)
        assert all(segment["thing"] == (segment["class_id"] >= first_thing) for segment in scene.segments)
        stuff = [segment["class_id"] for segment in scene.segments if not segment["thing"]]
        assert len(stuff) == len(set(stuff))
        names = {segment["id"]: world.recipe.names[segment["class_id"]] for segment in scene.segments}
        assert names == {item.segment_id: item.name for item in (*scene.regions, *scene.things)}


def test_colours_of_pixels_fit_their_labels(world, train_scenes):
    pixels = np.concatenate([scene.image.reshape(-1, 3) for scene in train_scenes])
    labels = np.concatenate([scene.semantic.ravel() for scene in train_scenes])
    for class_id, stuff in enumerate(world.recipe.stuff.values()):
        mean, colours = pixels[labels == class_id].mean(axis=0), np.array(stuff.colours)
        assert (mean > colours.min(axis=0) - 20).all()
        assert (mean < colours.max(axis=0) + 20).all()
    red, green, blue = pixels[labels == world.recipe.names.index("heart")].mean(axis=0)
    assert red > 1.4 * max(green, blue)


def test_statistics_are_those_of_the_recipe(world, train_scenes):
    assert np.mean([len(scene.regions) for scene in train_scenes]) == pytest.approx(2.1, abs=0.1)
    assert np.mean([sum(t.said for t in scene.things) for scene in train_scenes]) == pytest.approx(2.45, abs=0.15)
    large = np.mean([thing.size == "large" for scene in train_scenes for thing in scene.things])
    assert large == pytest.approx(0.5, abs=0.06)
    shares = np.bincount(np.concatenate([scene.semantic.ravel() for scene in train_scenes]), minlength=20)
    shares = shares / shares.sum()
    assert shares[:10].min() > 0.055
    assert shares[:10].max() < 0.115
    assert shares[10:].min() > 0.006
    assert shares[10:].max() < 0.035
    unseen = np.array(world.recipe.unseen)
    share = np.mean([unseen[np.unique(scene.semantic)].any() for scene in train_scenes])
    assert 0.69 < share < 0.8


@pytest.mark.parametrize(("split", "expected"), [("train", 0.66), ("stress", 0.03)])
def test_share_of_canonical_looks(world, split, expected):
    looks = world.recipe.things
    things = [thing for index in range(300) for thing in world.render(split, index).things]
    usual = [(t.colour, t.pattern) == (looks[t.name].colour, looks[t.name].pattern) for t in things]
    assert np.mean(usual) == pytest.approx(expected, abs=0.06)


def test_iconic_scenes(world):
    scenes = [world.render("iconic", index) for index in range(400)]
    counts = [len(scene.things) for scene in scenes]
    assert max(counts) == 1
    assert np.mean(counts) == pytest.approx(0.85, abs=0.05)
    assert np.mean([len(scene.regions) for scene in scenes]) == pytest.approx(1.4, abs=0.07)
    assert all(scene.phrases == () and scene.questions == () for scene in scenes)


@pytest.mark.parametrize(
    ("shape", "inside", "outside"),
    [
        ("disk", (0, 0), (0.8, 0.8)),
        ("ring", (0.75, 0), (0, 0)),
        ("square", (0.6, 0.6), (0, 0.8)),
        ("triangle", (0, 0), (0.7, -0.5)),
        ("star", (0, -0.85), (0, 0.7)),
        ("cross", (0, 0.85), (0.6, 0.6)),
        ("heart", (0, 0.6), (0, -0.7)),
        ("crescent", (-0.7, 0), (0.4, 0)),
        ("arrow", (0.8, 0), (-0.8, 0.5)),
        ("hourglass", (0, 0.6), (0.5, 0)),
    ],
)
def test_shapes(shape, inside, outside):
    table = distance_table(shape)

    def at(point):
        column, row = (int((value + EXTENT) / (2 * EXTENT) * TABLE_SIZE) for value in point)
        return table[row, column]

    assert at(inside) < 0 < at(outside)
    y, x = np.nonzero(table < 0)
    reach = np.hypot(x + 0.5 - TABLE_SIZE / 2, y + 0.5 - TABLE_SIZE / 2).max() * 2 * EXTENT / TABLE_SIZE
    assert 0.85 < reach < 1.02


@pytest.mark.parametrize(("split", "index"), [("nosuch", 0), ("val", 512), ("val", -1)])
def test_unknown_scene(world, split, index):
    with pytest.raises(DataError) as caught:
        world.render(split, index)
    assert f"scene {index} of split '{split}'" in caught.value.found
    assert "val 0..511" in caught.value.allowed
    assert "world.yaml" in caught.value.fix
