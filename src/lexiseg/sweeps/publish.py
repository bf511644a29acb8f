"""A study as MLflow shows it; it can be written there again at any time."""

from __future__ import annotations

import csv
import io
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from lexiseg.errors import SettingsError
from lexiseg.storage import sha256_of_json, write_json, write_text
from lexiseg.sweeps.definition import task_of
from lexiseg.sweeps.pictures import write_pictures
from lexiseg.sweeps.results import best_trials, finished, settings_of, study_json, value_of
from lexiseg.sweeps.study import (
    DEFINITION,
    ERROR,
    MADE_WITH,
    METRICS,
    SECONDS,
    SETTINGS,
    SLOT,
    SQLITE,
    alone,
    counts,
    load_study,
    open_storage,
    state_of,
    storage_url,
    study_names,
)
from lexiseg.tracking.publish import Published
from lexiseg.tracking.sweeps import SweepRecord, TrialRecord, publish_sweep

STATUS = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "KILLED", TrialState.FAIL: "FAILED"}


def publish_study(root: Path, study: optuna.Study, *, pictures: Path | None) -> list[Published]:
    """Publish a study, and what ended of its trials.

    Args:
        root: the working tree.
        study: the study.
        pictures: folder for pictures and tables, which are published too; None: numbers alone.

    Raises:
        TrackingError: MLflow cannot be reached or written.
    """
    files: list[Path] = []
    if pictures is not None:
        files = write_pictures(study, pictures)
        write_json(pictures / "study.json", study_json(study))
        write_text(pictures / "trials.csv", trials_csv(study))
        files += [pictures / "study.json", pictures / "trials.csv"]
    with alone(study, "publish"):  # so that no two machines create the same run
        return publish_sweep(root, _record(root, study, files))


def publish_studies(root: Path, folder: Path, *, url: str | None) -> list[Published]:
    """Publish what MLflow lacks of the studies in a storage.

    Args:
        root: the working tree.
        folder: for pictures and tables, a folder per study in it.
        url: of the storage; None: this checkout's own, where there is one.

    Raises:
        TrackingError: MLflow cannot be reached or written.
        StorageError: nor can the storage.
    """
    url = storage_url(root, url)
    if url.startswith(SQLITE) and not Path(url.removeprefix(SQLITE)).is_file():
        return []
    storage = open_storage(url)
    done: list[Published] = []
    for name in study_names(storage):
        study = load_study(storage, name)
        try:
            published = publish_study(root, study, pictures=None) if finished(study) else []
        except SettingsError as error:  # of another version, perhaps: the others are no worse for it
            print(f"the study {name} is not published: {error.found}", file=sys.stderr)
            continue
        if published:  # its pictures take seconds to draw
            publish_study(root, study, pictures=folder / name)
        done += published
    return done


def trials_csv(study: optuna.Study) -> str:
    """A row per trial that ended: trial, state, a column per goal, per knob, and seconds."""
    task = task_of(study)
    keys = [knob.key for knob in task.knobs]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["trial", "state", *(goal.name for goal in task.goals), *keys, "seconds"])
    for trial in finished(study):
        values = [*value_of(trial), *[""] * len(task.goals)][: len(task.goals)]
        chosen = trial.user_attrs.get(SETTINGS, trial.params)
        cells = [*values, *(chosen.get(key, "") for key in keys), trial.user_attrs.get(SECONDS, "")]
        writer.writerow([trial.user_attrs[SLOT], state_of(trial), *cells])
    return stream.getvalue()


def _record(root: Path, study: optuna.Study, files: list[Path]) -> SweepRecord:
    definition, task = study.user_attrs[DEFINITION], task_of(study)
    settings, inputs = definition["settings"], definition["inputs"]
    data = next((name.removeprefix("data/") for name in inputs if name.startswith("data/")), "unknown")
    best = best_trials(study)
    metrics = {f"trials_{state.replace(' ', '_')}": float(number) for state, number in counts(study).items()}
    if len(task.goals) == 1 and best:
        metrics[f"best/{task.split}/{task.goals[0].name}"] = best[0].values[0]
    # Where the study is does not matter, so that it is found again in a copy of its storage.
    identity = sha256_of_json([study.study_name, {key: definition[key] for key in sorted(definition)}])
    tags = {
        "lexiseg.kind": "sweep",
        "lexiseg.method": task.method,
        "lexiseg.study": study.study_name,
        "lexiseg.profile": str(settings.get("profile", "unknown")),
        "lexiseg.data_version": next((value for name, value in inputs.items() if name.startswith("data/")), "unknown"),
        "lexiseg.commit": str((study.user_attrs.get(MADE_WITH) or {}).get("commit", "unknown")),
    }
    return SweepRecord(
        identity=identity[:32],
        name=study.study_name,
        experiment=f"lexiseg-{data}-sweeps",
        params={
            "method": task.method,
            "space": definition["space"],
            "split": task.split,
            "objectives": ", ".join(definition["objectives"]),
            "constraints": ", ".join(definition["constraints"]) or "none",
            "pruner": definition["pruner"],
            "sampler": "multivariate TPE",
            "seed": str(definition["seed"]),
            **{f"space/{knob.key}": str(knob).partition("=")[2] for knob in task.knobs},
            **{key: _text(value) for key, value in definition["fixed"].items()},
        },
        metrics=metrics,
        tags=tags,
        trials=[_trial(study, trial) for trial in finished(study)],
        files=files,
    )


def _trial(study: optuna.Study, trial: FrozenTrial) -> TrialRecord:
    task = task_of(study)
    metrics: dict[str, Any] = trial.user_attrs.get(METRICS, {})
    chosen = settings_of(trial, study.user_attrs[DEFINITION])
    looked = tuple((step, value) for step, value in sorted(trial.intermediate_values.items()))
    number = {f"{task.split}/{name}": float(value) for name, value in metrics.items() if isinstance(value, float)}
    seconds = trial.user_attrs.get(SECONDS)
    return TrialRecord(
        slot=trial.user_attrs[SLOT],
        status=STATUS[trial.state],
        started=_milliseconds(trial.datetime_start),
        ended=_milliseconds(trial.datetime_complete),
        params={key: _text(value) for key, value in chosen.items()},
        metrics=number if seconds is None else number | {"seconds": seconds},
        curves={f"looked_at/{task.goals[0].name}": looked} if looked else {},
        tags={"lexiseg.state": state_of(trial)}
        | ({"lexiseg.error": trial.user_attrs[ERROR]} if ERROR in trial.user_attrs else {}),
    )


def _milliseconds(moment: datetime | None) -> int:
    return int((moment or datetime.now()).timestamp() * 1000)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
