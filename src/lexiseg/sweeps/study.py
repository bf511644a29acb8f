"""A study in Optuna's storage: its definition, its slots, and trials that survive the death of their process.

A study has a slot for each trial that was asked for, all in the queue from the start. Workers claim trials from the
queue, which the storage lets only one of them do, and never make new ones: so a study of twenty trials ends with
twenty, however many workers there are and whichever of them die. A trial whose worker died fails when its heartbeat
stops, and a copy of it with the same settings takes its slot in the queue.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import optuna
from filelock import FileLock
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, InterfaceError, NoSuchModuleError, OperationalError, SQLAlchemyError

from lexiseg.errors import SettingsError, StorageError
from lexiseg.workspace import private_folder

DATABASE = "sweeps.db"
DEFINITION, MADE_WITH = "lexiseg", "made_with"  # user attributes of a study: what it is; versions and hardware
# User attributes of a trial: its slot; how many workers died in it; why it failed; who runs it; what it took; its
# settings by dotted key; its metrics; the work folders that are its own.
SLOT, DEATHS, ERROR, WORKER = "slot", "deaths", "error", "worker"
SECONDS, SETTINGS, METRICS, WORK = "seconds", "settings", "metrics", "work"
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
HEARTBEAT, GRACE = 10, 60  # seconds between heartbeats; without one for so long, a trial's worker is dead
RETRIES = 2  # of a trial whose worker died
PATIENCE = 600.0  # seconds to wait for a storage that went away
PAUSE = 1.0

Answer = TypeVar("Answer")

# Failing stale trials is "experimental" since version 2.9.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def worker_name(number: int) -> str:
    """A name that no other worker of a study has: machine, process of its sweep, number."""
    return f"{socket.gethostname()}-{os.getpid()}-{number}"


def storage_url(root: Path, url: str | None) -> str:
    """Where studies are kept: `url`, or a file in the private folder of the main checkout."""
    return url or f"sqlite:///{(private_folder(root) / DATABASE).resolve()}"


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
        return RDBStorage(
            url,
            # A connection that a restarted server has forgotten is replaced instead of failing a trial.
            engine_kwargs={"connect_args": timeout, "pool_pre_ping": True},
            heartbeat_interval=heartbeat,
            grace_period=grace,
            heartbeat_stale_trial_callback=_died,
        )
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


def load_study(storage: RDBStorage, name: str, *, seed: int = 0) -> optuna.Study:
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
        SettingsError: there is one of this name that is defined otherwise.
    """
    try:
        study = optuna.create_study(storage=storage, study_name=name, directions=directions)  # type: ignore[arg-type]
        study.set_user_attr(DEFINITION, dict(definition))
        return study, True
    except DuplicatedStudyError:
        study = optuna.load_study(study_name=name, storage=storage)
    found = _defined(study)
    differing = [key for key in definition if found.get(key) != definition[key]]
    if differing:
        raise SettingsError(
            found=f"the study `{name}` is another one:"
            + "".join(f"\n  - {_difference(key, found.get(key), definition[key])}" for key in differing),
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


def add_slots(study: optuna.Study, count: int, *, first: Mapping[str, Any] | None) -> None:
    """Queue what a study lacks of `count` slots, and again what neither ended nor failed by itself.

    Args:
        study: the study.
        count: slots that it should have.
        first: values by knob of the very first trial, such as the settings as they are.
    """
    by_slot: dict[int, list[FrozenTrial]] = {}
    for trial in study.get_trials(deepcopy=False):
        by_slot.setdefault(trial.user_attrs.get(SLOT, -1), []).append(trial)
    for slot in range(count):
        trials = by_slot.get(slot, [])
        if not trials:
            study.enqueue_trial(dict(first or {}) if slot == 0 else {}, user_attrs={SLOT: slot})
        elif all(trial.state == TrialState.FAIL and ERROR not in trial.user_attrs for trial in trials):
            # It was given up after too many deaths, or whoever should have queued it again died on the way.
            again(study, trials[-1])


def again(study: optuna.Study, trial: FrozenTrial, *, deaths: int = 0) -> None:
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
        again(study, trial, deaths=deaths)


def claim(study: optuna.Study) -> optuna.Trial | None:
    """Take a trial from the queue; None where it is empty. No other worker gets the same one."""
    storage: Any = study._storage  # Optuna has no public word for "the next of the queue, and only of the queue"
    with _alone(storage):
        fail_stale_trials(study)
        for trial in storage.get_all_trials(study._study_id, deepcopy=False, states=(TrialState.WAITING,)):
            # Before it runs: of a trial without a single heartbeat Optuna never says that it is stale.
            storage.record_heartbeat(trial._trial_id)
            with suppress(UpdateFinishedTrialError):
                if storage.set_trial_state_values(trial._trial_id, state=TrialState.RUNNING):
                    return optuna.Trial(study, trial._trial_id)
    return None


def _alone(storage: Any) -> AbstractContextManager[Any]:
    """What keeps other processes from claiming in between: SQLite has no lock of a row, which Optuna relies on."""
    url = make_url(storage._backend.url)
    if url.get_backend_name() != "sqlite" or not url.database:
        return nullcontext()
    return FileLock(f"{url.database}.lock")


def counts(study: optuna.Study) -> dict[str, int]:
    """Number of trials by state: complete, pruned, failed (by themselves), running, waiting."""
    trials = study.get_trials(deepcopy=False)
    return {
        "complete": sum(trial.state == TrialState.COMPLETE for trial in trials),
        "pruned": sum(trial.state == TrialState.PRUNED for trial in trials),
        "failed": sum(trial.state == TrialState.FAIL and ERROR in trial.user_attrs for trial in trials),
        "running": sum(trial.state == TrialState.RUNNING for trial in trials),
        "waiting": sum(trial.state == TrialState.WAITING for trial in trials),
    }


def give_back(study: optuna.Study, *, worker: str) -> int:
    """Queue again what a worker that has ended was running; returns the number of trials."""
    storage: Any = study._storage
    number = 0
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.user_attrs.get(WORKER) == worker:
            with suppress(UpdateFinishedTrialError):
                storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
                _died(study, trial)
                number += 1
    return number


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


def _difference(key: str, old: Any, new: Any) -> str:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        shown = ", ".join(f"{name} {old.get(name)} -> {new.get(name)}" for name in names[:3])
        return f"{key}: {shown}" + (f", and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{key}: {old} there, {new} here"
