"""What makes a study the one it is: what it searches, for what, and on which settings, code and data.

All of it is in the storage, so that a worker on any machine knows what to do from the study's name alone, and refuses
to mix its trials with those of other settings, code or data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna

from lexiseg.errors import SettingsError, StageError
from lexiseg.pipeline import OUTPUTS, hash_dependencies
from lexiseg.settings import override
from lexiseg.stage import value_at
from lexiseg.sweeps.objective import Task, read_constraint, read_goal
from lexiseg.sweeps.space import Space, read_knob
from lexiseg.sweeps.study import DEFINITION, differences
from lexiseg.trials import Trials


def common_changes(fixed: Mapping[str, Any], *, split: str) -> dict[str, Any]:
    """What all trials change against params.yaml, by dotted key."""
    return {**fixed, "evaluate.splits": [split], "evaluate.pictures": 1}


def define(task: Task, space: Space, trials: Trials, *, seed: int) -> dict[str, Any]:
    """The definition of a study, of plain values."""
    return {
        "method": task.method,
        "space": space.name,
        "knobs": [str(knob) for knob in task.knobs],
        "fixed": dict(space.fixed),
        "split": task.split,
        "objectives": [str(goal) for goal in task.goals],
        "constraints": [str(constraint) for constraint in task.constraints],
        "pruner": "successive halving" if task.prune else "none",
        "seed": seed,
        **identity(task, trials),
    }


def identity(task: Task, trials: Trials) -> dict[str, Any]:
    """What trials rest on beside their knobs: settings by dotted key, and the hashes of data and code."""
    stages = trials.needed([task.target, *task.also])
    values = override(trials.values, task.common)
    knobs = {knob.key for knob in task.knobs}
    settings = {
        key: value
        for name in stages
        for own in trials.graph[name].params
        for key, value in _leaves(own, value_at(values, own))
        if key not in knobs
    }
    deps = sorted({dep for name in stages for dep in trials.graph[name].deps if not dep.startswith(f"{OUTPUTS}/")})
    return {"settings": dict(sorted(settings.items())), "inputs": hash_dependencies(trials.root, deps)}


def task_of(study: optuna.Study) -> Task:
    """What a study's trials have to do.

    Raises:
        SettingsError: this version cannot read the study.
    """
    found = study.user_attrs.get(DEFINITION, {})
    try:
        return Task(
            method=found["method"],
            knobs=tuple(map(read_knob, found["knobs"])),
            common=common_changes(found["fixed"], split=found["split"]),
            split=found["split"],
            goals=tuple(map(read_goal, found["objectives"])),
            constraints=tuple(map(read_constraint, found["constraints"])),
            prune=found["pruner"] != "none",
        )
    except (KeyError, TypeError) as error:
        raise SettingsError(
            found=f"the study `{study.study_name}` is not as this version writes it ({type(error).__name__}: {error})",
            allowed="a study of this version of lexiseg",
            fix="start a new one with --study",
        ) from error


def check_identity(study: optuna.Study, trials: Trials, task: Task) -> None:
    """Refuse to work on a study with other settings, data or code than those of its trials.

    Raises:
        StageError: they differ.
    """
    differing = differences(study.user_attrs[DEFINITION], identity(task, trials))
    if differing:
        raise StageError(
            found=f"the study `{study.study_name}` was made with others:"
            + "".join(f"\n  - {line}" for line in differing),
            allowed="one state of settings, data and code for all trials of a study",
            fix="check out the commit of the study, or start a new one with --study",
        )


def _leaves(key: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [leaf for name, inner in value.items() for leaf in _leaves(f"{key}.{name}", inner)]
    return [(key, value)]
