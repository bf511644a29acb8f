"""One process that works on a study: it takes trials from the queue until there is none left."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from lexiseg.errors import ChangedError, LexisegError, StageError, StorageError
from lexiseg.storage import sha256_of_json
from lexiseg.sweeps.definition import check_identity, task_of
from lexiseg.sweeps.objective import NoValueError, Task, measure, number, suggest
from lexiseg.sweeps.study import (
    DEFINITION,
    ERROR,
    METRICS,
    PAUSE,
    SECONDS,
    SETTINGS,
    SHORT,
    SLOT,
    WORK,
    WORKER,
    claim,
    counts,
    heartbeats,
    patiently,
    put_back,
    slots,
)
from lexiseg.training import GivenUpError
from lexiseg.trials import Trials

STARTUP_TRIALS = 8  # at random, before TPE draws conclusions
IN_A_ROW = 3  # trials that fail one after the other: then it is not the settings


def work(root: Path, load: Callable[[], optuna.Study], *, name: str) -> None:
    """Work on a study until every slot of it has ended.

    SIGTERM ends it cleanly: a training stops after its step with a checkpoint, and the trial goes back to the queue.

    Args:
        root: the working tree.
        load: gives the study.
        name: of this worker.

    Raises:
        LexisegError: what ends more than one trial: the storage, or files that changed.
        SystemExit: with code 143, after SIGTERM.
    """
    study = patiently(load)
    task, trials = task_of(study), Trials(root)
    check_identity(study, trials, task)
    parent, failed = os.getppid(), 0
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        while os.getppid() == parent:
            study = patiently(load)
            trial = patiently(lambda study=study: claim(study))
            if trial is None:
                if not patiently(lambda study=study: counts(study)["running"]):
                    return
                time.sleep(PAUSE)  # another worker may die, and its trial come back
                continue
            try:
                with heartbeats(study, trial):
                    fails = _run(root, study, trial, trials, task, name=name)
            except UpdateFinishedTrialError:
                # The storage was away for so long that this worker counted as dead; its results are in work folders.
                print(f"trial {trial.user_attrs[SLOT]}: another worker has it by now", flush=True)
                continue
            failed = failed + 1 if fails else 0
            if failed == IN_A_ROW:
                raise StageError(
                    found=f"{IN_A_ROW} trials failed one after the other, the last: {fails}",
                    allowed="a space in which most trials give a number",
                    fix="narrow the space (--space), or choose another objective; then start a new --study",
                )
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(root: Path, study: optuna.Study, trial: optuna.Trial, trials: Trials, task: Task, *, name: str) -> str:
    """Run a trial and tell the storage what came of it; returns why it failed, or nothing."""
    started = time.monotonic()
    slot = trial.user_attrs[SLOT]
    patiently(lambda: trial.set_user_attr(WORKER, name))
    study.sampler = _sampler(study, slot=slot)
    attributes: dict[str, Any] = {}
    state, values, fails = TrialState.FAIL, None, ""

    def report(share: float, value: float) -> bool:
        step = round(100 * share)
        if step not in patiently(lambda: trial.storage.get_trial(trial._trial_id)).intermediate_values:
            patiently(lambda: trial.report(value, step))
        behind = patiently(lambda: is_behind(study, slot, step, value, minimise=task.goals[0].minimise))
        print(f"trial {slot}: {value:.4f} at {step} %{', given up' if behind else ''}", flush=True)
        return behind

    try:
        chosen = patiently(lambda: suggest(trial, task.knobs))
        attributes[SETTINGS] = chosen
        print(f"trial {slot}: " + ", ".join(f"{key} {value}" for key, value in chosen.items()), flush=True)
        metrics = measure(root, trials, task, chosen, report=report if task.prune else None)
        attributes[METRICS] = metrics
        values = [number(metrics, goal.name) for goal in task.goals]
        for constraint in task.constraints:
            excess = constraint.excess(number(metrics, constraint.name))
            patiently(lambda name=str(constraint), excess=excess: trial.set_constraint(name, excess))
        state = TrialState.COMPLETE
    except GivenUpError:
        state = TrialState.PRUNED
    except NoValueError as error:
        fails = str(error)
    except (ChangedError, StorageError, OSError):
        patiently(lambda: put_back(study, trial))  # of no trial's doing
        raise
    except UpdateFinishedTrialError:
        raise
    except LexisegError as error:
        fails = error.found
    except (KeyboardInterrupt, SystemExit):
        patiently(lambda: put_back(study, trial), patience=SHORT)
        print(f"trial {slot}: stopped, and queued again", flush=True)
        raise
    except Exception as error:
        traceback.print_exc()
        fails = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if fails:
        attributes[ERROR] = fails
        print(f"trial {slot}: failed, {fails}", flush=True)
    attributes[SECONDS] = round(time.monotonic() - started, 2)
    attributes[WORK] = sorted({folder.name for folder in trials.folders.values()})
    for key, value in attributes.items():
        patiently(lambda key=key, value=value: trial.set_user_attr(key, value))
    patiently(lambda: study.tell(trial, values, state=state, skip_if_finished=True))
    return fails


def is_behind(study: optuna.Study, slot: int, step: int, value: float, *, minimise: bool) -> bool:
    """Whether a trial is not in the better half of all that have come to a step of their training.

    Optuna's pruner counts a trial that was stopped and queued again twice, so that what it prunes would depend on
    interruptions; here every slot counts once.
    """
    others = [trial.intermediate_values[step] for number, trial in slots(study).items()
              if number != slot and step in trial.intermediate_values]  # fmt: skip
    everyone = sorted([*others, value], reverse=not minimise)
    last = everyone[(len(everyone) + 1) // 2 - 1]
    return value > last if minimise else value < last


def _sampler(study: optuna.Study, *, slot: int) -> optuna.samplers.BaseSampler:
    # From the seed and the slot alone, so that a sweep that was stopped goes on as if it had not been.
    seed = int(sha256_of_json([study.user_attrs[DEFINITION]["seed"], slot])[:8], 16)
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=STARTUP_TRIALS)


def _stop(number: int, frame: FrameType | None) -> None:
    # While a training runs, Lightning has put a handler of its own above this one: the training ends after its step.
    if signal.getsignal(signal.SIGTERM) is _stop:
        sys.exit(128 + number)
