"""What one trial is worth: stages of the graph under its settings, and their metrics."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna

from lexiseg.errors import DataError, SettingsError
from lexiseg.storage import read_json
from lexiseg.sweeps.space import Knob, text_of
from lexiseg.trials import Progress, Trials

if TYPE_CHECKING:
    from lexiseg.training import Onlooker

LATENCY, MEMORY = "latency", "memory"
COSTS = {LATENCY: "ms per picture", MEMORY: "MB"}  # measured in a process of its own; less is better
RUNGS = (0.2, 0.4)  # shares of a training at which the better half goes on; each is twice the one before
PICTURES = 128  # that it is then judged by


@dataclass(frozen=True)
class Goal:
    """Something that is measured of a trial.

    Attributes:
        name: a metric of metrics.json, such as miou (0..1), or `latency` or `memory` (`COSTS`).
        minimise: less is better.
    """

    name: str
    minimise: bool = False

    @property
    def direction(self) -> str:
        """In Optuna's words."""
        return "minimize" if self.minimise else "maximize"

    def __str__(self) -> str:
        return f"{self.name}:{'min' if self.minimise else 'max'}"


@dataclass(frozen=True)
class Constraint:
    """What a trial has to keep to: `name` (as of a `Goal`) at most, or at least, `bound`."""

    name: str
    bound: float
    at_least: bool = False

    def excess(self, value: float) -> float:
        """By how much a value is beyond the bound; 0 or less where it keeps to it."""
        return self.bound - value if self.at_least else value - self.bound

    def __str__(self) -> str:
        return f"{self.name}{'>=' if self.at_least else '<='}{self.bound:g}"


def read_goal(text: str) -> Goal:
    """`NAME`, `NAME:max` or `NAME:min`; of costs less is better.

    Raises:
        SettingsError: another form.
    """
    name, _, way = text.partition(":")
    if not name or way not in ("", "max", "min"):
        raise SettingsError(
            found=f"--objective {text}",
            allowed="NAME, NAME:max or NAME:min, with a metric such as miou, or latency, memory",
            fix="write it like --objective miou",
        )
    return Goal(name, minimise=way == "min" if way else name in COSTS)


def read_constraint(text: str) -> Constraint:
    """`NAME<=NUMBER` or `NAME>=NUMBER`.

    Raises:
        SettingsError: another form.
    """
    for sign in ("<=", ">="):
        name, found, number = (part.strip() for part in text.partition(sign))
        try:
            if found and name and math.isfinite(float(number)):
                return Constraint(name, float(number), at_least=sign == ">=")
        except ValueError:
            continue
    raise SettingsError(
        found=f"--constraint {text}",
        allowed="NAME<=NUMBER or NAME>=NUMBER, with a metric such as miou_unseen (0..1), or latency (ms), memory (MB)",
        fix='write it like --constraint "latency<=50"',
    )


@dataclass(frozen=True)
class Task:
    """What all trials of a sweep have in common.

    Attributes:
        method: name in the registry.
        knobs: what is searched.
        common: changes that all trials share, by dotted key.
        split: whose metrics are compared.
        goals: what is searched for; more than one: the best compromises.
        constraints: see `Constraint`.
        prune: trials that promise little are ended in their training.
    """

    method: str
    knobs: tuple[Knob, ...]
    common: Mapping[str, Any]
    split: str
    goals: tuple[Goal, ...]
    constraints: tuple[Constraint, ...]
    prune: bool

    @property
    def target(self) -> str:
        """The stage whose metrics are compared."""
        return f"{self.method}-evaluate"

    @property
    def also(self) -> list[str]:
        """Further stages that every trial needs: a cost is measured of the registered model."""
        wanted = {goal.name for goal in self.goals} | {constraint.name for constraint in self.constraints}
        return [f"{self.method}-register"] if wanted & set(COSTS) else []


class NoValueError(Exception):
    """A trial gave no number for what is searched for."""


def suggest(trial: optuna.Trial, knobs: Sequence[Knob]) -> dict[str, Any]:
    """The values of a trial, by dotted key."""
    values: dict[str, Any] = {}
    for knob in knobs:
        if knob.choices:
            words = [text_of(choice) for choice in knob.choices]
            values[knob.key] = knob.choices[words.index(trial.suggest_categorical(knob.key, words))]
        elif knob.whole:
            values[knob.key] = trial.suggest_int(knob.key, int(knob.low or 0), int(knob.high or 0), log=knob.log)
        else:
            values[knob.key] = trial.suggest_float(knob.key, float(knob.low or 0), float(knob.high or 0), log=knob.log)
    return values


def as_suggested(knobs: Sequence[Knob], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key in the form that `suggest` takes, of those knobs that can take them."""
    return {
        knob.key: text_of(values[knob.key]) if knob.choices else values[knob.key]
        for knob in knobs
        if knob.holds(values.get(knob.key))
    }


def measure(
    root: Path, trials: Trials, task: Task, values: Mapping[str, Any], *, report: Callable[[float, float], bool] | None
) -> dict[str, Any]:
    """Run a trial.

    Args:
        root: the working tree.
        trials: the ground that stages run on.
        task: of the sweep.
        values: of the knobs, by dotted key.
        report: called with a share of the training and what the trial is worth there; True ends it. None: nobody
            looks.

    Returns:
        The metrics of the split, from metrics.json, and the costs that are asked for.

    Raises:
        LexisegError: a stage refused the settings, or failed in words.
        GivenUpError: `report` ended it.
        NoValueError: a goal or a constraint has no number, or not a finite one.
    """
    changes = {**task.common, **values}
    with tempfile.TemporaryDirectory(prefix="lexiseg-sweep-") as scratch:
        onlooker = _onlooker(task, Path(scratch), report) if report else None
        done = trials.run(changes, [task.target, *task.also], onlooker=onlooker)
    metrics = dict(read_json(done[task.target] / "metrics.json")["splits"][task.split])
    for stage in task.also:
        own = trials.folders.get("prepare")
        prepared = own / "outputs" if own else root / trials.graph["prepare"].folder
        metrics |= _costs(root, done[stage], prepared, task.split)
    for name in [*(goal.name for goal in task.goals), *(constraint.name for constraint in task.constraints)]:
        number(metrics, name)
    return metrics


def number(metrics: Mapping[str, Any], name: str) -> float:
    """A metric as a finite number.

    Raises:
        NoValueError: there is none.
    """
    if name not in metrics:
        raise NoValueError(f"no metric `{name}`; there are {', '.join([*metrics, *COSTS])}")
    value = metrics[name]
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise NoValueError(f"`{name}` is {value}")
    return float(value)


def _onlooker(task: Task, scratch: Path, report: Callable[[float, float], bool]) -> Callable[[Progress], Onlooker]:
    """Judges a training at its rungs by the very stages that judge it at its end, on fewer pictures."""
    from lexiseg.sweeps.subset import (
        write_subset,  # like training, slow to import, and of no use to those who only show
    )
    from lexiseg.training import GivenUpError, Onlooker

    def of(progress: Progress) -> Onlooker:
        def look(share: float, save: Callable[[Path], None]) -> None:
            here = scratch / f"{progress.stage}-{share:g}"
            save(here / "made")
            prepared = scratch / "prepare"
            if not prepared.exists():
                whole, episodes = progress.results["prepare"].folder, progress.settings.evaluate.episodes is not None
                write_subset(whole, task.split, pictures=PICTURES, target=prepared, episodes=episodes)
            found = progress.preview(here / "made", task.target, here / "stages", instead={"prepare": prepared})
            metrics = read_json(found / "metrics.json")["splits"][task.split]
            try:
                value = number(metrics, task.goals[0].name)
            except NoValueError:
                return  # at its end it is judged whether that is a fault
            if report(share, value):
                raise GivenUpError(f"at {share:.0%} of {progress.stage}")

        return Onlooker(RUNGS, look)

    return of


def _costs(root: Path, model: Path, prepared: Path, split: str) -> dict[str, float]:
    command = [sys.executable, "-m", "lexiseg.cost", str(model), str(prepared), split]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        said = done.stderr.strip()[-500:] or f"exit code {done.returncode}"
        raise NoValueError(f"latency and memory could not be measured: {said}; by `{' '.join(command)}`") from error


def check_split(prepared: Path, split: str) -> None:
    """Refuse a split that the data set does not have.

    Raises:
        DataError: there is no such split.
    """
    if (prepared / "info.json").is_file() and split not in (splits := read_json(prepared / "info.json")["splits"]):
        raise DataError(
            found=f"no split `{split}`",
            allowed=", ".join(sorted(splits)),
            fix="choose a split that is neither trained on nor reported, with --split",
        )
