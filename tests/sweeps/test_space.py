from __future__ import annotations

import re
from pathlib import Path

import pytest

from lexiseg.errors import SettingsError
from lexiseg.methods import METHODS
from lexiseg.settings import Sweep, fields_of
from lexiseg.stages.settings import root_block
from lexiseg.sweeps.space import Knob, read_knob, read_space, spaces_of

PARAMS = Path(__file__).parents[2] / "profiles" / "embedded.yaml"


def documented() -> dict[str, tuple[float, float, bool]]:
    """The ranges in the comments of the default params.yaml, by dotted key."""
    path: list[str] = []
    key, found = "", {}
    for line in PARAMS.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"^( *)([a-z_]+):", line):
            path = [*path[: len(match[1]) // 2], match[2]]
            key = ".".join(path)
        if match := re.search(r"\bsweep ([0-9.e-]+?)\.\.([0-9.e-]+)(, log)?", line):
            found[key] = (float(match[1]), float(match[2]), match[3] is not None)
    return found


def test_the_ranges_in_params_yaml_are_those_that_the_settings_declare():
    declared = {
        key: (float(sweep.low), float(sweep.high), sweep.log)
        for key, field in fields_of(root_block()).items()
        for sweep in field.metadata
        if isinstance(sweep, Sweep)
    }
    assert documented() == declared
    assert len(declared) > 30


@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if entry.spaces])
def test_the_spaces_of_a_method_can_be_read(method):
    for name in spaces_of(method):
        space = read_space(method, [name])
        assert space.name == name
        assert all(knob.key.startswith(f"{method}.") for knob in space.knobs)


def test_without_a_space_it_is_the_first_one():
    assert read_space("tcl").name == next(iter(spaces_of("tcl")))


@pytest.mark.parametrize(
    ("text", "knob"),
    [
        ("tcl.loss.area", Knob("tcl.loss.area", 0.1, 1, log=True)),
        ("tcl.loss.area=0.2..0.5", Knob("tcl.loss.area", 0.2, 0.5)),
        ("tcl.loss.area = 1e-3..1, log", Knob("tcl.loss.area", 1e-3, 1, log=True)),
        ("tcl.refine.pamr_iterations=0..4", Knob("tcl.refine.pamr_iterations", 0, 4, whole=True)),
        ("stego.probe.clusters", Knob("stego.probe.clusters", 5, 60, whole=True)),
        ("tcl.train.flip=true|false", Knob("tcl.train.flip", choices=(True, False))),
        ("lseg.predict.scales=[1.0]|[0.75, 1.25]", Knob("lseg.predict.scales", choices=([1.0], [0.75, 1.25]))),
    ],
)
def test_a_knob(text, knob):
    assert read_space("tcl", [text]).knobs == (knob,)
    assert read_knob(str(knob)) == knob


def test_a_knob_of_a_version_that_is_gone():
    with pytest.raises(SettingsError, match=r"the knob `tcl\.loss\.gone=0\.\.1`, which this version does not know"):
        read_knob("tcl.loss.gone=0..1")


def test_two_dots_in_a_text_are_no_range():
    assert read_space("tcl", ["weights"], fixed=["tcl.train.shards=../pairs/*.tar"]).fixed == {
        "tcl.train.shards": "../pairs/*.tar"
    }


def test_what_is_said_later_wins():
    space = read_space("tcl", ["weights", "tcl.loss.area=0.2..0.5"], fixed=["tcl.loss.image=0.3", "tcl.train.steps=5"])
    assert Knob("tcl.loss.area", 0.2, 0.5) in space.knobs
    assert "tcl.loss.image" not in [knob.key for knob in space.knobs]
    assert space.fixed == {"tcl.loss.image": 0.3, "tcl.train.steps": 5}
    assert space.name == "custom"


def test_a_space_in_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("tcl.loss.area: 0.2..0.5,log\ntcl.train.flip: [true, false]\ntcl.train.steps: 7\ntcl.loss.image:\n")
    space = read_space("tcl", [str(file)])
    assert (space.name, space.fixed) == ("mine", {"tcl.train.steps": 7})
    assert [str(knob) for knob in space.knobs] == [
        "tcl.loss.area=0.2..0.5,log",
        "tcl.train.flip=true|false",
        "tcl.loss.image=0.01..1,log",
    ]


@pytest.mark.parametrize(
    ("given", "found", "allowed"),
    [
        (["tcl.loss.are"], "`tcl.loss.are`: unknown knob (did you mean `tcl.loss.area`?)", "tcl.loss.smooth"),
        (["tcl.loss"], "`tcl.loss`: unknown knob", "tcl.loss.area"),
        (["nothing=1..2"], "`nothing`: unknown knob", "lseg.train.lr"),
        (["colours"], "`colours`", "a space of tcl (weights, priors, inference, background)"),
        (["tcl.loss.area=2..1"], "an empty range", "the first below the second"),
        (["tcl.loss.area=1..1"], "an empty range", "the first below the second"),
        (["tcl.loss.area=a..b"], "`tcl.loss.area=a..b`", "two numbers"),
        (["tcl.loss.area=1..inf"], "an empty range", "two numbers"),
        (["tcl.loss.area=0..1,log"], "`tcl.loss.area=0..1,log`", "a range above 0 for `log`"),
        (["tcl.loss.area=0..1,cubic"], "`tcl.loss.area=0..1,cubic`", "low..high,log"),
        (["tcl.refine.pamr_iterations=0..2.5"], "0..2.5", "whole numbers"),
        (["tcl.train.steps"], "`tcl.train.steps` declares no range", "`tcl.train.steps=low..high`"),
        (["tcl.train.text=noun|noun"], "names a choice twice", "different choices"),
        (["tcl.loss.area={a: 1}"], "a block", "keys one by one"),
        (["tcl.train.steps=5"], "only fixed values", "at least one knob"),
    ],
)
def test_what_is_refused(given, found, allowed):
    with pytest.raises(SettingsError) as error:
        read_space("tcl", given)
    assert found in error.value.found
    assert allowed in error.value.allowed
    assert "--space" in error.value.fix


def test_all_faults_are_told_at_once():
    with pytest.raises(SettingsError, match=r"3 fault\(s\)"):
        read_space("tcl", ["tcl.loss.x", "tcl.loss.area=2..1"], fixed=["y=1"])


def test_a_method_that_is_none():
    with pytest.raises(SettingsError) as error:
        read_space("unet")
    assert "no sweep of `unet`" in error.value.found
    assert "lseg, tcl, stego" in error.value.allowed


def test_a_file_without_knobs(tmp_path):
    (tmp_path / "empty.yaml").write_text("[1]")
    with pytest.raises(SettingsError, match="holds no knobs"):
        read_space("tcl", [str(tmp_path / "empty.yaml")])
    with pytest.raises(SettingsError, match="no file"):
        read_space("tcl", [str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(
    ("knob", "inside", "outside"),
    [
        (Knob("a", 0.1, 1.0), (0.1, 1, 0.5), (0.05, None, True, "x")),
        (Knob("a", choices=("x", None)), ("x", None), ("y", 0.5)),
    ],
)
def test_what_a_knob_holds(knob, inside, outside):
    assert all(knob.holds(value) for value in inside)
    assert not any(knob.holds(value) for value in outside)
