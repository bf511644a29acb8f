"""params.yaml as it is in the repository."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from helpers.working_tree import SOURCE
from ruamel.yaml import YAML

from lexiseg.errors import SettingsError
from lexiseg.methods import METHODS
from lexiseg.pipeline import read_graph
from lexiseg.profiles import profile_names, render_profile
from lexiseg.settings import override
from lexiseg.stage import value_at
from lexiseg.stages.settings import parse_settings, read_values, root_block

VALUES = read_values(SOURCE)


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")


def fault_of(key: str, value: Any) -> SettingsError | None:
    return fault_of_all({key: value})


def fault_of_all(changes: Mapping[str, Any]) -> SettingsError | None:
    try:
        parse_settings(override(VALUES, changes))
    except SettingsError as error:
        return error
    return None


def faults(**changes: Any) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        parse_settings(override(VALUES, changes))
    return caught.value


def test_the_default_profile_is_what_params_yaml_holds():
    text = (SOURCE / "params.yaml").read_text()
    assert text == (SOURCE / "profiles/embedded.yaml").read_text()


@pytest.mark.parametrize("name", profile_names(SOURCE))
def test_every_profile_is_valid(name):
    settings = parse_settings(YAML(typ="safe", pure=True).load(render_profile(SOURCE, name)), source=name)
    assert settings.profile == name


def test_every_key_is_documented_where_it_stands():
    lines = (SOURCE / "params.yaml").read_text().splitlines()
    bare = []
    for number, line in enumerate(lines):
        key = re.match(r"\s*([a-z_0-9]+):", line)
        heads_block = re.fullmatch(r"\s*[a-z_0-9]+:\s*", line) and re.match(r"\s+[a-z_0-9]+:", lines[number + 1])
        if key and not heads_block and " # " not in line and not lines[number - 1].lstrip().startswith("#"):
            bare.append(f"{number + 1}: {line.strip()}")
    assert not bare, "say in params.yaml what these are: " + "; ".join(bare)


def test_a_method_has_its_block():
    assert {name for name, method in METHODS.items() if method.settings} <= root_block().model_fields.keys()


@pytest.mark.parametrize("key", [key for key in leaves(VALUES) if not isinstance(value_at(VALUES, key), Mapping)])
def test_every_key_has_a_type(key):
    errors = list(filter(None, (fault_of(key, value) for value in ("no such word", -1.5, [{}]))))
    assert len(errors) >= 2  # of values of three kinds, one may be right
    for error in errors:
        assert f"`{key}" in error.found or f"`{key.rpartition('.')[0]}`" in error.found
        assert "`: " in error.allowed


def test_faults_of_several_blocks_come_together():
    error = faults(**{"seed": -1, "baselines": ["maskclap"], "lseg.train.stepps": 3, "data.workers": "two"})
    for part in ("4 fault(s)", "`seed`: -1", "`baselines.0`", "`lseg.train.stepps`", "did you mean `steps`", '"two"'):
        assert part in error.found
    assert "one of maskclip, linear" in error.allowed


def test_what_needs_words_or_a_backbone_is_refused_without_them():
    without = {f"encode.{part}.source": "none" for part in ("clip", "text", "backbone", "trunk")}
    error = faults(**without)
    for part in (
        "lseg needs vectors of the labels: set encode.text.source, or lseg.run: false",
        "lseg needs a backbone: set encode.backbone.source, or lseg.run: false",
        "the baseline linear needs a backbone: set encode.backbone.source",
        "the baseline maskclip needs encode.text.source: clip",
        "tcl needs encode.text.source: clip",
    ):
        assert part in error.allowed
    runs = {"lseg.run": False, "tcl.run": False, "stego.run": False, "baselines": []}
    assert fault_of_all({**without, **runs}) is None


def test_a_model_folder_needs_no_backbone():
    folder = {"lseg.model.init": "models/x", "lseg.model.sha256": "0" * 64, "lseg.model.clip_residual": False}
    rest = {"baselines": ["maskclip"], "encode.backbone.source": "none"}
    assert fault_of_all({**folder, **rest}) is None


def test_the_report_needs_a_baseline_in_its_folder():
    assert fault_of("baselines", []) is None
    error = faults(**{"baselines": [], "stego.baselines": []})
    assert "baselines and stego.baselines are both empty: name at least one baseline" in error.allowed
    assert "names, each once" in faults(baselines=["linear", "linear"]).allowed


@pytest.mark.parametrize("stage", read_graph(SOURCE))
def test_a_stage_declares_parameters_that_exist(stage):
    known = set(leaves(VALUES))
    assert set(read_graph(SOURCE)[stage].params) <= known


def test_no_parameter_is_read_by_no_stage():
    declared = {key for node in read_graph(SOURCE).values() for key in node.params}
    unread = [
        key
        for key in leaves(VALUES)
        if key.partition(".")[0] != "promotion"  # read by `lexiseg promote`
        and not any(key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.") for other in declared)
    ]
    assert not unread


def test_settings_are_read_without_torch():
    # The command line sets the number of threads from them, and torch takes that number when it is imported.
    code = "import sys; from lexiseg.stages.settings import root_block; root_block(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"evaluate.protocol": "camvid"}, "made for the data set 'camvid', on 'world'"),
        ({"evaluate.protocol": "episodes", "baselines": ["maskclip"]}, "with `evaluate.episodes: null`"),
        ({"evaluate.episodes": [64, 64], "baselines": ["maskclip"]}, "`evaluate.episodes: null` with this card"),
    ],
)
def test_a_protocol_that_does_not_fit_is_refused_before_anything_runs(changes, fault):
    assert fault in faults(**changes).allowed
