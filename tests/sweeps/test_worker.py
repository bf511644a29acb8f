from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from lexiseg.errors import ChangedError, ModelError, StageError
from lexiseg.sweeps import study as study_module
from lexiseg.sweeps import worker as module
from lexiseg.sweeps.objective import Constraint, Goal, Task
from lexiseg.sweeps.space import Knob
from lexiseg.sweeps.study import add_slots, claim, counts, create_study, load_study, open_storage, worker_name
from lexiseg.sweeps.worker import IN_A_ROW, is_behind, work
from lexiseg.training import GivenUpError

AREA, COUNT, TEXT = Knob("area", 0.0, 1.0), Knob("count", 1, 9, whole=True), Knob("text", choices=(True, None, "a"))
Measure = Callable[..., dict[str, Any]]


class Sweep:
    """A study in a file, whose trials are measured by a function."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, seed: int = 0, **changes: Any) -> None:
        self.storage = open_storage(f"sqlite:///{folder / 'sweeps.db'}")
        settings: dict[str, Any] = {
            "method": "tcl",
            "knobs": (AREA, COUNT, TEXT),
            "common": {},
            "split": "val",
            "goals": (Goal("miou"),),
            "constraints": (),
            "prune": True,
        }
        self.task = Task(**settings | changes)
        directions = [goal.direction for goal in self.task.goals]
        self.study = create_study(self.storage, "s", {"seed": seed}, directions=directions)[0]
        monkeypatch.setattr(module, "task_of", lambda study: self.task)
        monkeypatch.setattr(module, "Trials", lambda root: SimpleNamespace(folders={"a": Path("work/a-folder")}))
        monkeypatch.setattr(module, "check_identity", lambda *_: None)
        monkeypatch.setattr(module, "PAUSE", 0.01)
        self.patch = monkeypatch

    def run(self, measure: Measure, *, trials: int, first: dict[str, Any] | None = None) -> list[Any]:
        """Work on the study until it ends; its trials by slot."""
        self.patch.setattr(module, "measure", measure)
        add_slots(self.study, trials, first=first)
        work(Path(), lambda: load_study_of(self), name="w")
        return self.trials

    @property
    def trials(self) -> list[Any]:
        return sorted(self.study.get_trials(), key=lambda trial: (trial.user_attrs["slot"], trial.number))


def load_study_of(sweep: Sweep) -> optuna.Study:
    return load_study(sweep.storage, "s")


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    return Sweep(tmp_path, monkeypatch)


def result(values: Any, **more: float) -> dict[str, Any]:
    return {"miou": 1 - abs(values["area"] - 0.25), **more}


def good(root: Path, trials: Any, task: Task, values: dict[str, Any], *, report: Any) -> dict[str, Any]:
    return result(values)


def test_a_study_is_worked_through(sweep):
    trials = sweep.run(good, trials=12, first={"area": 0.9, "count": 3, "text": "null"})
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 12
    assert trials[0].params == {"area": 0.9, "count": 3, "text": "null"}
    first = trials[0].user_attrs
    assert first["settings"] == {"area": 0.9, "count": 3, "text": None}
    assert first["metrics"] == {"miou": pytest.approx(0.35)}
    assert (first["work"], first["worker"]) == (["a-folder"], "w")
    assert first["seconds"] >= 0
    assert sweep.study.best_value > 0.9
    assert all(isinstance(trial.params["count"], int) for trial in trials)


def test_the_search_depends_on_the_seed_and_not_on_interruptions(tmp_path, monkeypatch):
    def searched(name: str, parts: list[int], seed: int = 0) -> list[dict[str, Any]]:
        (tmp_path / name).mkdir()
        sweep = Sweep(tmp_path / name, monkeypatch, seed=seed)
        for count in parts:
            sweep.run(good, trials=count)
        return [trial.params for trial in sweep.trials]

    whole = searched("whole", [14])
    assert searched("parts", [3, 10, 14]) == whole
    assert searched("other", [14], seed=1) != whole


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_a_trial_without_a_number_fails_and_the_study_goes_on(sweep, value):
    def measure(root: Path, trials: Any, task: Task, values: dict[str, Any], *, report: Any) -> dict[str, Any]:
        found = result(values)
        if values["area"] == 0.5:
            found["miou"] = value
            module.number(found, "miou")
        return found

    trials = sweep.run(measure, trials=3, first={"area": 0.5})
    assert [trial.state for trial in trials] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert trials[0].user_attrs["error"] == f"`miou` is {value}"
    assert {state: number for state, number in counts(sweep.study).items() if number} == {"complete": 2, "failed": 1}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModelError(found="it diverged in step 3", allowed="a", fix="b"), "it diverged in step 3"),
        (StageError(found="a process was killed", allowed="a", fix="b"), "a process was killed"),
        (ValueError("a fault\nof ours"), "ValueError: a fault of ours"),
    ],
)
def test_a_trial_that_raises_fails_and_the_study_goes_on(sweep, error, said):
    def measure(root: Path, trials: Any, task: Task, values: dict[str, Any], *, report: Any) -> dict[str, Any]:
        if values["area"] == 0.5:
            raise error
        return result(values)

    trials = sweep.run(measure, trials=2, first={"area": 0.5})
    assert [trial.state for trial in trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert trials[0].user_attrs["error"] == said


def test_where_trial_after_trial_fails_it_is_not_the_settings(sweep):
    def measure(*_: Any, **__: Any) -> dict[str, Any]:
        raise ModelError(found="no such file", allowed="a", fix="b")

    with pytest.raises(StageError) as error:
        sweep.run(measure, trials=9)
    assert f"{IN_A_ROW} trials failed one after the other, the last: no such file" in error.value.found
    assert counts(sweep.study)["failed"] == IN_A_ROW
    assert counts(sweep.study)["waiting"] == 9 - IN_A_ROW


@pytest.mark.parametrize(
    "error",
    [ChangedError(found="code.py changed", allowed="a", fix="b"), OSError(28, "disk full"), KeyboardInterrupt()],
)
def test_what_is_of_no_trials_doing_ends_the_work_and_not_the_trial(sweep, error):
    def measure(*_: Any, **__: Any) -> dict[str, Any]:
        raise error

    with pytest.raises(type(error)):
        sweep.run(measure, trials=2)
    assert {state: number for state, number in counts(sweep.study).items() if number} == {"waiting": 2}
    stopped = [trial for trial in sweep.trials if trial.user_attrs["slot"] == 0]
    assert [trial.state for trial in stopped] == [TrialState.FAIL, TrialState.WAITING]
    assert stopped[0].params == stopped[1].params
    assert len(sweep.run(good, trials=2)) == 3


def test_sigterm_ends_it_cleanly(sweep):
    def measure(*_: Any, **__: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        sweep.run(measure, trials=2)
    assert stop.value.code == 128 + signal.SIGTERM
    assert counts(sweep.study)["waiting"] == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_trials_that_are_behind_are_pruned(sweep):
    looked: list[tuple[float, bool]] = []

    def measure(root: Path, trials: Any, task: Task, values: dict[str, Any], *, report: Any) -> dict[str, Any]:
        chance = 1000 * values["area"] % 1  # nothing that a search could learn
        for share in (0.2, 0.4):
            behind = report(share, share * chance)
            looked.append((share, behind))
            if behind:
                raise GivenUpError
        return result(values)

    trials = sweep.run(measure, trials=16)
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    assert pruned
    assert len(pruned) == sum(behind for _, behind in looked)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    # About half of those that come to a step go on.
    assert 2 <= len(complete) <= 12
    assert len([trial for trial in trials if 40 in trial.intermediate_values]) > len(complete)
    assert len([trial for trial in pruned if 40 not in trial.intermediate_values]) >= 3
    assert all(set(trial.intermediate_values) <= {20, 40} for trial in trials)
    assert counts(sweep.study)["pruned"] == len(pruned)


def test_neither_search_nor_pruning_depend_on_interruptions(tmp_path, monkeypatch):
    def searched(name: str, stops: set[int]) -> tuple[list[dict[str, Any]], list[bool]]:
        (tmp_path / name).mkdir()
        sweep, behind, stopped = Sweep(tmp_path / name, monkeypatch), {}, set()

        def measure(root: Path, trials: Any, task: Task, values: dict[str, Any], *, report: Any) -> dict[str, Any]:
            running = sweep.study.get_trials(states=(TrialState.RUNNING,))[0]
            slot = running.user_attrs["slot"]
            if 20 not in running.intermediate_values:  # what goes on from its checkpoint is not looked at again
                behind[slot] = report(0.2, result(values)["miou"])
            if slot in stops - stopped:
                stopped.add(slot)
                raise KeyboardInterrupt
            if behind[slot]:
                raise GivenUpError
            return result(values)

        while True:
            try:
                trials = sweep.run(measure, trials=14)
                break
            except KeyboardInterrupt:
                continue
        ended = {trial.user_attrs["slot"]: trial.params for trial in trials if trial.state != TrialState.FAIL}
        return list(ended.values()), [behind[slot] for slot in range(14)]

    assert searched("stopped", {0, 3, 9, 13}) == searched("whole", set())


@pytest.mark.parametrize(
    ("others", "value", "behind"),
    [
        ([], 0.1, False),
        ([0.5], 0.4, True),
        ([0.5], 0.6, False),
        ([0.5, 0.3], 0.4, False),
        ([0.5, 0.4, 0.3], 0.35, True),
    ],
)
def test_the_better_half_goes_on(sweep, others, value, behind):
    add_slots(sweep.study, len(others) + 1, first=None)
    for other in others:
        trial = claim(sweep.study)
        assert trial is not None
        trial.report(other, 20)
    assert is_behind(sweep.study, len(others), 20, value, minimise=False) is behind
    assert is_behind(sweep.study, len(others), 40, value, minimise=False) is False


def test_less_may_be_better(sweep):
    add_slots(sweep.study, 2, first=None)
    trial = claim(sweep.study)
    assert trial is not None
    trial.report(0.5, 20)
    assert is_behind(sweep.study, 1, 20, 0.6, minimise=True)
    assert not is_behind(sweep.study, 1, 20, 0.4, minimise=True)


def test_a_worker_that_counted_as_dead_goes_on_with_another_trial(sweep):
    lost = []

    def measure(root: Path, trials: Any, task: Task, values: dict[str, Any], *, report: Any) -> dict[str, Any]:
        if not lost:
            # The storage was away, and when it came back somebody else was quicker with the queue.
            lost.append(sweep.study.trials[0])
            sweep.study.tell(0, state=TrialState.FAIL)
            put_back_by_others(sweep.study)
        return result(values)

    trials = sweep.run(measure, trials=2)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert [trial.user_attrs["slot"] for trial in complete] == [0, 1]
    assert complete[0].params == lost[0].params
    assert len(trials) == 3


def put_back_by_others(study: optuna.Study) -> None:
    study_module._died(study, study.trials[0])


def test_without_pruning_nobody_looks(tmp_path, monkeypatch):
    def measure(root: Path, trials: Any, task: Task, values: dict[str, Any], *, report: Any) -> dict[str, Any]:
        assert report is None
        return result(values)

    Sweep(tmp_path, monkeypatch, prune=False).run(measure, trials=1)


def test_constraints_decide_what_is_best(tmp_path, monkeypatch):
    sweep = Sweep(
        tmp_path, monkeypatch, constraints=(Constraint("latency", 0.3), Constraint("miou", 0.1, at_least=True))
    )

    def measure(root: Path, trials: Any, task: Task, values: dict[str, Any], *, report: Any) -> dict[str, Any]:
        return {"miou": values["area"], "latency": values["area"]}

    trials = sweep.run(measure, trials=25, first={"area": 0.99})
    assert trials[0].constraints == {"latency<=0.3": pytest.approx(0.69), "miou>=0.1": pytest.approx(-0.89)}
    assert 0.1 < sweep.study.best_value <= 0.3
    assert sweep.study.best_value == max(trial.value for trial in trials if 0.1 <= trial.value <= 0.3)


def test_several_goals(tmp_path, monkeypatch):
    sweep = Sweep(tmp_path, monkeypatch, goals=(Goal("miou"), Goal("latency", minimise=True)), prune=False)

    def measure(root: Path, trials: Any, task: Task, values: dict[str, Any], *, report: Any) -> dict[str, Any]:
        return {"miou": values["area"], "latency": values["area"] ** 2}

    trials = sweep.run(measure, trials=6)
    assert len(sweep.study.best_trials) == len({trial.params["area"] for trial in trials})


def test_no_two_workers_have_the_same_name():
    assert worker_name(1) != worker_name(2)
    assert str(os.getpid()) in worker_name(1)
