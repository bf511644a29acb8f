from __future__ import annotations

import pickle
from operator import attrgetter
from typing import Annotated, Literal

import pytest
from pydantic import AfterValidator, Field, ValidationError, model_validator

from lexiseg.errors import SettingsError
from lexiseg.settings import Block, View, override, parse, read_yaml


class Train(Block):
    steps: int | None = Field(ge=1)
    epochs: int | None = None
    lr: float
    kind: Literal["adamw", "sgd"]
    crop: tuple[int, int] | None = None
    kinds: Annotated[tuple[Literal["a", "b"], ...], Field(min_length=1)] = ("a",)
    flip: bool = True

    @model_validator(mode="after")
    def _one_length(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either `steps` or `epochs`")
        return self


def _without_spaces(word: str) -> str:
    if " " in word:
        raise ValueError("a word without spaces")
    return word


class Method(Block):
    train: Train
    words: dict[str, str]
    name: Annotated[str, AfterValidator(_without_spaces)] = "x"


class Root(Block):
    seed: int
    method: Method


VALUES = {"seed": 0, "method": {"train": {"steps": 5, "lr": 0.1, "kind": "sgd", "crop": [2, 3]}, "words": {"a": "b"}}}


def faults(**changes) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        parse(override(VALUES, changes), Root)
    return caught.value


def test_values_become_typed_blocks():
    root = parse(VALUES, Root)
    assert root.method.train.crop == (2, 3)
    assert root.method.words == {"a": "b"}


def test_settings_cannot_change_after_loading():
    root = parse(VALUES, Root)
    with pytest.raises(ValidationError, match="frozen"):
        root.seed = 1  # type: ignore[misc]


def test_all_faults_are_named_at_once():
    error = faults(**{"sed": 1, "method.train.kind": "adam", "method.train.lr": "fast", "method.trian": {}})
    assert error.found == (
        "4 fault(s) in params.yaml:"
        '\n  - `method.train.kind`: "adam"'
        '\n  - `method.train.lr`: "fast"'
        "\n  - `method.trian`: unknown key (did you mean `train`?)"
        "\n  - `sed`: unknown key (did you mean `seed`?)"
    )
    assert "`method.train.kind`: one of adamw, sgd" in error.allowed
    assert "`method.train.lr`: a number" in error.allowed
    assert "`method`: train, words, name" in error.allowed
    assert "`top level`: seed, method" in error.allowed
    assert error.fix == "edit params.yaml; each key is documented where it stands"


@pytest.mark.parametrize(
    ("key", "value", "found", "allowed"),
    [
        ("seed", 1.5, "`seed`: 1.5", "`seed`: a whole number"),
        ("seed", None, "`seed`: null", "`seed`: a whole number"),
        ("method.train.steps", 0, "`method.train.steps`: 0", "a whole number or null (Input should be greater than"),
        ("method.train.steps", "5", '`method.train.steps`: "5"', "a whole number or null"),
        ("method.train.flip", 1, "`method.train.flip`: 1", "true or false"),
        ("method.train.crop", [1], "`method.train.crop.1`: missing", "`method.train.crop.1`: a whole number"),
        ("method.train.crop", 7, "`method.train.crop`: 7", "`method.train.crop`: a list or null"),
        ("method.train.crop", ["a", 1], '`method.train.crop.0`: "a"', "`method.train.crop.0`: a whole number"),
        ("method.train.kinds", ["c"], '`method.train.kinds.0`: "c"', "`method.train.kinds.0`: one of a, b"),
        ("method.train.kinds", [], "`method.train.kinds`: []", "at least 1 item"),
        ("method.words", {"x": 1}, "`method.words.x`: 1", "`method.words.x`: text"),
        ("method.words", [1], "`method.words`: [1]", "`method.words`: a block"),
        ("method.name", "a b", '`method.name`: "a b"', "`method.name`: a word without spaces"),
        ("method", 3, "`method`: 3", "`method`: a block with train, words, name"),
        ("method.train.lr", "x" * 200, "x...", "`method.train.lr`: a number"),
        ("method.train.epochs", 3, "`method.train`: values that do not go together", "give either `steps` or `epochs`"),
    ],
)
def test_a_wrong_value_is_shown_with_what_is_allowed(key, value, found, allowed):
    error = faults(**{key: value})
    assert error.found.startswith("1 fault(s)")
    assert found in error.found
    assert allowed in error.allowed
    assert len(str(error)) < 400


def test_a_missing_key():
    values = {"seed": 0, "method": {"train": {"steps": 1, "kind": "sgd"}}}
    with pytest.raises(SettingsError) as caught:
        parse(values, Root, source="profiles/mine.yaml")
    assert "fault(s) in profiles/mine.yaml:\n  - `method.train.lr`: missing" in caught.value.found
    assert "`method.train.lr`: a number" in caught.value.allowed
    assert "edit profiles/mine.yaml" in caught.value.fix


@pytest.mark.parametrize("values", [None, 5, [1], "text"])
def test_settings_that_are_no_blocks(values):
    with pytest.raises(SettingsError) as caught:
        parse(values, Root)
    assert "`top level`" in caught.value.found
    assert "a block with seed, method" in caught.value.allowed


def test_yaml_is_version_1_2(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 1e-3\nname: on\nnull_value:\n")
    assert read_yaml(tmp_path / "a.yaml") == {"lr": 0.001, "name": "on", "null_value": None}


@pytest.mark.parametrize(
    "content", [b"a: [1", b"a: 1\na: 2\n", b"a: b: c", b"\ta: 1", b"a: \xff\xfe", b"!!python/object:os.system {}"]
)
def test_files_that_are_not_yaml(tmp_path, content):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        read_yaml(path)
    assert caught.value.found.startswith(f"{path} is not valid YAML")
    assert caught.value.allowed == "YAML 1.2"
    assert "correct the line" in caught.value.fix


def test_a_missing_file(tmp_path):
    with pytest.raises(SettingsError) as caught:
        read_yaml(tmp_path / "params.yaml")
    assert "no file" in caught.value.found
    assert "the folder that holds params.yaml" in caught.value.fix


def test_an_override_leaves_the_values_alone():
    new = override(VALUES, {"method.train.steps": 9, "method": {"words": {"c": "d"}}, "seed": 2})
    assert new["method"]["train"] == {**VALUES["method"]["train"], "steps": 9}
    assert new["method"]["words"] == {"a": "b", "c": "d"}
    assert new["seed"] == 2
    assert VALUES["method"]["train"]["steps"] == 5
    assert "c" not in VALUES["method"]["words"]


def test_an_override_replaces_what_is_no_block():
    assert override({"a": 1, "b": [1, 2]}, {"a": {"x": 1}, "b": [3]}) == {"a": {"x": 1}, "b": [3]}
    assert override({"a": None}, {"a.b.c": 1}) == {"a": {"b": {"c": 1}}}
    assert override({"a": {"b": 1}}, {"a": None}) == {"a": None}


def test_a_view_shows_what_is_declared():
    view = View(parse(VALUES, Root), ["seed", "method.train"])
    assert view.seed == 0
    assert view.method.train.steps == 5
    assert pickle.loads(pickle.dumps(view)).method.train.lr == 0.1


@pytest.mark.parametrize("path", ["method.words", "method.train.lr"])
def test_a_view_refuses_the_rest(path):
    view = View(parse(VALUES, Root), ["seed", "method.train.steps"])
    with pytest.raises(SettingsError) as caught:
        attrgetter(path)(view)
    assert f"`{path}`" in caught.value.found
    assert "seed, method.train.steps" in caught.value.allowed
    assert "`params:` in dvc.yaml" in caught.value.fix


def test_a_prefix_of_a_declared_key_declares_nothing_else():
    class Both(Block):
        train: int
        training: int

    view = View(Both(train=1, training=2), ["train"])
    with pytest.raises(SettingsError):
        _ = view.training
