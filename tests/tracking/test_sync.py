import contextlib
import logging
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import ViewType

import lexiseg
from lexiseg.errors import TrackingError
from lexiseg.pipeline import read_lock
from lexiseg.storage import hash_tree, write_json, write_text
from lexiseg.tracking import store as store_module
from lexiseg.tracking.publish import FINGERPRINT, PUBLISHED
from lexiseg.tracking.store import connect
from lexiseg.tracking.sync import sync


def artifacts(client, run_id, folder=None):
    found = {}
    for info in client.list_artifacts(run_id, folder):
        found |= artifacts(client, run_id, info.path) if info.is_dir else {info.path: info.file_size}
    return found


def data_sets(run):
    return run.inputs.dataset_inputs if run.inputs else []


def state(root):
    """Everything that MLflow holds, by fingerprint, without ids and times."""
    client = connect(root).client
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], run_view_type=ViewType.ALL)
    held: dict[str, Any] = {"runs": Counter(run.data.tags[FINGERPRINT] for run in runs)}
    for run in runs:
        histories = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        files = artifacts(client, run.info.run_id)
        held[run.data.tags[FINGERPRINT]] = {
            "status": run.info.status,
            "tags": run.data.tags,
            "params": run.data.params,
            "metrics": {key: [(point.step, point.value) for point in points] for key, points in histories.items()},
            # The model's files carry ids and times; that they are whole is what loading them shows.
            "files": {path: size for path, size in files.items() if not path.startswith("models/")},
            "model files": sorted(path for path in files if path.startswith("models/")),
            "data": [data.dataset.name for data in data_sets(run)],
        }
    for model in client.search_registered_models():
        versions = client.search_model_versions(f"name = '{model.name}'")
        held[model.name] = [(item.version, item.tags) for item in versions], model.aliases, model.tags
    return held


def test_everything_arrives(tree):
    done = sync(tree.root)
    assert [(item.kind, item.name, item.action) for item in done] == [
        ("run", "baselines/linear", "created"),
        ("run", "lseg", "created"),
        ("model", "lexiseg-lseg", "created"),
    ]
    assert str(done[2]) == "created model lexiseg-lseg (1)"
    client = connect(tree.root).client
    run = client.get_run(done[1].id)
    assert client.get_experiment(run.info.experiment_id).name == "lexiseg-tiny"
    assert (run.info.run_name, run.info.status) == ("lseg", "FINISHED")
    assert run.data.metrics["test/miou_unseen"] == 0.25
    assert run.data.metrics["encode/test/image_to_text_r1"] == 0.75
    assert run.data.params["lseg.train.scale"] == "[0.5, 2.0]"
    assert run.data.tags["mlflow.source.git.commit"] == run.data.tags["lexiseg.commit"]
    loss = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in loss] == [(0, 1.0), (1, 0.5), (2, 0.333333)]
    files = artifacts(client, run.info.run_id)
    assert {"evaluate/pictures/test_0.png", "evaluate/tables/test_per_class.csv", "train/curve.csv"} <= files.keys()
    (data,) = data_sets(run)
    assert (data.dataset.name, data.dataset.digest) == ("tiny", run.data.tags["lexiseg.data_version"])
    version = client.get_model_version_by_alias("lexiseg-lseg", "challenger")
    assert version.run_id == run.info.run_id
    assert version.tags["lexiseg.licence.data"] == "CC0-1.0"
    assert "lexiseg.licence.text" not in version.tags
    assert version.tags["lexiseg.protocol_hash"] == "a" * 64


def test_a_second_sync_finds_nothing_to_do(tree, monkeypatch):
    sync(tree.root)
    before = state(tree.root)

    def refuse(*_arguments, **_values):
        raise AssertionError("written a second time")

    for name in ("create_run", "log_batch", "log_artifact", "log_artifacts", "set_tag", "create_model_version"):
        monkeypatch.setattr(MlflowClient, name, refuse)
    assert sync(tree.root) == []
    monkeypatch.undo()
    assert state(tree.root) == before


@pytest.mark.parametrize("lost", [["mlflow.db"], ["mlflow.db", "artifacts"]])
def test_a_deleted_store_comes_back_once(tree, lost):
    sync(tree.root)
    before = state(tree.root)
    for name in lost:
        path = tree.root / ".lexiseg" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    # In one process MLflow would go on with the deleted file; a new address stands for the new process.
    (tree.root / ".lexiseg").rename(tree.root / "gone")
    moved = tree.root.with_name("again")
    tree.root.rename(moved)
    assert len(sync(moved)) == 3
    assert sync(moved) == []
    assert state(moved) == before
    assert set(before["runs"].values()) == {1}


@pytest.fixture(scope="module")
def complete(finished_tree, tmp_path_factory):
    """What MLflow holds after a sync that nothing disturbed."""
    root = tmp_path_factory.mktemp("complete") / "tree"
    shutil.copytree(finished_tree, root)
    sync(root)
    return state(root)


WRITES = ["create_run", "log_batch", "log_artifact", "log_inputs", "set_terminated", "set_tag", "log_artifacts"]
WRITES += ["create_registered_model", "create_model_version", "set_registered_model_alias"]


def test_a_sync_killed_after_every_single_step_is_completed(tree, complete, monkeypatch):
    kills = Counter()

    def killing(name, original):
        def write(self, *arguments, **values):
            original(self, *arguments, **values)
            # These two are repeated as a whole, so dying there each time would never end.
            if name not in ("log_artifacts", "set_terminated") or not kills[name]:
                kills[name] += 1
                raise KeyboardInterrupt

        return write

    for name in WRITES:
        monkeypatch.setattr(MlflowClient, name, killing(name, getattr(MlflowClient, name)))
    for _attempt in range(60):
        with contextlib.suppress(KeyboardInterrupt):
            assert sync(tree.root) == []  # everything was written by those that died
            break
    assert set(kills) == set(WRITES)
    assert state(tree.root) == complete


def test_a_file_that_was_cut_off_is_written_again(tree, complete, monkeypatch):
    monkeypatch.setattr(MlflowClient, "set_terminated", lambda *_arguments, **_values: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sync(tree.root)
    monkeypatch.undo()
    table = next((tree.root / ".lexiseg/artifacts").rglob("test_per_class.csv"))
    table.write_text("class,")
    assert {item.action for item in sync(tree.root) if item.kind == "run"} == {"created", "completed"}
    assert state(tree.root) == complete


def test_a_finished_run_gets_what_was_made_later(tree):
    lock = (tree.root / "dvc.lock").read_text()
    write_text(tree.root / "dvc.lock", lock.replace("encode-evaluate:", "not-yet:"))
    first = sync(tree.root)
    write_text(tree.root / "dvc.lock", lock)
    later = sync(tree.root)
    assert [(item.id, item.action) for item in later] == [(item.id, "completed") for item in first[:2]]
    run = connect(tree.root).client.get_run(first[1].id)
    assert run.data.metrics["encode/test/image_to_text_r1"] == 0.75
    assert sync(tree.root) == []
    # Taken away again, nothing is lost and nothing is said.
    write_text(tree.root / "dvc.lock", lock.replace("encode-evaluate:", "not-yet:"))
    assert sync(tree.root) == []


def test_another_protocol_is_another_run(tree):
    first = sync(tree.root)
    tree.metrics("lseg", protocol="b" * 64)
    write_text(tree.root / "src/lexiseg/evaluation/code.py", "# another card\n")
    tree.ran("lseg-evaluate")
    second = sync(tree.root)
    assert [(item.kind, item.name) for item in second] == [("run", "lseg")]  # register has not run again yet
    client = connect(tree.root).client
    hashes = [client.get_run(id).data.tags["lexiseg.protocol_hash"][0] for id in (first[1].id, second[0].id)]
    assert hashes == ["a", "b"]


def test_a_model_is_a_version_once_per_content(tree):
    first = sync(tree.root)
    write_text(tree.root / "outputs/lseg/register/model.safetensors", "other weights")
    tree.ran()
    second = sync(tree.root)
    assert [(item.kind, item.id) for item in second] == [("model", "2")]  # numbers and settings are the same
    tree.model()
    tree.ran()
    third = sync(tree.root)
    assert [(item.kind, item.name, item.id) for item in third] == [("alias", "lexiseg-lseg@challenger", "1")]
    client = connect(tree.root).client
    paths = [client.get_model_version_download_uri("lexiseg-lseg", number) for number in ("1", "2")]
    assert len(set(paths)) == 2
    assert all(first[1].id in path for path in paths)


def test_an_experiment_in_the_bin_is_taken_out_again(tree):
    done = sync(tree.root)
    client = connect(tree.root).client
    client.delete_experiment(client.get_run(done[0].id).info.experiment_id)
    assert sync(tree.root) == []
    assert client.get_run(done[0].id).info.lifecycle_stage == "active"


SCRIPT = """
import sys
from pathlib import Path
from lexiseg.tracking.sync import sync
import mlflow.telemetry
assert mlflow.telemetry.get_telemetry_client() is None, "telemetry is on"
for item in sync(Path(sys.argv[1])):
    print(item.kind, item.name)
"""


def test_two_syncs_at_once_publish_once(tree, complete, monkeypatch):
    for name in ("PYTEST_CURRENT_TEST", "CI", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(lexiseg.__file__).parents[1]))
    command = [sys.executable, "-c", SCRIPT, str(tree.root)]
    both = [subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    lines = sorted(line for out, _ in answers for line in out.splitlines())
    assert lines == ["model lexiseg-lseg", "run baselines/linear", "run lseg"]
    assert state(tree.root) == complete


def test_waiting_for_another_sync_is_said(tree, capsys):
    said, published = "", []
    with FileLock(str(tree.root / ".lexiseg/sync.lock")):
        waiting = threading.Thread(target=lambda: published.extend(sync(tree.root)))
        waiting.start()
        while "another sync is going on, waiting for it" not in said:  # pytest-timeout ends a wait that is in vain
            said += capsys.readouterr().err
            time.sleep(0.01)
        assert published == []
    waiting.join()
    assert len(published) == 3


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_server_that_is_down(tree, monkeypatch):
    outputs = hash_tree(tree.root / "outputs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{free_port()}")
    start = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        sync(tree.root)
    assert time.monotonic() - start < 60  # MLflow alone would try for many minutes
    assert "http://127.0.0.1:" in caught.value.found
    assert "secret" not in str(caught.value)
    assert "answers" in caught.value.allowed
    assert "results are safe in outputs/" in caught.value.fix
    assert "`lexiseg sync`" in caught.value.fix
    assert hash_tree(tree.root / "outputs") == outputs
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert len(sync(tree.root)) == 3


def test_a_locked_database(tree, monkeypatch):
    monkeypatch.setattr(store_module, "LOCK_SECONDS", 0.1)
    outputs = hash_tree(tree.root / "outputs")
    other = sqlite3.connect(tree.root / ".lexiseg/mlflow.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(TrackingError) as caught:
        sync(tree.root)
    assert "database is locked" in caught.value.found
    assert "no other program is writing" in caught.value.allowed
    assert "results are safe in outputs/" in caught.value.fix
    assert hash_tree(tree.root / "outputs") == outputs
    other.execute("ROLLBACK")
    other.close()
    assert len(sync(tree.root)) == 3


def test_many_parameters_and_points_fit_the_limits_of_a_request(tree):
    tree.model(steps=1500)
    lock = read_lock(tree.root)
    lock["lseg-train"]["params"]["params.yaml"]["lseg.train"] |= {f"key{number}": number for number in range(150)}
    write_json(tree.root / "dvc.lock", {"schema": "2.0", "stages": lock})  # JSON is YAML
    tree.ran("lseg-train", "lseg-predict", "lseg-evaluate")
    run_id = sync(tree.root)[1].id
    client = connect(tree.root).client
    assert len(client.get_metric_history(run_id, "train/loss")) == 1500
    assert client.get_run(run_id).data.params["lseg.train.key149"] == "149"
    assert PUBLISHED in client.get_run(run_id).data.tags


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.WARNING)
