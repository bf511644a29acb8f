from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from lexiseg.errors import DataError, SettingsError
from lexiseg.methods import METHODS
from lexiseg.storage import write_json
from lexiseg.sweeps.objective import (
    Constraint,
    Goal,
    NoValueError,
    Task,
    as_suggested,
    check_split,
    number,
    read_constraint,
    read_goal,
    suggest,
)
from lexiseg.sweeps.space import Knob


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("miou", Goal("miou")),
        ("miou:min", Goal("miou", minimise=True)),
        ("latency", Goal("latency", minimise=True)),
        ("memory:max", Goal("memory")),
    ],
)
def test_a_goal(text, goal):
    assert read_goal(text) == goal
    assert read_goal(str(goal)) == goal
    assert goal.direction == ("minimize" if goal.minimise else "maximize")


@pytest.mark.parametrize("text", ["", ":max", "miou:up"])
def test_what_is_no_goal(text):
    with pytest.raises(SettingsError, match="NAME, NAME:max or NAME:min"):
        read_goal(text)


@pytest.mark.parametrize(
    ("text", "constraint", "excess"),
    [
        ("latency<=50", Constraint("latency", 50.0), {60.0: 10.0, 50.0: 0.0, 40.0: -10.0}),
        ("miou_unseen >= 0.25", Constraint("miou_unseen", 0.25, at_least=True), {0.5: -0.25, 0.0: 0.25}),
    ],
)
def test_a_constraint(text, constraint, excess):
    assert read_constraint(text) == constraint
    assert read_constraint(str(constraint)) == constraint
    assert {value: constraint.excess(value) for value in excess} == excess


@pytest.mark.parametrize("text", ["latency=50", "latency<50", "<=50", "latency<=fast", "latency<=inf", "latency"])
def test_what_is_no_constraint(text):
    with pytest.raises(SettingsError, match="NAME<=NUMBER or NAME>=NUMBER"):
        read_constraint(text)


def test_values_come_back_as_what_they_are():
    knobs = (
        Knob("a", 0.1, 10.0, log=True),
        Knob("b", 1, 9, whole=True),
        Knob("c", choices=(True, None, "text", 1.5, [1, 2])),
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    kinds: dict[str, set[Any]] = {"a": set(), "b": set(), "c": set()}
    for _ in range(40):
        values = suggest(study.ask(), knobs)
        for key, value in values.items():
            kinds[key].add(str(value) if key == "c" else type(value))
    assert kinds == {"a": {float}, "b": {int}, "c": {"True", "None", "text", "1.5", "[1, 2]"}}


def test_settings_as_they_are_become_the_first_trial():
    knobs = (Knob("a", 0.1, 1.0), Knob("b", 1, 9, whole=True), Knob("c", choices=(True, None)), Knob("d", 0.0, 1.0))
    assert as_suggested(knobs, {"a": 0.5, "b": 12, "c": None, "d": None}) == {"a": 0.5, "c": "null"}
    study = optuna.create_study()
    study.enqueue_trial(as_suggested(knobs, {"a": 0.5, "b": 3, "c": True, "d": 0}))
    assert suggest(study.ask(), knobs) == {"a": 0.5, "b": 3, "c": True, "d": 0}


def test_a_metric_that_is_no_number():
    assert number({"miou": 0}, "miou") == 0.0
    with pytest.raises(NoValueError, match=r"no metric `mioux`; there are miou, latency, memory"):
        number({"miou": 0.5}, "mioux")
    for value in (None, float("nan"), float("-inf"), "0.5"):
        with pytest.raises(NoValueError, match="`miou` is"):
            number({"miou": value}, "miou")


def task(**changes: Any) -> Task:
    settings: dict[str, Any] = {"knobs": (), "common": {}, "split": "val", "constraints": (), "prune": True}
    settings |= {"method": "tcl", "goals": (Goal("miou"),)}
    return Task(**settings | changes)


def test_only_costs_need_the_registered_model():
    assert (task().target, task().also) == ("tcl-evaluate", [])
    assert task(goals=(Goal("miou"), Goal("latency", minimise=True))).also == ["tcl-register"]
    assert task(constraints=(Constraint("memory", 9.0),)).also == ["tcl-register"]


def test_every_method_has_the_stages_that_a_sweep_needs():
    from lexiseg.pipeline import read_graph

    graph = read_graph(Path(__file__).parents[2])
    for name in METHODS:
        assert {f"{name}-evaluate", f"{name}-register"} <= set(graph)


def test_a_split_that_is_not_there(tmp_path):
    check_split(tmp_path, "anything")  # nothing is prepared yet
    write_json(tmp_path / "info.json", {"splits": {"train": {}, "val": {}}})
    check_split(tmp_path, "val")
    with pytest.raises(DataError) as error:
        check_split(tmp_path, "dev")
    assert error.value.allowed == "train, val"
