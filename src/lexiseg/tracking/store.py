"""Where MLflow is, and its troubles in words that help."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from mlflow import MlflowClient
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from lexiseg.errors import LexisegError, TrackingError
from lexiseg.workspace import private_folder

DATABASE, ARTIFACTS = "mlflow.db", "artifacts"
CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 10.0
LOCK_SECONDS = 5.0
SQLITE = "sqlite:///"
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's pages then open with runs, not with chats
_TALKATIVE = "mlflow.store.db.utils"

_SAFE = "results are safe in outputs/, `lexiseg sync` publishes them; "
_REBUILD = (
    f"delete .lexiseg/{DATABASE} and .lexiseg/{ARTIFACTS}, then `lexiseg sync` writes them anew from outputs/ (keep a "
    "copy: what `lexiseg promote` decided is in that database alone)"
)
# What the message says -> what would be right, and what to do.
_CAUSES: tuple[tuple[tuple[str, ...], str, str], ...] = (
    # What a server says comes before what a file system says: both have "permission denied".
    (
        ("invalid host header",),
        "a name that the server listens to",
        "use the name it was started with in MLFLOW_TRACKING_URI, or have yours added to its --allowed-hosts; "
        "then repeat the command",
    ),
    (
        ("error code 401", "unauthorized", "not authenticated"),
        "a user that the server lets in",
        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or the token) as the server's administrator gave "
        "them to you, then repeat the command",
    ),
    (
        ("error code 403", "forbidden", "permission_denied"),
        "a user who may do this",
        "have the server's administrator let your user write into this experiment or model (EDIT), or set "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to a user who may; then repeat the command",
    ),
    (
        ("database is locked", "database table is locked"),
        "a database that no other program is writing",
        "let the other program end (`fuser` names it), then repeat the command",
    ),
    (
        ("readonly database", "unable to open database", "permission denied", "read-only file system"),
        "a database file and folder that you may write",
        "give yourself the right to write, or set MLFLOW_TRACKING_URI to another store; then repeat the command",
    ),
    (
        ("not a database", "malformed", "(sqlite3.operationalerror) table", "no such table", "locate revision"),
        "a whole database of MLflow",
        _REBUILD,
    ),
    (
        ("no such file or directory",),
        "outputs that stay in place while they are published",
        "let the running `dvc repro` end, then repeat the command",
    ),
    (
        ("out-of-date database schema",),
        "a database of the installed MLflow version",
        f"`mlflow db upgrade` with its address (after a backup), then repeat the command; or {_REBUILD}",
    ),
    (
        ("disk is full", "no space left"),
        "room for the database and its artifacts",
        "make room (`lexiseg clean` frees finished work folders), then repeat the command",
    ),
)
_OTHERWISE = (
    "an MLflow store that answers",
    "start the server or correct MLFLOW_TRACKING_URI (without it .lexiseg/mlflow.db is used), then repeat the command",
)


@dataclass(frozen=True)
class Store:
    """A connection to MLflow.

    Attributes:
        uri: tracking store; also the registry, unless MLFLOW_REGISTRY_URI is set.
        client: talks to both. MLflow's global tracking address is left alone.
        artifacts: folder of the artifacts where the store is our own file, or None where the server decides.
    """

    uri: str
    client: MlflowClient
    artifacts: Path | None

    def experiment(self, name: str) -> str:
        """The id of an experiment, created or restored where needed.

        Raises:
            TrackingError: the experiment's artifacts are in a folder that this checkout does not own.
        """
        # As a plain path: parts of MLflow cannot read file:// addresses.
        place = str(self.artifacts / name) if self.artifacts else None
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(name, artifact_location=place, tags=_KIND)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self.client.get_experiment_by_name(name)  # somebody else was quicker
                assert found is not None
        if place and found.artifact_location != place:
            raise TrackingError(
                found=f"{self.uri} keeps its files in {found.artifact_location}",
                allowed=f"{place}, where this checkout keeps them",
                fix=f"was the folder moved or copied? {_REBUILD}",
            )
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def run_with_tag(self, experiment: str, key: str, value: str) -> Any:
        """The oldest run that carries a tag, or None."""
        runs = self.client.search_runs(
            [experiment],
            filter_string=f"tags.`{key}` = '{value}'",
            run_view_type=ViewType.ACTIVE_ONLY,
            order_by=["attributes.start_time ASC"],
            max_results=1,
        )
        return runs[0] if runs else None


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, or the database in the private folder of the main checkout."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{private_folder(root).resolve() / DATABASE}"


def connect(root: Path) -> Store:
    """Connect to MLflow.

    Raises:
        TrackingError: no server answers there, or the database cannot be written. It says so within seconds.
    """
    uri = tracking_uri(root)
    # MLflow tells of every step, and prints stack traces of what becomes a TrackingError here.
    for name, level in (("mlflow", logging.WARNING), ("alembic", logging.WARNING), (_TALKATIVE, logging.CRITICAL)):
        logging.getLogger(name).setLevel(level)
    with tracking_errors(uri):
        _probe(uri)
        client = MlflowClient(tracking_uri=uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri)
        client.search_experiments(max_results=1)
    own = private_folder(root).resolve() / ARTIFACTS
    return Store(uri=uri, client=client, artifacts=None if os.environ.get("MLFLOW_TRACKING_URI") else own)


@contextmanager
def tracking_errors(uri: str) -> Iterator[None]:
    """Turn whatever goes wrong with MLflow into a TrackingError."""
    try:
        yield
    except LexisegError:
        raise
    except (MlflowException, SQLAlchemyError, sqlite3.Error, requests.RequestException, OSError) as error:
        raise explain(error, uri) from error


def explain(error: Exception, uri: str) -> TrackingError:
    """The three parts of an error that MLflow, its database or the network gave."""
    said = str(error)
    allowed, fix = next(
        ((allowed, fix) for words, allowed, fix in _CAUSES if any(word in said.lower() for word in words)), _OTHERWISE
    )
    first = next((line.strip() for line in said.splitlines() if line.strip()), type(error).__name__)
    return TrackingError(found=f"MLflow at {_public(uri)}: {first[:300]}", allowed=allowed, fix=_SAFE + fix)


def _probe(uri: str) -> None:
    """Fail within seconds where MLflow itself would try again for minutes."""
    if uri.startswith(("http://", "https://")):
        answer = requests.get(f"{uri.rstrip('/')}/health", timeout=(CONNECT_SECONDS, ANSWER_SECONDS))
        if answer.status_code >= 500:
            raise requests.HTTPError(f"the server answers with {answer.status_code} {answer.reason}")
    elif uri.startswith(SQLITE) and Path(path := uri.removeprefix(SQLITE)).exists():
        with closing(sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")


def _public(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}" if "@" in rest else uri  # no password into messages
