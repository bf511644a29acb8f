import sqlite3
import time
from pathlib import Path

import pytest
import requests
from mlflow.exceptions import MlflowException

from lexiseg.errors import TrackingError
from lexiseg.tracking import store as store_module
from lexiseg.tracking.store import connect, explain, tracking_errors, tracking_uri


def test_the_database_is_in_the_private_folder_unless_the_user_names_another(tree, tmp_path, monkeypatch):
    assert tracking_uri(tree.root) == f"sqlite:///{tree.root}/.lexiseg/mlflow.db"
    monkeypatch.setenv("LEXISEG_HOME", str(tmp_path / "home"))
    assert tracking_uri(tree.root) == f"sqlite:///{tmp_path}/home/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    assert tracking_uri(tree.root) == "https://mlflow.example.org"


def test_an_experiment_of_a_copy_uses_the_store_of_the_main_checkout(tree):
    copy = tree.root / ".dvc/tmp/exps/tmp1"
    copy.mkdir(parents=True)
    assert tracking_uri(copy) == tracking_uri(tree.root)


@pytest.mark.parametrize(
    ("error", "allowed", "fix"),
    [
        (sqlite3.OperationalError("database is locked"), "no other program is writing", "let the other program end"),
        (sqlite3.OperationalError("attempt to write a readonly database"), "you may write", "right to write"),
        (sqlite3.OperationalError("unable to open database file"), "you may write", "MLFLOW_TRACKING_URI"),
        (sqlite3.DatabaseError("file is not a database"), "a whole database", "delete .lexiseg/mlflow.db"),
        (sqlite3.DatabaseError("database disk image is malformed"), "a whole database", "writes them anew"),
        (MlflowException("Detected out-of-date database schema (found"), "installed MLflow", "mlflow db upgrade"),
        (OSError(28, "No space left on device"), "room for", "lexiseg clean"),
        (FileNotFoundError(2, "No such file or directory"), "stay in place", "let the running `dvc repro` end"),
        (MlflowException("failed with error code 401 != 200"), "lets in", "MLFLOW_TRACKING_USERNAME"),
        (MlflowException("error code 403 != 200. Response body: 'Permission denied'"), "may do this", "(EDIT)"),
        (requests.HTTPError("403 Client Error: Forbidden. Response text: Permission denied"), "may do", "(EDIT)"),
        (MlflowException("error code 403: Invalid Host header - possible DNS"), "listens to", "--allowed-hosts"),
        (PermissionError(13, "Permission denied"), "you may write", "right to write"),
        (MlflowException("something else"), "answers", "start the server"),
    ],
)
def test_troubles_of_mlflow_are_explained(error, allowed, fix):
    with pytest.raises(TrackingError) as caught, tracking_errors("sqlite:////here/mlflow.db"):
        raise error
    assert "MLflow at sqlite:////here/mlflow.db: " in caught.value.found
    assert allowed in caught.value.allowed
    assert fix in caught.value.fix
    assert "results are safe in outputs/" in caught.value.fix
    assert "`lexiseg sync`" in caught.value.fix


def test_only_the_first_line_and_no_password():
    error = explain(MlflowException("first line\nstack trace"), "postgresql://me:secret@host/db")
    assert error.found == "MLflow at postgresql://host/db: first line"


def test_errors_of_our_own_pass_through():
    ours = TrackingError(found="a", allowed="b", fix="c")
    with pytest.raises(TrackingError) as caught, tracking_errors("x"):
        raise ours
    assert caught.value is ours
    with pytest.raises(ZeroDivisionError), tracking_errors("x"):
        _ = 1 / 0


def test_a_damaged_database_is_said_at_once(tree):
    (tree.root / ".lexiseg/mlflow.db").write_bytes(b"no database at all" * 100)
    start = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        connect(tree.root)
    assert time.monotonic() - start < 60  # MLflow alone would try for many minutes
    assert "not a database" in caught.value.found


def test_a_database_that_cannot_be_opened(tree):
    path = tree.root / ".lexiseg/mlflow.db"
    path.unlink()
    path.mkdir()
    with pytest.raises(TrackingError) as caught:
        connect(tree.root)
    assert "that you may write" in caught.value.allowed


def test_a_server_in_trouble(tree, monkeypatch):
    class Answer:
        status_code, reason = 503, "Service Unavailable"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example.org")
    monkeypatch.setattr(store_module.requests, "get", lambda *_arguments, **_values: Answer)
    with pytest.raises(TrackingError) as caught:
        connect(tree.root)
    assert "503 Service Unavailable" in caught.value.found


def test_a_kind_of_store_that_mlflow_refuses(tree, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tree.root}/mlruns")
    with pytest.raises(TrackingError) as caught:
        connect(tree.root)
    assert "results are safe" in caught.value.fix


def test_a_moved_checkout_does_not_write_into_the_old_place(tree):
    connect(tree.root).experiment("lexiseg-tiny")
    moved = tree.root.with_name("moved")
    tree.root.rename(moved)
    with pytest.raises(TrackingError) as caught:
        connect(moved).experiment("lexiseg-tiny")
    assert "my tree" in caught.value.found
    assert str(moved / ".lexiseg/artifacts/lexiseg-tiny") in caught.value.allowed
    assert "delete .lexiseg/mlflow.db" in caught.value.fix


def test_an_experiment_is_made_once(tree, monkeypatch):
    store = connect(tree.root)
    first = store.experiment("lexiseg-tiny")
    assert store.experiment("lexiseg-tiny") == first
    # Somebody else creates it between our look and our try.
    looks = iter([None])
    real = store.client.get_experiment_by_name
    monkeypatch.setattr(store.client, "get_experiment_by_name", lambda name: next(looks, real(name)))
    assert store.experiment("lexiseg-tiny") == first


def test_the_artifacts_are_where_the_store_is(tree, monkeypatch):
    assert connect(tree.root).artifacts == tree.root / ".lexiseg/artifacts"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(tree.root))
    assert connect(tree.root).artifacts is None
    assert Path(tree.root / ".lexiseg/mlflow.db").is_file()
