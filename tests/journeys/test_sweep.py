"""Sweeps as their users have them: from the command line, stopped, killed and resumed, on one storage from two sides."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from helpers.postgres import Postgres
from helpers.working_tree import environment, run
from mlflow import MlflowClient
from optuna.trial import TrialState

from lexiseg.settings import read_yaml

# A trial of seconds: long enough to be killed in.
LONGER = ["--set", "tcl.train.steps=150", "--set", "tcl.train.batch=8"]
SPACE = ["--space", "tcl.loss.area", "--space", "tcl.model.temperature"]


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.remove()


def start(root: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Start `lexiseg sweep`, in a process group of its own as a terminal does."""
    return subprocess.Popen(
        [sys.executable, "-m", "lexiseg", "sweep", *arguments],
        cwd=root,
        env=environment(root) | {"LEXISEG_CHECKPOINT_SECONDS": "0", **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_for(what: Callable[[], Any], *, seconds: float = 240.0) -> Any:
    """What a condition gives, as soon as it gives something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not come about in time")


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children(recursive=True)
    return [child for child in found if "work" in child.cmdline() and "sweep" in child.cmdline()]


def in_training(root: Path, study: str) -> list[Path]:
    """Checkpoints of trials that are at work."""
    return list((root / ".lexiseg/work").glob("tcl-train-*/checkpoints/*.ckpt"))


def children(root: Path) -> list[Any]:
    client = MlflowClient(tracking_uri=f"sqlite:///{root / '.lexiseg/mlflow.db'}")
    experiments = [found.experiment_id for found in client.search_experiments() if found.name.endswith("-sweeps")]
    runs = client.search_runs(experiments)
    return [found for found in runs if "mlflow.parentRunId" in found.data.tags]


def parents(root: Path) -> list[Any]:
    client = MlflowClient(tracking_uri=f"sqlite:///{root / '.lexiseg/mlflow.db'}")
    experiments = [found.experiment_id for found in client.search_experiments() if found.name.endswith("-sweeps")]
    return [found for found in client.search_runs(experiments) if "mlflow.parentRunId" not in found.data.tags]


def test_two_sides_a_killed_worker_and_a_database_that_restarts(micro_tree, postgres):
    count = 8
    arguments = ["tcl", *SPACE, *LONGER, "--trials", str(count), "--study", "shared"]
    sides = [start(micro_tree, *arguments, LEXISEG_STORAGE=postgres.url) for _ in range(2)]
    wait_for(lambda: all(workers_of(side) for side in sides))
    wait_for(lambda: in_training(micro_tree, "shared"))
    storage = optuna.storages.RDBStorage(postgres.url)
    study = optuna.load_study(study_name="shared", storage=storage)
    victim = workers_of(sides[0])[0]
    name = victim.cmdline()[victim.cmdline().index("--name") + 1]

    def running() -> list[Any]:
        trials = study.get_trials(states=(TrialState.RUNNING,))
        return [trial for trial in trials if trial.user_attrs.get("worker") == name]

    (killed,) = wait_for(running)
    victim.kill()
    wait_for(lambda: any(trial.user_attrs["slot"] == killed.user_attrs["slot"] for trial in study.get_trials()
                         if trial.number > killed.number))  # fmt: skip
    wait_for(lambda: study.get_trials(states=(TrialState.RUNNING,)))
    postgres.stop()
    time.sleep(2)  # the sides meet a storage that is away
    postgres.start()
    texts = [side.communicate(timeout=600)[0] for side in sides]
    assert [side.returncode for side in sides] == [0, 0], "\n".join(texts)
    study = optuna.load_study(study_name="shared", storage=optuna.storages.RDBStorage(postgres.url))
    ended = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
    assert sorted(trial.user_attrs["slot"] for trial in ended) == list(range(count))
    again = [trial for trial in ended if trial.user_attrs["slot"] == killed.user_attrs["slot"]]
    assert [trial.params for trial in again] == [killed.params]
    assert "its trial starts again" in texts[0]
    slots = sorted(int(run.data.tags["lexiseg.trial"].rpartition("/")[2]) for run in children(micro_tree))
    assert slots == list(range(count))
    assert len(parents(micro_tree)) == 1
    # What happened leaves no trace in what was found: a sweep that nobody disturbed has the same first trial.
    first = next(trial for trial in ended if trial.user_attrs["slot"] == 0)
    values = read_yaml(micro_tree / "params.yaml")["tcl"]
    assert first.params == {
        "tcl.loss.area": values["loss"]["area"],
        "tcl.model.temperature": values["model"]["temperature"],
    }
