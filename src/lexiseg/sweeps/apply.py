"""The best trial of a study as a change of params.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna

from lexiseg.profiles import edit_params
from lexiseg.settings import override
from lexiseg.stage import value_at
from lexiseg.stages.settings import parse_settings, read_values
from lexiseg.sweeps.definition import identity, task_of
from lexiseg.sweeps.results import chosen_trial, settings_of
from lexiseg.sweeps.study import DEFINITION, SLOT, differences
from lexiseg.trials import Trials


def apply_trial(root: Path, study: optuna.Study, *, slot: int | None = None) -> tuple[dict[str, Any], list[str]]:
    """Write what a trial changed into params.yaml, and its split among those that are evaluated.

    `dvc repro` then gives the trial's very score on that split, and what it comes to on the others.

    Args:
        root: the working tree.
        study: the study.
        slot: of the trial; None: the best.

    Returns:
        The changes by dotted key, and in words what differs now from when the trial ran, which makes another score.

    Raises:
        SettingsError: there is no such trial, or it does not fit params.yaml as it is now.
    """
    trial, task = chosen_trial(study, slot), task_of(study)
    definition = study.user_attrs[DEFINITION]
    values = read_values(root)
    changes = settings_of(trial, definition)
    splits = list(value_at(values, "evaluate.splits"))
    if task.split not in splits:
        changes["evaluate.splits"] = [task.split, *splits]
    parse_settings(override(values, changes), source=f"params.yaml with trial {trial.user_attrs[SLOT]}")
    differing = differences(definition, identity(task, Trials(root)))
    changed = {key: value for key, value in changes.items() if value_at(values, key) != value}
    edit_params(root, changed)
    return changed, differing
