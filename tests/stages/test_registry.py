from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.working_tree import SOURCE

from lexiseg.errors import StageError
from lexiseg.methods import BASELINES, METHODS, resolve
from lexiseg.pipeline import read_graph
from lexiseg.stages import registry
from lexiseg.stages.registry import TAIL, stage_function, stage_reference


@pytest.mark.parametrize("name", read_graph(SOURCE))
def test_every_stage_of_the_graph_has_a_function(name):
    assert callable(resolve(stage_reference(name)[0]))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_stages_and_the_common_tail(method):
    for part in METHODS[method].stages:
        assert stage_reference(f"{method}-{part}") == (METHODS[method].stages[part], {})
    for part in TAIL.keys() - METHODS[method].stages.keys():
        assert stage_reference(f"{method}-{part}") == (TAIL[part], {"method": method})


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_predicts_and_is_evaluated_as_the_methods_are(name):
    assert stage_reference(f"baseline-predict@{name}") == ("lexiseg.stages.baseline:run", {"name": name})
    assert stage_reference(f"baseline-evaluate@{name}") == (TAIL["evaluate"], {"method": f"baselines/{name}"})


@pytest.mark.parametrize(
    "name", ["prepared", "lseg", "lseg-", "lseg-sleep", "baseline-predict", "baseline-predict@", ""]
)
def test_a_stage_without_a_function(name):
    with pytest.raises(StageError) as caught:
        stage_function(name)
    assert caught.value.found == f"no function for the stage `{name}`"
    for known in ("prepare", "validate", "<method>-<stage>", "lseg", "baseline-predict@NAME"):
        assert known in caught.value.allowed
    assert "dvc.yaml" in caught.value.fix


def test_a_function_gets_what_makes_it_this_stage(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(registry, "resolve", lambda reference: lambda *a, **k: seen.append((reference, a, k)))
    run = stage_function("baseline-evaluate@linear")
    assert seen == []  # nothing is imported before it runs
    run("settings", {"a": tmp_path}, tmp_path)
    assert seen == [(TAIL["evaluate"], ("settings", {"a": tmp_path}, tmp_path), {"method": "baselines/linear"})]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_is_not_to_run_leaves_what_dvc_expects(method, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(registry, "resolve", lambda reference: pytest.fail(f"{reference} was imported"))
    graph, settings = read_graph(SOURCE), SimpleNamespace(**{method: SimpleNamespace(run=False)})
    for name in (name for name in graph if name.startswith(f"{method}-")):
        folder = tmp_path / name
        stage_function(name)(settings, {}, folder)
        assert f"{name}: not run" in capsys.readouterr().out
        for out in graph[name].outs:
            inside = Path(out).relative_to("outputs", method, name.removeprefix(f"{method}-"))
            assert (folder / inside).exists(), out
            assert f"{method}.run" in graph[name].params


def test_naming_a_function_does_not_import_it():
    code = "import sys, lexiseg.stages.registry as r; r.stage_function('encode'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
