"""`lexiseg sweep METHOD`: plans a sweep, starts its workers, shows how it goes, and publishes what comes of it."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from tqdm import tqdm

from lexiseg.driver import GRACE
from lexiseg.errors import SettingsError, StageError, StorageError, TrackingError, error_in
from lexiseg.methods import METHODS
from lexiseg.provenance import made_with
from lexiseg.settings import override
from lexiseg.stage import remove_work, value_at
from lexiseg.sweeps.definition import common_changes, define
from lexiseg.sweeps.launch import Worker, check_place, start_worker
from lexiseg.sweeps.objective import COSTS, RUNGS, Task, as_suggested, check_split, read_constraint, read_goal
from lexiseg.sweeps.planner import Plan, plan_lines, plan_sweep
from lexiseg.sweeps.publish import publish_study
from lexiseg.sweeps.results import best_trials, finished, trial_line
from lexiseg.sweeps.space import Space, read_space
from lexiseg.sweeps.study import (
    MADE_WITH,
    SHORT,
    SLOT,
    WORK,
    add_slots,
    counts,
    create_study,
    give_back,
    load_study,
    open_storage,
    patiently,
    slots,
    storage_url,
    study_names,
    worker_name,
)
from lexiseg.trials import Trials
from lexiseg.workspace import private_folder

MOST_DEATHS = 5  # of workers, with no trial ending in between
POLL = 0.5  # seconds


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asks for; see the options of `lexiseg sweep`."""

    method: str
    space: Sequence[str] = ()
    fixed: Sequence[str] = ()
    trials: int = 20
    study: str | None = None
    storage: str | None = None
    workers: int = 1
    objectives: Sequence[str] = ()
    constraints: Sequence[str] = ()
    split: str = "val"
    seed: int = 0
    prune: bool = True
    gpus: float = 0.0


@dataclass(frozen=True)
class Prepared:
    """A request that was looked at: what it means for this working tree."""

    task: Task
    space: Space
    trials: Trials
    plan: Plan

    def lines(self, *, trials: int, workers: int) -> list[str]:
        """The plan in words."""
        rungs = RUNGS if self.task.prune else ()
        return plan_lines(self.plan, self.space, trials=trials, workers=workers, rungs=rungs)


def prepare(root: Path, request: Request) -> Prepared:
    """Look at a request before anything runs.

    Raises:
        SettingsError: what is asked for does not fit the method, the settings or itself; all of a kind at once.
        DataError: the data set has no such split.
    """
    space = read_space(request.method, request.space, fixed=request.fixed)
    for name, value in (("trials", request.trials), ("workers", request.workers)):
        if value < 1:
            raise SettingsError(found=f"--{name} {value}", allowed="1 or more", fix=f"give another --{name}")
    goals = tuple(map(read_goal, request.objectives or ("miou",)))
    trials = Trials(root)
    # A method that params.yaml does not run is run here, and by `apply` from then on.
    off = value_at(trials.values, f"{request.method}.run") is False
    space = replace(space, fixed={**space.fixed, **({f"{request.method}.run": True} if off else {})})
    task = Task(
        method=request.method,
        knobs=space.knobs,
        common=common_changes(space.fixed, split=request.split),
        split=request.split,
        goals=goals,
        constraints=tuple(map(read_constraint, request.constraints)),
        prune=False,
    )
    _try_ends(trials, task)
    plan = plan_sweep(root, trials, space, target=task.target, common=task.common, also=task.also)
    check_split(root / trials.graph["prepare"].folder, request.split)
    # Of several goals nobody can say which trial is behind, and a cost is known at the end only.
    can_prune = METHODS[request.method].watched and plan.trains and len(goals) == 1 and goals[0].name not in COSTS
    return Prepared(replace(task, prune=request.prune and can_prune), space, trials, plan)


def study_name(request: Request) -> str:
    """The name of the study that a request means."""
    return request.study or f"{request.method}-{read_space(request.method, request.space, fixed=request.fixed).name}"


def sweep(root: Path, request: Request, prepared: Prepared) -> optuna.Study:
    """Run a sweep to its end, or go on with it; returns the study.

    Raises:
        LexisegError: the study is another one, its storage is away, or a worker ended in an error.
        SystemExit: it was stopped (Ctrl+C, SIGTERM); the same call goes on.
    """
    task, space, name = prepared.task, prepared.space, study_name(request)
    values = override(prepared.trials.values, task.common)
    url = storage_url(root, request.storage)
    check_place(url, threads=values["threads"], gpus=request.gpus)
    storage = open_storage(url)
    definition = define(task, space, prepared.trials, seed=request.seed)
    directions = [goal.direction for goal in task.goals]
    study, new = patiently(lambda: create_study(storage, name, definition, directions=directions))
    if new:
        patiently(lambda: study.set_user_attr(MADE_WITH, made_with(root)))
        patiently(lambda: study.set_metric_names([goal.name for goal in task.goals]))  # for Optuna's own pages
    first = as_suggested(task.knobs, {knob.key: value_at(values, knob.key) for knob in task.knobs})
    patiently(lambda: add_slots(study, request.trials, first=first))
    watch = _Watch(root, study, trials=request.trials)
    print(f"study {name}: " + ("new" if new else f"{watch.ended} of {request.trials} trials are there"), flush=True)
    folder = sweep_folder(root, name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _run_workers(root, study, watch, folder, url=url, request=request, threads=values["threads"])
    finally:
        watch.close()
    study = patiently(lambda: load_study(storage, name))
    _publish(root, study, pictures=True)
    _tidy(root, storage, study)
    return study


def sweep_folder(root: Path, name: str) -> Path:
    """Where logs and pictures of a study are."""
    return private_folder(root) / "sweeps" / name


def _run_workers(
    root: Path, study: optuna.Study, watch: _Watch, folder: Path, *, url: str, request: Request, threads: int
) -> None:
    running: list[Worker] = []
    started = deaths = 0

    def start() -> None:
        nonlocal started
        started += 1
        name, how = worker_name(started), {"url": url, "threads": threads, "gpus": request.gpus}
        running.append(start_worker(root, study.study_name, name=name, log=folder / f"{name}.log", **how))

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        for _ in range(request.workers):
            start()
        while running:
            if watch.look():
                deaths = 0
            for worker in list(running):
                code = worker.poll()
                if code is None:
                    continue
                running.remove(worker)
                if code:
                    patiently(lambda worker=worker: give_back(study, worker=worker.name))
                    deaths += 1
                    _judge(code, worker.log, deaths)
                    watch.say(f"a worker was killed (exit code {code}); its trial starts again")
                    start()
            time.sleep(POLL)
        watch.look()
    except (KeyboardInterrupt, SystemExit):
        watch.say(f"stopping: trainings end after their step (at most {GRACE:.0f} s); the same command goes on")
        raise
    finally:
        with ThreadPoolExecutor() as pool:  # their times to end are the same time
            list(pool.map(lambda worker: worker.stop(), running))
        with suppress(StorageError):  # then their trials are stale after a minute, and go to others
            for worker in running:
                patiently(lambda worker=worker: give_back(study, worker=worker.name), patience=SHORT)
        signal.signal(signal.SIGTERM, before)


def _judge(code: int, log: Path, deaths: int) -> None:
    """Raise what a worker ended in, unless it was killed and is worth another start.

    Args:
        code: its exit code, negative for a signal.
        log: of the worker.
        deaths: of workers since a trial last ended.
    """
    # The log of a worker on another machine may not be here.
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    error = error_in(lines)
    if error is not None:
        raise error
    if code > 0 or deaths == MOST_DEATHS:
        raise StageError(
            found=f"a worker ended with exit code {code}"
            + (f", the {deaths}th since a trial last ended" if deaths > 1 else "")
            + f": {lines[-1] if lines else 'it said nothing'}",
            allowed="workers that end without an error",
            fix=f"see {log}; where memory was short, take fewer --workers",
        )


def _publish(root: Path, study: optuna.Study, *, pictures: bool) -> None:
    try:
        publish_study(root, study, pictures=sweep_folder(root, study.study_name) if pictures else None)
    except TrackingError as error:
        print(f"note: not published to MLflow ({error.found}); `lexiseg sync` does it later", file=sys.stderr)


def _tidy(root: Path, storage: RDBStorage, study: optuna.Study) -> None:
    """Remove what trials left in work folders, but for the best ones and what other studies may use."""
    number = counts(study)
    if number["running"] or number["waiting"]:
        return
    others = [load_study(storage, name) for name in study_names(storage) if name != study.study_name]
    keep = {
        name
        for trial in [*best_trials(study), *(trial for other in others for trial in slots(other).values())]
        for name in trial.user_attrs.get(WORK, ())
    }
    for name in {name for trial in slots(study).values() for name in trial.user_attrs.get(WORK, ())} - keep:
        remove_work(private_folder(root), name)


def _try_ends(trials: Trials, task: Task) -> None:
    """Refuse a space whose ends the settings refuse, rather than fail trial after trial."""
    lows = {knob.key: knob.ends[0] for knob in task.knobs}
    highs = {knob.key: knob.ends[-1] for knob in task.knobs}
    others = [lows | {knob.key: choice} for knob in task.knobs for choice in knob.choices]
    for values in [lows, highs, *others]:
        trials.settings_under({**task.common, **values})


class _Watch:
    """Shows trials as they end, on a bar, and publishes them."""

    def __init__(self, root: Path, study: optuna.Study, *, trials: int) -> None:
        self._root, self._study = root, study
        self._seen = set(self._finished())
        interval = 1.0 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(
            total=trials,
            initial=len(self._seen),
            desc=f"sweep {study.study_name}",
            unit="trial",
            mininterval=interval,
            maxinterval=interval,
        )

    @property
    def ended(self) -> int:
        """Number of trials that have ended."""
        return len(self._seen)

    def look(self) -> bool:
        """Show what ended since the last look; returns whether anything did."""
        new = {slot: trial for slot, trial in self._finished().items() if slot not in self._seen}
        for slot, trial in new.items():
            self._seen.add(slot)
            self.say(trial_line(self._study, trial))
            self._bar.update()
        if new:
            _publish(self._root, self._study, pictures=False)
        return bool(new)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _finished(self) -> dict[int, FrozenTrial]:
        return {trial.user_attrs[SLOT]: trial for trial in patiently(lambda: finished(self._study))}
