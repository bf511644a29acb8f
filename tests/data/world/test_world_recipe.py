import numpy as np
import pytest

from lexiseg.data.world import World, read_recipe
from lexiseg.data.world.recipe import Recipe
from lexiseg.errors import SettingsError
from lexiseg.settings import override, parse

# Small pictures, so that a world is built in a fraction of a second.
SMALL = {
    "texture": {"size": 48, "variants": 2},
    "splits": {"train": {"size": 48}, "val": {"size": 48}, "test": {"size": 48}, "stress": {"size": 48}},
}


def _content(recipe: dict) -> list:
    world = World(parse(recipe, Recipe))
    scenes = [world.render("train", index) for index in range(24)]
    return [(s.image.tobytes(), s.semantic.tobytes(), s.captions, s.phrases, s.questions) for s in scenes]


@pytest.fixture(scope="module")
def small_content(plain_recipe) -> list:
    return _content(override(plain_recipe, SMALL))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 8),
        ("unit", 60),
        ("stuff.rock.colours", [[75, 75, 85], [165, 165, 165]]),
        ("things.ring.pattern", "dotted"),
        ("colours.red.second", [240, 180, 185]),
        ("texture.gain", 0.1),
        ("horizon.wobble", 0.05),
        ("patch.roughness", 0.06),
        ("objects.overlap", 0.2),
        ("objects.period", [5.0, 6.5]),
        ("light.noise", 5.0),
        ("kinds.scene.objects", [0.0, 0.5, 0.5]),
        ("kinds.scene.margin", 0.12),
        ("language.rich.colour", 0.2),
        ("language.phrases", 2),
        ("splits.train.seed", 11),
        ("splits.train.canonical", 0.3),
    ],
)
def test_a_changed_number_changes_what_is_rendered(plain_recipe, small_content, key, value):
    assert _content(override(override(plain_recipe, SMALL), {key: value})) != small_content


def test_number_of_captions_leaves_the_pictures_alone(plain_recipe, small_content):
    more = _content(override(override(plain_recipe, SMALL), {"splits.train.captions": 7}))
    assert [scene[:2] for scene in more] == [scene[:2] for scene in small_content]
    assert all(len(scene[2]) == 7 for scene in more)


def test_all_faults_are_told_at_once(plain_recipe):
    bad = override(
        plain_recipe,
        {
            "unitt": 64,
            "things.ring.shape": "rign",
            "things.disk.colour": "orang",
            "kinds.scene.regions": [0.15, 0.6, 0.2],
            "kinds.iconic.captions.short": 0.9,
            "horizon.height": [0.8, 0.7],
            "light.noise": "much",
            "language.max_words": 10,
            "language.templates": ["{}", "a"],
            "splits.val.seed": 1,
            "splits.train.size": 200,
        },
    )
    del bad["seed"]
    bad["things"]["sky"] = dict(bad["things"]["ring"], shape="ring")
    with pytest.raises(SettingsError) as caught:
        parse(bad, Recipe, source="world.yaml")
    error = caught.value
    assert error.found.startswith("13 fault(s) in world.yaml")
    for place, allowed in {
        "`seed`: missing": "`seed`: a whole number",
        "`unitt`: unknown key (did you mean `unit`?)": "`top level`: seed, unit",
        '`things.ring.shape`: "rign"': "one of disk, ring, square",
        '`things.disk.colour`: "orang"': "one of `colours`: red, yellow",
        "`things.sky`": "a name that `stuff` does not have",
        "`kinds.scene.regions`": "probabilities that sum to 1, these sum to 0.95",
        "`kinds.iconic.captions`": "probabilities that sum to 1, these sum to 0.9",
        "`horizon.height`: [0.8, 0.7]": "the first number must not be above the second",
        '`light.noise`: "much"': "should be a valid number",
        "`language.max_words`: 10": "at least 21, so that a caption can name 4 objects",
        "`language.templates`": "templates that hold {} exactly once",
        "`splits.val.seed`: 1": "a seed of its own; `train` has this one",
        "`splits.train.size`: 200": "at most `texture.size`, 160",
    }.items():
        assert place in error.found
        assert allowed in error.allowed
    assert "edit world.yaml" in error.fix


@pytest.mark.parametrize("text", ["", "- a list\n", "stuff: {sky: 3}\nsplits: [1, 2]\n"])
def test_a_recipe_of_another_form_is_refused(tmp_path, text):
    path = tmp_path / "world.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"fault\(s\) in world.yaml"):
        read_recipe(path)


def test_classes_are_numbered_stuff_first(world):
    recipe = world.recipe
    assert len(recipe.names) == 20
    assert recipe.names[:2] == ("sky", "grass")
    assert recipe.names[10] == "disk"
    unseen = {name for name, flag in zip(recipe.names, recipe.unseen, strict=True) if flag}
    assert unseen == {"water", "wood", "star", "crescent", "hourglass"}


def test_another_canvas_size_keeps_the_scale_of_objects(plain_recipe):
    wide = World(parse(override(plain_recipe, {"splits.train.size": 96}), Recipe))
    scenes = [wide.render("train", index) for index in range(40)]
    assert scenes[0].image.shape == (96, 96, 3)
    areas = [(s.panoptic == t.segment_id).sum() for s in scenes for t in s.things if t.size == "large"]
    assert np.max(areas) < 3.2 * (0.28 * 64) ** 2
