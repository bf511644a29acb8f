"""A sweep in MLflow: a parent run, and a child for every trial that ended. Found by their tags, so never twice."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock
from mlflow.entities import Metric, Param, Run, RunTag

from lexiseg.tracking.publish import MAX_METRICS, MAX_PARAM, MAX_PARAMS, Published, chunks
from lexiseg.tracking.store import Store, connect, tracking_errors
from lexiseg.tracking.sync import LOCK
from lexiseg.workspace import private_folder

PARENT = "mlflow.parentRunId"
SWEEP, TRIAL = "lexiseg.sweep", "lexiseg.trial"


@dataclass(frozen=True)
class TrialRecord:
    """A child run as it should be.

    Attributes:
        slot: number of the trial in its study.
        status: FINISHED, KILLED (pruned) or FAILED, in MLflow's words.
        started, ended: milliseconds since the epoch.
        params: what the trial changed, by dotted key.
        metrics: final values, such as "val/miou".
        curves: values by step, such as those that a training was looked at by, by percent.
        tags: further tags.
    """

    slot: int
    status: str
    started: int
    ended: int
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepRecord:
    """A parent run as it should be.

    Attributes:
        identity: of the study, the same wherever it is looked at from.
        name: of the study.
        experiment: its name.
        params: what was searched, for what, and how.
        metrics: of the study as a whole.
        tags: further tags.
        trials: of all trials that ended.
        files: of the whole study, replaced where they were there before.
    """

    identity: str
    name: str
    experiment: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    trials: Sequence[TrialRecord]
    files: Iterable[Path] = ()


def publish_sweep(root: Path, record: SweepRecord) -> list[Published]:
    """Create the parent run and the children that MLflow lacks, and bring the parent's numbers and files up to date.

    Processes of one machine do so one after the other; the caller sees to it that those of several do.

    Raises:
        TrackingError: MLflow cannot be reached or written.
    """
    store = connect(root)
    done: list[Published] = []
    with FileLock(str(private_folder(root) / LOCK)), tracking_errors(store.uri):
        experiment = store.experiment(record.experiment)
        started = min((trial.started for trial in record.trials), default=None)
        parent = store.run_with_tag(experiment, SWEEP, record.identity)
        if parent is None:
            tags = {**record.tags, SWEEP: record.identity}
            parent = store.client.create_run(experiment, start_time=started, tags=tags, run_name=record.name)
            done.append(Published(kind="run", name=f"sweep {record.name}", id=parent.info.run_id, action="created"))
        run_id = parent.info.run_id
        there = _children(store, experiment, run_id)
        for trial in record.trials:
            if f"{record.identity}/{trial.slot}" not in there:
                done.append(_publish_trial(store, experiment, run_id, record, trial))
        params, metrics = _lacking(record.params, parent.data.params), _changed(record, parent)
        _log(store, run_id, params=params, metrics=metrics)
        for file in record.files:
            store.client.log_artifact(run_id, str(file), "pictures" if file.suffix == ".png" else None)
        if done or params or metrics:
            ended = max((trial.ended for trial in record.trials), default=None)
            store.client.set_terminated(run_id, end_time=ended)
    return done


def _publish_trial(store: Store, experiment: str, parent: str, record: SweepRecord, trial: TrialRecord) -> Published:
    name = f"{record.name} {trial.slot}"
    tags = {**record.tags, **trial.tags, PARENT: parent}
    run = store.client.create_run(experiment, start_time=trial.started, tags=tags, run_name=name)
    run_id = run.info.run_id
    _log(store, run_id, params=trial.params, metrics=trial.metrics, curves=trial.curves, now=trial.ended)
    store.client.set_terminated(run_id, status=trial.status, end_time=trial.ended)
    # Last: a child without it was interrupted, is made anew, and is thrown away here.
    store.client.log_batch(run_id, tags=[RunTag(TRIAL, f"{record.identity}/{trial.slot}")])
    return Published(kind="run", name=name, id=run_id, action="created")


def _children(store: Store, experiment: str, parent: str) -> set[str]:
    """The tags of the children that are whole; the others are deleted."""
    found: set[str] = set()
    token = None
    while True:
        page = store.client.search_runs(
            [experiment], filter_string=f"tags.`{PARENT}` = '{parent}'", max_results=1000, page_token=token
        )
        for run in page:
            if TRIAL in run.data.tags:
                found.add(run.data.tags[TRIAL])
            else:
                store.client.delete_run(run.info.run_id)
        token = page.token
        if not token:
            return found


def _log(
    store: Store,
    run_id: str,
    *,
    params: Mapping[str, str],
    metrics: Mapping[str, float],
    curves: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    now: int | None = None,
) -> None:
    moment = now or int(time.time() * 1000)
    values = [Metric(key, value, moment, 0) for key, value in metrics.items()]
    values += [Metric(key, value, moment, step) for key, points in (curves or {}).items() for step, value in points]
    for part in chunks([Param(key, value[:MAX_PARAM]) for key, value in params.items()], MAX_PARAMS):
        store.client.log_batch(run_id, params=part)
    for part in chunks(values, MAX_METRICS):
        store.client.log_batch(run_id, metrics=part)


def _lacking(params: Mapping[str, str], there: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in params.items() if key not in there}


def _changed(record: SweepRecord, parent: Run) -> dict[str, float]:
    return {key: value for key, value in record.metrics.items() if parent.data.metrics.get(key) != value}
