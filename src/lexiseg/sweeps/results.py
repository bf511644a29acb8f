"""What a study found, for people: its best trials, lines about each, and a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from lexiseg.errors import SettingsError
from lexiseg.plan import duration
from lexiseg.sweeps.definition import task_of
from lexiseg.sweeps.study import DEFINITION, ERROR, MADE_WITH, METRICS, SECONDS, SETTINGS, SLOT, counts, slots, state_of


def best_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The best trial that keeps to the constraints; of several goals, all that none other beats in every one."""
    complete = [trial for trial in slots(study).values() if trial.state == TrialState.COMPLETE]
    if len(study.directions) > 1:
        numbers = {trial.number for trial in complete}
        return [trial for trial in study.best_trials if trial.number in numbers]
    kept = [trial for trial in complete if all(excess <= 0 for excess in trial.constraints.values())]
    sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
    return sorted(kept, key=lambda trial: (sign * trial.values[0], trial.user_attrs[SLOT]))[:1]


def chosen_trial(study: optuna.Study, slot: int | None = None) -> FrozenTrial:
    """The trial to go on with: the best, or the one in a slot.

    Raises:
        SettingsError: there is no such complete trial, or several are best and none was named.
    """
    best = best_trials(study)
    complete = {number: trial for number, trial in slots(study).items() if trial.state == TrialState.COMPLETE}
    if slot is not None:
        if slot not in complete:
            raise SettingsError(
                found=f"no complete trial {slot} in the study `{study.study_name}`",
                allowed=", ".join(map(str, complete)) or "a study with a complete trial",
                fix=f"`lexiseg sweep show {study.study_name}` lists them",
            )
        return complete[slot]
    if not best:
        raise SettingsError(
            found=f"the study `{study.study_name}` has no complete trial that keeps to its constraints",
            allowed="a study with one",
            fix="let it go on with more --trials, or name a trial that does not with --trial",
        )
    if len(best) > 1:
        numbers = ", ".join(str(trial.user_attrs[SLOT]) for trial in best)
        raise SettingsError(
            found=f"the study `{study.study_name}` has {len(best)} best compromises of {len(study.directions)} goals",
            allowed=f"one of the trials {numbers}",
            fix=f"choose with --trial; `lexiseg sweep show {study.study_name}` shows them",
        )
    return best[0]


def value_of(trial: FrozenTrial) -> list[float]:
    """What a trial is worth by each goal; of a pruned one, what it last showed."""
    if trial.state == TrialState.COMPLETE:
        return list(trial.values)
    shown = trial.intermediate_values
    return [shown[max(shown)]] if shown else []


def trial_line(study: optuna.Study, trial: FrozenTrial) -> str:
    """A line about a trial that ended."""
    names = [goal.name for goal in task_of(study).goals]
    slot, took = trial.user_attrs[SLOT], duration(trial.user_attrs.get(SECONDS, 0))
    if trial.state == TrialState.FAIL:
        return f"trial {slot}: failed after {took}: {trial.user_attrs[ERROR]}"
    values = ", ".join(f"{name} {value:.4f}" for name, value in zip(names, value_of(trial), strict=False))
    if trial.state == TrialState.PRUNED:
        return f"trial {slot}: {values} at {max(trial.intermediate_values)} % of its training, pruned after {took}"
    broken = [name for name, excess in trial.constraints.items() if excess > 0]
    best = best_trials(study)
    note = f"; breaks {', '.join(broken)}" if broken else ""
    if len(names) == 1 and best:
        is_best = best[0].number == trial.number
        note += "; the best so far" if is_best else f"; best {best[0].values[0]:.4f}, trial {best[0].user_attrs[SLOT]}"
    return f"trial {slot}: {values} in {took}{note}"


def study_lines(study: optuna.Study) -> list[str]:
    """A study as a table, best trials marked."""
    definition, task = study.user_attrs[DEFINITION], task_of(study)
    found = counts(study)
    best = {trial.number for trial in best_trials(study)}
    keys = [knob.key for knob in task.knobs]
    head = ["trial", "state", *(goal.name for goal in task.goals), *(_short(key, keys) for key in keys), "time"]
    rows = []
    for position, trial in slots(study).items():
        values: list[Any] = [*value_of(trial), *[None] * len(task.goals)][: len(task.goals)]
        state = state_of(trial) + (" *" if trial.number in best else "")
        if trial.state == TrialState.PRUNED and trial.intermediate_values:
            state += f" at {max(trial.intermediate_values)} %"
        chosen = trial.user_attrs.get(SETTINGS, trial.params)
        took = duration(trial.user_attrs[SECONDS]) if SECONDS in trial.user_attrs else ""
        cells = [*("" if value is None else f"{value:.4f}" for value in values), *(_cell(chosen.get(k)) for k in keys)]
        rows.append([str(position), state, *cells, took])
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [
        f"study {study.study_name}: {definition['method']} on {definition['split']}, space {definition['space']}, "
        + ", ".join(f"{goal.name} {'as low' if goal.minimise else 'as high'} as possible" for goal in task.goals)
        + "".join(f", {constraint}" for constraint in task.constraints),
        ", ".join(f"{count} {state}" for state, count in found.items() if count) or "no trial yet",
        "",
    ]
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]
    for number, trial in slots(study).items():
        if state_of(trial) == "failed":
            lines.append(f"trial {number} failed: {trial.user_attrs[ERROR]}")
        if state_of(trial) == "given up":
            lines.append(f"trial {number} was given up: workers were killed in it, for memory most often")
    if best:
        lines += ["", "* the best" + (" compromises" if len(task.goals) > 1 else "")]
    gain = gain_line(study)
    return [*lines, *([gain] if gain else [])]


def gain_line(study: optuna.Study) -> str | None:
    """How the best trial compares with the settings as they were, where these are a trial (the first)."""
    best = best_trials(study)
    first = slots(study).get(0)
    if len(study.directions) > 1 or not best or first is None or first.state != TrialState.COMPLETE:
        return None
    if set(first.system_attrs.get("fixed_params", ())) != set(first.params):
        return None  # not all of the settings as they were are in the space
    goal = task_of(study).goals[0]
    return (
        f"{goal.name} on {task_of(study).split}: {best[0].values[0]:.4f}, with the settings as they were "
        f"{first.values[0]:.4f} ({best[0].values[0] - first.values[0]:+.4f})"
    )


def study_json(study: optuna.Study) -> dict[str, Any]:
    """A study as plain values."""
    best = {trial.number for trial in best_trials(study)}
    return {
        "study": study.study_name,
        **study.user_attrs[DEFINITION],
        "made_with": study.user_attrs.get(MADE_WITH),
        "counts": counts(study),
        "trials": [
            {
                "trial": slot,
                "state": state_of(trial),
                "best": trial.number in best,
                "values": value_of(trial),
                "settings": trial.user_attrs.get(SETTINGS, trial.params),
                "metrics": trial.user_attrs.get(METRICS),
                "constraints": dict(trial.constraints),
                "looked_at": {str(step): value for step, value in sorted(trial.intermediate_values.items())},
                "seconds": trial.user_attrs.get(SECONDS),
                "error": trial.user_attrs.get(ERROR),
            }
            for slot, trial in slots(study).items()
        ],
    }


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that ended, failed ones too."""
    return [trial for trial in slots(study).values() if state_of(trial) in ("complete", "pruned", "failed")]


def _short(key: str, keys: list[str]) -> str:
    """The last words of a key that tell it from the others."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        word = ".".join(parts[-count:])
        if sum(other.endswith(f".{word}") for other in keys) == 1:
            return word
    return key


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def settings_of(trial: FrozenTrial, definition: Mapping[str, Any]) -> dict[str, Any]:
    """All that a trial changed against params.yaml but the split: its knobs, and what was fixed."""
    return {**definition["fixed"], **trial.user_attrs.get(SETTINGS, trial.params)}
