"""A study in Optuna's storage: its definition, its slots, and trials that survive the death of their process.

A study has a slot for each trial that was asked for, all in the queue from the start. Workers claim trials from the
queue, which the storage lets only one of them do, and never make new ones: so a study of twenty trials ends with
twenty, however many workers there are and whichever of them die. A trial whose worker died fails when its heartbeat
stops, and a copy of it with the same settings takes its slot in the queue.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import optuna
from filelock import FileLock
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    IntegrityError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
)

from lexiseg.errors import SettingsError, StorageError
from lexiseg.workspace import private_folder

DATABASE, SQLITE = "sweeps.db", "sqlite:///"
DEFINITION, MADE_WITH = "lexiseg", "made_with"  # user attributes of a study: what it is; versions and hardware
# User attributes of a trial: its slot; how many workers died in it; why it failed; who runs it; what it took; its
# settings by dotted key; its metrics; the work folders that are its own.
SLOT, DEATHS, ERROR, WORKER = "slot", "deaths", "error", "worker"
SECONDS, SETTINGS, METRICS, WORK = "seconds", "settings", "metrics", "work"
STATES = ("complete", "pruned", "failed", "given up", "running", "waiting")
HEARTBEAT, GRACE = 10, 60  # seconds between heartbeats; without one for so long, a trial's worker is dead
RETRIES = 2  # of a trial whose worker died
PATIENCE, SHORT = 600.0, 10.0  # seconds to wait for a storage that went away; the same on the way out
PAUSE = 1.0
TABLES = 5  # times to look whether the tables are there, while another process makes them

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Answer = TypeVar("Answer")

# Failing stale trials is "experimental" since version 2.9.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def worker_name(number: int) -> str:
    """A name that no other worker of a study has: machine, process of its sweep, number."""
    return f"{socket.gethostname()}-{os.getpid()}-{number}"


def storage_url(root: Path, url: str | None) -> str:
    """Where studies are kept: `url`, or a file in the private folder of the main checkout.

    A relative file counts from the working tree, wherever the command was started.
    """
    if url and url.startswith(SQLITE) and not url.startswith(f"{SQLITE}/") and url != f"{SQLITE}:memory:":
        return f"{SQLITE}{(root / url.removeprefix(SQLITE)).resolve()}"
    return url or f"{SQLITE}{(private_folder(root) / DATABASE).resolve()}"


def open_storage(url: str, *, heartbeat: int = HEARTBEAT, grace: int = GRACE) -> RDBStorage:
    """Connect to a storage, making its tables where it has none.

    Args:
        url: SQLAlchemy's address, such as sqlite:///sweeps.db or postgresql://user:password@host/database.
        heartbeat: seconds between signs of life of a trial.
        grace: seconds without one after which it is given to another worker.

    Raises:
        StorageError: nothing answers there, or it cannot be used. It says so within seconds.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        parts = make_url(url)
        sqlite = parts.get_backend_name() == "sqlite"
        if sqlite and parts.database:
            Path(parts.database).parent.mkdir(parents=True, exist_ok=True)
        timeout = {"timeout": 60} if sqlite else {"connect_timeout": 5} if "postgres" in parts.drivername else {}
        how: dict[str, Any] = {
            # A connection that a restarted server has forgotten is replaced instead of failing a trial.
            "engine_kwargs": {"connect_args": timeout, "pool_pre_ping": True},
            "heartbeat_interval": heartbeat,
            "grace_period": grace,
            "heartbeat_stale_trial_callback": _died,
        }
        for _ in range(TABLES):
            try:
                return RDBStorage(url, **how)
            except (IntegrityError, ProgrammingError):
                time.sleep(PAUSE)  # another process is making the tables at the same time
        return RDBStorage(url, **how)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise StorageError(
            found=f"the storage {_hidden(url)}: {' '.join(str(error).split())}",
            allowed="sqlite:///FILE, or postgresql://USER:PASSWORD@HOST/DATABASE (with the extra `sweeps`)",
            fix="correct --storage; without it .lexiseg/sweeps.db is used",
        ) from error
    except (SQLAlchemyError, StorageInternalError, OSError, RuntimeError) as error:
        raise StorageError(
            found=f"the storage {_hidden(url)} cannot be used: {_reason(error)}",
            allowed="a database that runs, lets this user in, and is of the installed version of Optuna",
            fix="start it, or correct --storage; without it .lexiseg/sweeps.db is used",
        ) from error


def study_names(storage: RDBStorage) -> list[str]:
    """The studies in a storage that are of lexiseg, oldest first."""
    summaries = optuna.get_all_study_summaries(storage=storage)
    return [summary.study_name for summary in summaries if DEFINITION in summary.user_attrs]


def load_study(storage: RDBStorage, name: str) -> optuna.Study:
    """A study that is there already.

    Raises:
        SettingsError: there is none of this name, or it is not lexiseg's.
    """
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        study = None
    if study is None or DEFINITION not in study.user_attrs:
        raise SettingsError(
            found=f"no study `{name}`",
            allowed=", ".join(study_names(storage)) or "a study that `lexiseg sweep METHOD` made; there is none yet",
            fix="`lexiseg sweep show` lists them",
        )
    return study


def create_study(
    storage: RDBStorage, name: str, definition: Mapping[str, Any], *, directions: list[str]
) -> tuple[optuna.Study, bool]:
    """The study of this name and definition, new or as it is.

    Returns:
        The study, and whether it is new.

    Raises:
        SettingsError: there is one of this name that is defined otherwise, or the name is none for a folder.
    """
    if not _NAME.fullmatch(name):
        raise SettingsError(
            found=f"the study name `{name}`",
            allowed="letters, digits, `.`, `-` and `_`, beginning with a letter or digit",
            fix="choose such a name with --study",
        )
    try:
        study = optuna.create_study(storage=storage, study_name=name, directions=directions)  # type: ignore[arg-type]
        study.set_user_attr(DEFINITION, dict(definition))
        return study, True
    except DuplicatedStudyError:
        study = optuna.load_study(study_name=name, storage=storage)
    found = _defined(study)
    if not found and not study.get_trials(deepcopy=False):  # whoever made it died before it could say what it is
        study.set_user_attr(DEFINITION, dict(definition))
        return study, True
    differing = differences(found, definition)
    if differing:
        raise SettingsError(
            found=f"the study `{name}` is another one:" + "".join(f"\n  - {line}" for line in differing),
            allowed="a study of the same method, space, settings, code and data: only its trials can be compared",
            fix="choose another name with --study; `lexiseg sweep show` lists the studies",
        )
    return study, False


def _defined(study: optuna.Study) -> Mapping[str, Any]:
    """The definition of a study; another process may have made the study and be about to write it."""
    for _ in range(20):
        if DEFINITION in (attributes := study.user_attrs):
            return attributes[DEFINITION]
        time.sleep(PAUSE / 4)
    return {}


def slots(study: optuna.Study) -> dict[int, FrozenTrial]:
    """The trial that stands for each slot: of a slot whose worker died, the one that took its place."""
    standing: dict[int, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        slot = trial.user_attrs.get(SLOT)
        if slot is not None and (slot not in standing or _rank(trial) > _rank(standing[slot])):
            standing[slot] = trial
    return dict(sorted(standing.items()))


def _rank(trial: FrozenTrial) -> tuple[int, int]:
    order = [TrialState.WAITING, TrialState.RUNNING, TrialState.PRUNED, TrialState.COMPLETE]
    if trial.state == TrialState.FAIL:
        return (2, -trial.number) if ERROR in trial.user_attrs else (-1, trial.number)
    return min(2, order.index(trial.state)), -trial.number


def state_of(trial: FrozenTrial) -> str:
    """complete, pruned, failed (by itself), given up (it killed its workers), running or waiting."""
    if trial.state == TrialState.FAIL:
        return "failed" if ERROR in trial.user_attrs else "given up"
    return trial.state.name.lower()


def counts(study: optuna.Study) -> dict[str, int]:
    """Number of slots by state, see `state_of`."""
    found = [state_of(trial) for trial in slots(study).values()]
    return {state: found.count(state) for state in STATES}


def add_slots(study: optuna.Study, count: int, *, first: Mapping[str, Any] | None) -> None:
    """Queue what a study lacks of `count` slots, and again what was given up.

    Args:
        study: the study.
        count: slots that it should have.
        first: values by knob of the very first trial, such as the settings as they are.
    """
    with alone(study, "queue"):
        standing = slots(study)
        for slot in range(count):
            if slot not in standing:
                study.enqueue_trial(dict(first or {}) if slot == 0 else {}, user_attrs={SLOT: slot})
            elif state_of(standing[slot]) == "given up":  # whoever starts the sweep again may have more memory
                _again(study, standing[slot])


def claim(study: optuna.Study) -> optuna.Trial | None:
    """Take a trial from the queue; None where it is empty. No other worker gets the same one, nor one of its slot."""
    storage: Any = study._storage  # Optuna has no public word for "the next of the queue, and only of the queue"
    with alone(study, "queue"):
        fail_stale_trials(study)
        standing = slots(study)
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        # By slot: what was stopped comes before what follows from it.
        for trial in sorted(waiting, key=lambda trial: (trial.user_attrs[SLOT], trial.number)):
            if standing[trial.user_attrs[SLOT]].number != trial.number:
                storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)  # its slot is taken
                continue
            # Before it runs: of a trial without a single heartbeat Optuna never says that it is stale.
            storage.record_heartbeat(trial._trial_id)
            if storage.set_trial_state_values(trial._trial_id, state=TrialState.RUNNING):
                return optuna.Trial(study, trial._trial_id)
    return None


def put_back(study: optuna.Study, trial: optuna.Trial) -> None:
    """Queue again what a worker does not finish, for no fault of the trial."""
    with alone(study, "queue"):
        if _fail(study, trial._trial_id):
            _again(study, study._storage.get_trial(trial._trial_id))


def give_back(study: optuna.Study, *, worker: str) -> int:
    """Queue again what a worker that has died was running; returns the number of trials."""
    number = 0
    with alone(study, "queue"):
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.user_attrs.get(WORKER) == worker and _fail(study, trial._trial_id):
                _died(study, trial)
                number += 1
    return number


@contextmanager
def alone(study: optuna.Study, what: str) -> Iterator[None]:
    """Keep other processes from doing the same with a study's storage, on whatever machine they are.

    Optuna relies on locks of rows, which SQLite does not have, and two processes that look what is missing and add
    it need more than that anyway.
    """
    backend: Any = getattr(study._storage, "_backend", study._storage)
    url = make_url(backend.url)
    if url.get_backend_name() == "sqlite" and url.database:
        with FileLock(f"{url.database}.{what}.lock"):
            yield
    elif url.get_backend_name() == "postgresql":
        connection = backend.engine.connect()
        try:
            # The lock ends with its transaction, also where this process is killed.
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext(:what))"), {"what": f"lexiseg {what}"})
            yield
        finally:
            with suppress(SQLAlchemyError):
                connection.close()
    else:
        yield


def _fail(study: optuna.Study, number: int) -> bool:
    with suppress(UpdateFinishedTrialError):
        return bool(study._storage.set_trial_state_values(number, state=TrialState.FAIL))
    return False  # somebody else was quicker


def _again(study: optuna.Study, trial: FrozenTrial, *, deaths: int = 0) -> None:
    """Queue a copy of a trial, with its values, its slot, and what was seen of its training."""
    study.add_trial(
        optuna.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={SLOT: trial.user_attrs[SLOT], DEATHS: deaths},
            system_attrs=trial.system_attrs,
            intermediate_values=trial.intermediate_values,
        )
    )


def _died(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue a trial again whose worker died in it, unless that happens again and again: memory may be short."""
    deaths = trial.user_attrs.get(DEATHS, 0) + 1
    if deaths <= RETRIES:
        _again(study, trial, deaths=deaths)


@contextmanager
def heartbeats(study: optuna.Study, trial: optuna.Trial) -> Iterator[None]:
    """Let the storage know that a trial is alive; a storage that is away for a while is no reason to stop."""
    storage: Any = study._storage
    done = threading.Event()

    def beat() -> None:
        while not done.wait(storage.get_heartbeat_interval()):
            with suppress(SQLAlchemyError, StorageInternalError):
                storage.record_heartbeat(trial._trial_id)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def patiently(action: Callable[[], Answer], *, patience: float = PATIENCE) -> Answer:
    """Do something with the storage, again and again while it is away.

    Raises:
        StorageError: it was away for longer than `patience` seconds.
    """
    deadline = time.monotonic() + patience
    said = False
    while True:
        try:
            return action()
        except (SQLAlchemyError, StorageInternalError) as error:
            if not isinstance(_cause(error), OperationalError | InterfaceError):
                raise
            if time.monotonic() > deadline:
                raise StorageError(
                    found=f"the storage did not answer for {patience:.0f} s: {_reason(error)}",
                    allowed="a database that comes back",
                    fix="start it, then the same command again; finished trials are kept",
                ) from error
            if not said:
                print(f"the storage is away ({_reason(error)}), waiting for it", file=sys.stderr, flush=True)
            said = True
            time.sleep(PAUSE)


def _cause(error: BaseException) -> BaseException:
    return error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error


def _reason(error: BaseException) -> str:
    cause = _cause(error)
    return " ".join(str(getattr(cause, "orig", None) or cause).split())[:200]


def _hidden(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What two definitions of a study differ in, a line for each: "settings: seed 0 -> 1"."""
    lines = []
    for key in here:
        old, new = there.get(key), here[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            lines += [f"{key}: {name} {old.get(name)} -> {new.get(name)}" for name in names[:3]]
            lines += [f"{key}: {len(names) - 3} more"] if len(names) > 3 else []
        elif old != new:
            lines.append(f"{key}: {old} there, {new} here")
    return lines
