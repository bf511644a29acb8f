"""Sweeps as their users have them: from the command line, stopped, killed, resumed, and from two sides at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from helpers.postgres import Postgres
from helpers.working_tree import copy_of, environment, run
from mlflow import MlflowClient
from optuna.trial import TrialState

from lexiseg.errors import LexisegError, SettingsError
from lexiseg.settings import override, read_yaml
from lexiseg.sweeps.sweep import Request, prepare, sweep

# A trial of seconds: long enough to be killed in.
LONGER = ["--set", "tcl.train.steps=100", "--set", "tcl.train.batch=8"]
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
        # A shell that starts the tests in the background has them ignore Ctrl+C, and what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def ray_folder() -> str:
    """A short path: sockets lie in it, whose names have a limit."""
    return tempfile.mkdtemp(prefix="ray-", dir="/tmp")


def wait_for(what: Callable[[], Any], *, seconds: float = 240.0) -> Any:
    """What a condition gives, as soon as it gives something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not come about in time")


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    with suppress(psutil.Error):  # one may end while it is looked at
        for child in psutil.Process(process.pid).children(recursive=True):
            if {"sweep", "work"} <= set(child.cmdline()):
                found.append(child)
    return found


def in_training(root: Path) -> list[Path]:
    """Checkpoints of trials that are at work."""
    return list((root / ".lexiseg/work").glob("tcl-train-*/checkpoints/*.ckpt"))


def store_of(root: Path) -> str:
    return f"sqlite:///{root / '.lexiseg/mlflow.db'}"


def children(uri: str) -> list[Any]:
    client = MlflowClient(tracking_uri=uri)
    experiments = [found.experiment_id for found in client.search_experiments() if found.name.endswith("-sweeps")]
    runs = client.search_runs(experiments)
    return [found for found in runs if "mlflow.parentRunId" in found.data.tags]


def parents(uri: str) -> list[Any]:
    client = MlflowClient(tracking_uri=uri)
    experiments = [found.experiment_id for found in client.search_experiments() if found.name.endswith("-sweeps")]
    return [found for found in client.search_runs(experiments) if "mlflow.parentRunId" not in found.data.tags]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, _finished_tree: Path) -> Path:
    """A working tree with a finished sweep of TCL's inference."""
    root = copy_of(_finished_tree, tmp_path_factory.mktemp("searched") / "lexiseg")
    done = run(root, "lexiseg", "sweep", "tcl", "--space", "inference", "--trials", "6")
    assert "saved predictions are scored again; no network is run" in done.stdout
    assert "per trial tcl-evaluate" in done.stdout
    assert "6 complete" in done.stdout
    return root


def test_saved_predictions_are_scored_again(searched):
    logs = "".join(path.read_text() for path in (searched / ".lexiseg/sweeps/tcl-inference").glob("*.log"))
    # Once for the split that is searched on; outputs/ has that of the others.
    assert len(re.findall(r"predict val: +0%", logs)) == 1
    assert len(re.findall(r"evaluate val: +0%", logs)) == 6
    assert "train TCL" not in logs
    assert not run(searched, "git", "status", "--porcelain", "params.yaml", "dvc.lock").stdout


def test_a_study_is_shown(searched):
    text = run(searched, "lexiseg", "sweep", "show", "tcl-inference").stdout
    assert "tcl on val, space inference, miou as high as possible" in text
    assert len(re.findall(r"^\d+ {2,}complete", text, flags=re.MULTILINE)) == 6
    assert len(re.findall(r"complete \*", text)) == 1
    found = json.loads(run(searched, "lexiseg", "sweep", "show", "tcl-inference", "--json").stdout)
    best = [trial for trial in found["trials"] if trial["best"]]
    assert [trial["values"][0] for trial in best] == [max(trial["values"][0] for trial in found["trials"])]
    assert run(searched, "lexiseg", "sweep", "show").stdout == "tcl-inference: 6 complete\n"


def test_mlflow_shows_a_parent_with_a_child_per_trial(searched):
    (parent,) = parents(store_of(searched))
    assert parent.data.tags["lexiseg.method"] == "tcl"
    assert parent.data.params["space/tcl.refine.pamr_iterations"] == "0..10"
    assert parent.data.metrics["trials_complete"] == 6
    runs = children(store_of(searched))
    assert {found.data.tags["mlflow.parentRunId"] for found in runs} == {parent.info.run_id}
    assert [found.info.status for found in runs] == ["FINISHED"] * 6
    found = json.loads(run(searched, "lexiseg", "sweep", "show", "tcl-inference", "--json").stdout)
    values = sorted(trial["metrics"]["miou"] for trial in found["trials"])
    assert sorted(child.data.metrics["val/miou"] for child in runs) == values
    assert parent.data.metrics["best/val/miou"] == values[-1]
    assert all(
        set(child.data.params) == {"tcl.refine.pamr_iterations", "tcl.refine.knowledge_weight"} for child in runs
    )
    client = MlflowClient(tracking_uri=store_of(searched))
    names = {Path(item.path).name for item in client.list_artifacts(parent.info.run_id, "pictures")}
    assert {"history.png", "importance.png", "slice.png", "parallel_coordinate.png", "contour.png"} <= names


def test_mlflow_can_be_written_anew(searched, tmp_path):
    root = copy_of(searched, tmp_path / "lexiseg")
    for name in ("mlflow.db", "artifacts"):
        path = root / ".lexiseg" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "created run tcl-inference 3" in run(root, "lexiseg", "sync").stdout
    assert len(children(store_of(root))) == 6
    assert run(root, "lexiseg", "sync").stdout == "nothing new to publish\n"


def test_a_study_goes_on_with_more_trials(searched, tmp_path):
    root = copy_of(searched, tmp_path / "lexiseg")
    done = run(root, "lexiseg", "sweep", "tcl", "--space", "inference", "--trials", "7").stdout
    assert "study tcl-inference: 6 of 7 trials are there" in done
    assert "7 complete" in done
    again = run(root, "lexiseg", "sweep", "tcl", "--space", "inference", "--trials", "7").stdout
    assert "study tcl-inference: 7 of 7 trials are there" in again


def test_the_best_trial_is_applied_and_reproduced_bit_by_bit(searched, tmp_path):
    root = copy_of(searched, tmp_path / "lexiseg")
    found = json.loads(run(root, "lexiseg", "sweep", "show", "tcl-inference", "--json").stdout)
    (best,) = [trial for trial in found["trials"] if trial["best"]]
    before, comments = read_yaml(root / "params.yaml"), comments_in(root / "params.yaml")
    text = run(root, "lexiseg", "sweep", "apply", "tcl-inference").stdout
    assert "note" not in text
    splits = ["val", *before["evaluate"]["splits"]]
    expected = override(before, {**best["settings"], "evaluate.splits": splits})
    assert read_yaml(root / "params.yaml") == expected
    assert expected["evaluate"]["splits"] != before["evaluate"]["splits"]
    assert comments_in(root / "params.yaml") == comments
    shutil.rmtree(root / ".lexiseg/work")  # nothing is there to be linked
    run(root, "dvc", "repro", "--quiet", "tcl-evaluate")
    metrics = json.loads((root / "outputs/tcl/evaluate/metrics.json").read_text())["splits"]
    assert set(metrics) == {"val", "test", "stress"}
    assert metrics["val"] == best["metrics"]
    assert "params.yaml has these values already" in run(root, "lexiseg", "sweep", "apply", "tcl-inference").stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("lseg", ["--space", "training"]),
        ("lseg", ["--space", "blocks"]),
        ("stego", ["--space", "shifts"]),
        ("stego", ["--space", "inference"]),
        ("tcl", ["--space", "priors"]),
        ("tcl", ["--space", "encode.pretrain.lr"]),
    ],
)
def test_spaces_of_all_methods(micro_tree, method, more):
    text = run(micro_tree, "lexiseg", "sweep", method, *more, "--trials", "2", "--no-prune").stdout
    assert "2 complete" in text


def test_costs_are_measured_of_the_registered_model(micro_tree):
    more = ["--objective", "miou", "--objective", "latency", "--constraint", "memory<=100"]
    run(micro_tree, "lexiseg", "sweep", "tcl", "--space", "inference", "--trials", "2", *more)
    found = json.loads(run(micro_tree, "lexiseg", "sweep", "show", "tcl-inference", "--json").stdout)
    for trial in found["trials"]:
        assert trial["values"] == [trial["metrics"]["miou"], trial["metrics"]["latency"]]
        assert trial["metrics"]["latency"] > 0
        assert trial["metrics"]["memory"] > 200  # MB, of a process with torch
        assert trial["constraints"]["memory<=100"] == pytest.approx(trial["metrics"]["memory"] - 100)
    assert not any(trial["best"] for trial in found["trials"])
    assert (micro_tree / ".lexiseg/sweeps/tcl-inference/front.png").is_file()


def test_on_a_ray_cluster_the_trials_are_the_same(searched, tmp_path):
    root = copy_of(searched, tmp_path / "lexiseg")
    found = json.loads(run(root, "lexiseg", "sweep", "show", "tcl-inference", "--json").stdout)
    alone = {trial["trial"]: trial for trial in found["trials"][:4]}
    (root / ".lexiseg/sweeps.db").unlink()
    shutil.rmtree(root / ".lexiseg/work")
    for log in (root / ".lexiseg/sweeps/tcl-inference").glob("*.log"):
        log.unlink()
    arguments = ["tcl", "--space", "inference", "--trials", "4", "--workers", "4"]
    process = start(root, *arguments, LEXISEG_RAY="local", RAY_TMPDIR=ray_folder())
    text = process.communicate(timeout=280)[0]
    assert process.returncode == 0, text
    found = json.loads(run(root, "lexiseg", "sweep", "show", "tcl-inference", "--json").stdout)
    for trial in found["trials"]:
        assert trial["settings"] == alone[trial["trial"]]["settings"]
        assert trial["metrics"] == alone[trial["trial"]]["metrics"]
    assert len(list((root / ".lexiseg/sweeps/tcl-inference").glob("*.log"))) == 4


def comments_in(path: Path) -> list[str]:
    return [line.partition("#")[2] for line in path.read_text(encoding="utf-8").splitlines()]


def test_optunas_pages_show_the_same_study(searched):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = ["optuna-dashboard", "sqlite:///.lexiseg/sweeps.db", "--host", "127.0.0.1", "--port", port]
    server = subprocess.Popen(command, cwd=searched, env=environment(searched), stdout=subprocess.DEVNULL)

    def answer() -> Any:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=5) as reply:
                return json.load(reply)
        except OSError:
            return None

    try:
        studies = wait_for(answer, seconds=60)["study_summaries"]
    finally:
        server.terminate()
        server.wait()
    assert [study["study_name"] for study in studies] == ["tcl-inference"]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"method": "lseg", "space": []}, "method: tcl there, lseg here"),
        ({"split": "test"}, "split: val there, test here"),
        ({"fixed": ["seed=1"]}, "seed 0 -> 1"),
    ],
)
def test_a_study_of_other_settings_is_refused(searched, asked, found, monkeypatch):
    monkeypatch.chdir(searched)
    monkeypatch.delenv("LEXISEG_HOME", raising=False)
    request = Request(**{"method": "tcl", "space": ["inference"], "study": "tcl-inference", **asked})
    with pytest.raises(SettingsError) as error:
        sweep(searched, request, prepare(searched, request))
    assert "the study `tcl-inference` is another one" in error.value.found
    assert found in error.value.found


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"method": "unet"}, "no sweep of `unet`"),
        ({"space": ["stego.loss.knn"]}, "`stego.loss.knn` enter(s) no stage that tcl-evaluate needs"),
        ({"space": ["tcl.refine.background_threshold"]}, "the protocol world has no background"),
        ({"space": ["tcl.loss.area=-1..1"]}, "`tcl.loss.area`: -1"),
        ({"space": ["tcl.loss.area=1..0"]}, "an empty range"),
        ({"space": ["tcl.train.text=noun|nouns"]}, '`tcl.train.text`: "nouns"'),
        ({"split": "nothing"}, "no split `nothing`"),
        ({"trials": 0}, "--trials 0"),
        ({"workers": 0}, "--workers 0"),
        ({"objectives": [":max"]}, "--objective :max"),
        ({"constraints": ["latency=5"]}, "--constraint latency=5"),
        ({"fixed": ["data.name=other"]}, "a trial changes `data.name`"),
    ],
)
def test_what_is_refused_before_anything_runs(searched, asked, found, monkeypatch):
    monkeypatch.chdir(searched)
    with pytest.raises(LexisegError) as error:
        prepare(searched, Request(**{"method": "tcl", "space": ["inference"], **asked}))
    assert found in str(error.value)


def test_refusals_come_as_three_lines(searched):
    process = start(searched, "tcl", "--storage", "postgresql://x:y@127.0.0.1:1/z")
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 1, text
    assert "error (StorageError)\nfound: the storage postgresql://x:***@127.0.0.1:1/z cannot be used" in text
    assert "Traceback" not in text


def test_ctrl_c_ends_a_sweep_that_then_goes_on(micro_tree):
    arguments = ["tcl", *SPACE, *LONGER, "--trials", "2", "--no-prune"]
    first = start(micro_tree, *arguments)
    wait_for(lambda: in_training(micro_tree))
    os.killpg(first.pid, signal.SIGINT)
    text = first.communicate(timeout=120)[0]
    assert first.returncode != 0
    assert "the same command goes on" in text
    assert "Traceback" not in text
    assert in_training(micro_tree)  # its checkpoint stays
    study = optuna.load_study(study_name="tcl-custom", storage=f"sqlite:///{micro_tree / '.lexiseg/sweeps.db'}")
    assert len(study.get_trials(states=(TrialState.WAITING,))) == 2
    assert not study.get_trials(states=(TrialState.RUNNING,))
    second = start(micro_tree, *arguments)
    text = second.communicate(timeout=240)[0]
    assert second.returncode == 0, text
    assert "2 complete" in text
    logs = "".join(path.read_text() for path in (micro_tree / ".lexiseg/sweeps/tcl-custom").glob("*.log"))
    assert "going on after step" in logs
    assert not in_training(micro_tree)


def test_two_machines_a_killed_worker_and_a_database_that_restarts(micro_tree, postgres, tmp_path):
    """Two checkouts that have nothing in common but the database of the studies, and MLflow's."""
    count, trees = 8, [micro_tree, copy_of(micro_tree, tmp_path / "other" / "lexiseg")]
    tracking = f"sqlite:///{tmp_path / 'tracking.db'}"
    MlflowClient(tracking_uri=tracking).search_experiments()  # its tables
    arguments = ["tcl", *SPACE, *LONGER, "--trials", str(count), "--study", "shared"]
    common = {"LEXISEG_STORAGE": postgres.url, "MLFLOW_TRACKING_URI": tracking}
    sides = [start(tree, *arguments, **common) for tree in trees]
    wait_for(lambda: all(workers_of(side) for side in sides))
    storage = optuna.storages.RDBStorage(postgres.url)
    study = wait_for(lambda: named(storage, "shared"))
    victim = workers_of(sides[0])[0]
    name = victim.cmdline()[victim.cmdline().index("--name") + 1]

    def running() -> list[Any]:
        trials = study.get_trials(states=(TrialState.RUNNING,))
        return [trial for trial in trials if trial.user_attrs.get("worker") == name and trial.params]

    (killed,) = wait_for(running)
    wait_for(lambda: in_training(micro_tree))
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
    slots = sorted(int(run.data.tags["lexiseg.trial"].rpartition("/")[2]) for run in children(tracking))
    assert slots == list(range(count))
    assert len(parents(tracking)) == 1
    values = read_yaml(micro_tree / "params.yaml")["tcl"]
    first = next(trial for trial in ended if trial.user_attrs["slot"] == 0)
    assert first.params == {
        "tcl.loss.area": values["loss"]["area"],
        "tcl.model.temperature": values["model"]["temperature"],
    }


def named(storage: Any, name: str) -> optuna.Study | None:
    """The study of a name once it is defined."""
    if name not in optuna.get_all_study_names(storage):
        return None
    study = optuna.load_study(study_name=name, storage=storage)
    return study if "lexiseg" in study.user_attrs else None
