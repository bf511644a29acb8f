from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lexiseg.errors import SettingsError
from lexiseg.history import Took, remember
from lexiseg.sweeps.definition import common_changes
from lexiseg.sweeps.planner import Plan, plan_lines, plan_sweep
from lexiseg.sweeps.space import read_space
from lexiseg.trials import Trials


@pytest.fixture
def tree(micro_tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LEXISEG_HOME", raising=False)
    monkeypatch.chdir(micro_tree)
    return micro_tree


def planned(tree: Path, method: str, *given: str, split: str = "val", also: tuple[str, ...] = ()) -> tuple[Plan, Any]:
    trials, space = Trials(tree), read_space(method, given)
    common = common_changes(space.fixed, split=split)
    return plan_sweep(tree, trials, space, target=f"{method}-evaluate", common=common, also=also), space


def names(steps: Any) -> list[str]:
    return [step.stage for step in steps]


@pytest.mark.parametrize(
    ("method", "given", "once", "each"),
    [
        ("tcl", ["tcl.refine.knowledge_weight"], ["tcl-predict"], ["tcl-evaluate"]),
        ("tcl", ["tcl.predict.max_side=32..64"], [], ["tcl-predict", "tcl-evaluate"]),
        ("tcl", ["tcl.loss.area"], [], ["tcl-train", "tcl-predict", "tcl-evaluate"]),
        ("tcl", ["tcl.refine.knowledge_weight", "tcl.loss.area"], [], ["tcl-train", "tcl-predict", "tcl-evaluate"]),
        ("lseg", ["blocks"], [], ["lseg-train", "lseg-predict", "lseg-evaluate"]),
        ("stego", ["stego.match.unmatched=error|majority"], ["stego-predict"], ["stego-evaluate"]),
        ("stego", ["stego.probe.restarts=1..3"], [], ["stego-probe", "stego-predict", "stego-evaluate"]),
        ("stego", ["shifts"], [], ["stego-train", "stego-probe", "stego-predict", "stego-evaluate"]),
    ],
)
def test_a_knob_enters_at_the_first_stage_that_declares_it(tree, method, given, once, each):
    plan, space = planned(tree, method, *given)
    assert names(plan.each) == each
    assert names(plan.once) == once
    assert not {*plan.reused} & {*once, *each}
    assert "prepare" in plan.reused
    assert all(plan.enters[knob.key] in each for knob in space.knobs)
    assert plan.scores_only == (each == [f"{method}-evaluate"])


def test_an_encoders_knob_runs_all_that_follows(tree):
    plan, _ = planned(tree, "lseg", "encode.pretrain.lr")
    assert names(plan.each) == ["encode", "lseg-train", "lseg-predict", "lseg-evaluate"]
    assert plan.reused == ("prepare", "validate")


def test_on_the_split_that_outputs_has_nothing_is_predicted_again(tree):
    trials = Trials(tree)
    splits = trials.values["evaluate"]["splits"]
    space = read_space("tcl", ["inference"])
    plan = plan_sweep(tree, trials, space, target="tcl-evaluate", common={"evaluate.splits": splits})
    assert names(plan.once) == []
    assert "tcl-predict" in plan.reused


def test_costs_need_the_registered_model(tree):
    plan, _ = planned(tree, "tcl", "inference", also=("tcl-register",))
    assert names(plan.each) == ["tcl-evaluate", "tcl-register"]


def test_knobs_of_another_method_are_refused(tree):
    with pytest.raises(SettingsError) as error:
        planned(tree, "tcl", "stego.loss.knn", "lseg.train.lr", "tcl.loss.area")
    assert "`stego.loss.knn`, `lseg.train.lr` enter(s) no stage that tcl-evaluate needs" in error.value.found
    assert "tcl.loss.area" in error.value.allowed
    assert "encode.pretrain.lr" in error.value.allowed
    assert "stego.loss.knn" not in error.value.allowed


def test_the_plan_in_words(tree):
    (tree / ".lexiseg").mkdir(exist_ok=True)
    plan, space = planned(tree, "tcl", "weights")
    lines = plan_lines(plan, space, trials=20, workers=1, rungs=(0.2, 0.4))
    assert lines[-1] == "cost      not known: no earlier run of these stages"
    params = {"tcl.train": {"steps": 3}}
    for stage, seconds in {"tcl-train": 60.0, "tcl-predict": 9.0, "tcl-evaluate": 8.0}.items():
        took = {"memory": 2_000_000_000, "disk": 1_000_000, "whole": True, "finished": "2026-01-01T00:00:00"}
        remember(tree / ".lexiseg", Took(stage=stage, params=params, seconds=seconds, **took))  # type: ignore[arg-type]
    plan, space = planned(tree, "tcl", "weights")
    lines = plan_lines(plan, space, trials=20, workers=2, rungs=(0.2, 0.4))
    text = "\n".join(lines)
    assert "tcl.loss.image=0.01..1,log           enters at tcl-train" in text
    assert "per trial tcl-train (1 m 0 s), tcl-predict (9 s), tcl-evaluate (8 s)" in text
    assert "pruning   at 20%, 40% of a training only the better half" in text
    assert "20 trials, 2 at once: about 12 m 50 s going by earlier runs, less what is pruned" in text
    assert "memory 4.0 GB, disk 60.0 MB" in text
    assert "no network is run" not in text
