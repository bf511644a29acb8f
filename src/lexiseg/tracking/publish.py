"""Write a record into MLflow: what is there stays, what is missing is added."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_GIT_COMMIT

from lexiseg.tracking.records import Record
from lexiseg.tracking.store import Store

FINGERPRINT, PUBLISHED = "lexiseg.fingerprint", "lexiseg.published"
# Limits of MLflow: entities per request, and characters.
MAX_PARAMS, MAX_METRICS, MAX_DIGEST = 100, 1000, 36
MAX_PARAM = 6000

Item = TypeVar("Item")


@dataclass(frozen=True)
class Published:
    """Something that MLflow lacked and has now.

    Attributes:
        kind: a run, a model version, an alias that was moved, or the model card of a version.
        name: the method of a run; the registered name of a model.
        id: the run's id, or the version's number.
        action: created, or completed where an earlier publication was interrupted or lacked something.
    """

    kind: Literal["run", "model", "alias", "card"]
    name: str
    id: str
    action: Literal["created", "completed"]

    def __str__(self) -> str:
        return f"{self.action} {self.kind} {self.name} ({self.id})"


def publish_run(store: Store, record: Record) -> tuple[str, list[Published]]:
    """Find the run of a record by its fingerprint or create it, and add what it lacks.

    The tag `lexiseg.published` is written last; a run without it was interrupted, so its files are compared by
    size too. A finished run is never overwritten: only names that it does not have are added.

    Returns:
        The run's id, and what was done to it.
    """
    experiment = store.experiment(record.experiment)
    run = store.run_with_tag(experiment, FINGERPRINT, record.fingerprint)
    created = run is None
    if run is None:
        commit = {MLFLOW_GIT_COMMIT: record.tags["lexiseg.commit"].removesuffix("-dirty")}
        run = store.client.create_run(experiment, tags={**record.tags, **commit}, run_name=record.method)
    elif run.data.tags.get(PUBLISHED) == record.extent:
        return run.info.run_id, []
    added = _complete(store, run, record, whole=PUBLISHED in run.data.tags)
    if PUBLISHED in run.data.tags and not added:
        return run.info.run_id, []
    store.client.set_terminated(run.info.run_id)
    store.client.set_tag(run.info.run_id, PUBLISHED, record.extent)
    action = "created" if created else "completed"
    return run.info.run_id, [Published(kind="run", name=record.method, id=run.info.run_id, action=action)]


def _complete(store: Store, run: Any, record: Record, *, whole: bool) -> bool:
    """Add what a run lacks; returns whether it lacked anything."""
    client, run_id, now = store.client, run.info.run_id, int(time.time() * 1000)
    tags = [RunTag(key, value) for key, value in record.tags.items() if key not in run.data.tags]
    values = [Param(key, value[:MAX_PARAM]) for key, value in record.params.items() if key not in run.data.params]
    metrics = [Metric(key, value, now, 0) for key, value in record.metrics.items() if key not in run.data.metrics]
    for key, points in record.curves.items():
        logged = {point.step for point in client.get_metric_history(run_id, key)} if key in run.data.metrics else set()
        metrics += [Metric(key, value, now, step) for step, value in points if step not in logged]
    for params in chunks(values, MAX_PARAMS):
        client.log_batch(run_id, params=params)
    for part in chunks(metrics, MAX_METRICS):
        client.log_batch(run_id, metrics=part)
    if tags:
        client.log_batch(run_id, tags=tags)
    files = _missing_files(store, run_id, record.files, whole=whole)
    for path, file in files.items():
        client.log_artifact(run_id, str(file), _folder(path))
    data = record.data if not run.inputs or not run.inputs.dataset_inputs else None
    if data:
        client.log_inputs(run_id, datasets=[_data_set(*data)])
    return bool(tags or values or metrics or files or data)


def _missing_files(store: Store, run_id: str, files: Mapping[str, Path], *, whole: bool) -> dict[str, Path]:
    there = {
        info.path: info.file_size
        for folder in sorted({_folder(path) for path in files})
        for info in store.client.list_artifacts(run_id, folder)
    }
    return {
        path: file
        for path, file in files.items()
        if path not in there or (not whole and there[path] != file.stat().st_size)
    }


def _data_set(name: str, version: str) -> DatasetInput:
    source = json.dumps({"path": f"data/{name}", "md5": version})
    entity = Dataset(name=name, digest=version[:MAX_DIGEST], source_type="dvc", source=source)
    return DatasetInput(dataset=entity, tags=[InputTag(MLFLOW_DATASET_CONTEXT, "training")])


def _folder(path: str) -> str:
    return PurePosixPath(path).parent.as_posix()


def chunks(items: Iterable[Item], size: int) -> Iterator[Sequence[Item]]:
    """Parts of at most `size` items: MLflow takes no more at once."""
    items = list(items)
    for start in range(0, len(items), size):
        yield items[start : start + size]
