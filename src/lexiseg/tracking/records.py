"""What MLflow should hold of a method: gathered from dvc.lock and outputs/, without MLflow."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexiseg.settings import read_yaml
from lexiseg.storage import read_json, sha256_of_json
from lexiseg.tracking.identity import CODE, hashes, is_own, lineage, method_fingerprint, params, stage_name, stale
from lexiseg.tracking.workplace import ENCODE_EVALUATE, Workplace

CURVE, METRICS, PICTURES = "curve.csv", "metrics.json", "pictures"
DATA = "data/"


@dataclass(frozen=True)
class Record:
    """A run as it should be.

    Attributes:
        method: the word that the report and metrics.json use, such as "lseg" or "baselines/linear".
        experiment: its name.
        fingerprint: see `method_fingerprint`.
        tags, params: as MLflow shows them; all text.
        metrics: final values, such as "test/miou" (0..1).
        curves: values by step, such as "train/loss".
        files: path below the run's artifacts -> file on disk.
        data: name and digest of the data set.
        model: the register folder, where it belongs to these results.
    """

    method: str
    experiment: str
    fingerprint: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    curves: Mapping[str, tuple[tuple[int, float], ...]]
    files: Mapping[str, Path]
    data: tuple[str, str] | None
    model: ModelFolder | None = None

    @property
    def extent(self) -> str:
        """A hash of the names of everything in the record: a run that carries it as a tag lacks nothing."""
        curves = {key: len(points) for key, points in self.curves.items()}
        return sha256_of_json([sorted(self.params), sorted(self.metrics), curves, sorted(self.files)])


@dataclass(frozen=True)
class ModelFolder:
    """A finished model folder.

    Attributes:
        path: the folder.
        content: hash of its content.
        card: its card.json.
    """

    path: Path
    content: str
    card: Mapping[str, Any]


def read_record(place: Workplace, method: str) -> Record:
    """Gather a method's run. `Workplace.why_not` of its evaluation must have been asked before."""
    lock, root = place.lock, place.root
    evaluate = stage_name(lock, method, "evaluate")
    stages = lineage(lock, evaluate)
    own = [stage for stage in stages if is_own(stage, method)]
    metrics_file = next(root / path for path in hashes(lock[evaluate], "outs") if path.endswith(f"/{METRICS}"))
    result = read_json(metrics_file)
    metrics = _flat_numbers(result["splits"])
    files = {
        f"evaluate/{file.relative_to(metrics_file.parent).as_posix()}": file
        for path in hashes(lock[evaluate], "outs")
        for file in _files(root / path)
    }
    curves: dict[str, tuple[tuple[int, float], ...]] = {}
    for stage in own:
        part = stage.partition("-")[2].partition("@")[0]
        for file in (root / path / CURVE for path in hashes(lock[stage], "outs")):
            if file.is_file() and place.why_not(stage) is None:
                curves |= {f"{part}/{name}": points for name, points in _curve(file).items()}
                files[f"{part}/{CURVE}"] = file
        # What a stage draws of its own work, such as STEGO's similarities.
        for folder in (root / path / PICTURES for path in hashes(lock[stage], "outs")):
            if folder.is_dir() and place.why_not(stage) is None:
                files |= {f"{part}/{file.name}": file for file in sorted(folder.glob("*.png"))}
    encoders = _encoder_metrics(place, stages)
    if encoders:
        metrics |= {f"encode/{name}": value for name, value in _flat_numbers(read_json(encoders)["retrieval"]).items()}
        files[f"encode/{METRICS}"] = encoders
    values = {key: value for stage in stages for key, value in _flat(params(lock[stage])).items()}
    data = next(
        ((path.removeprefix(DATA), value) for stage in stages for path, value in hashes(lock[stage], "deps").items()
         if path.startswith(DATA)),
        None,
    )  # fmt: skip
    fingerprint = method_fingerprint(lock, method)
    return Record(
        method=result["method"],
        experiment=f"lexiseg-{data[0] if data else 'unknown'}",
        fingerprint=fingerprint,
        tags={
            "lexiseg.fingerprint": fingerprint,
            "lexiseg.method": result["method"],
            "lexiseg.protocol": result["protocol"]["name"],
            "lexiseg.protocol_hash": result["protocol"]["hash"],
            "lexiseg.data_version": data[1] if data else "unknown",
            "lexiseg.commit": place.code_of(stages),
            "lexiseg.profile": _profile(place, evaluate),
            "lexiseg.seed": values.get("seed", "none"),
        },
        params=values,
        metrics=metrics,
        curves=curves,
        files=dict(sorted(files.items())),
        data=data,
        model=_model(place, method),
    )


def _model(place: Workplace, method: str) -> ModelFolder | None:
    register = stage_name(place.lock, method, "register")
    if place.why_not(register):
        return None
    outs = hashes(place.lock[register], "outs")
    folder = place.root / next(iter(outs))
    return ModelFolder(path=folder, content=sha256_of_json(outs), card=read_json(folder / "card.json"))


def _encoder_metrics(place: Workplace, stages: list[str]) -> Path | None:
    """The file of the encoders' own numbers, when these are the encoders that the stages used."""
    if place.why_not(ENCODE_EVALUATE):
        return None
    used = {path: value for stage in stages for path, value in hashes(place.lock[stage], "deps").items()}
    own = hashes(place.lock[ENCODE_EVALUATE], "deps")
    if any(used.get(path, value) != value for path, value in own.items() if not path.startswith(CODE)):
        return None
    return place.root / next(path for path in hashes(place.lock[ENCODE_EVALUATE], "outs") if path.endswith(METRICS))


def _profile(place: Workplace, evaluate: str) -> str:
    """The report records the profile; before it ran on these results, params.yaml says it."""
    report = place.lock.get("report")
    if report and evaluate in lineage(place.lock, "report") and not stale(place.lock, "report"):
        return str(params(report).get("profile", "unknown"))
    path = place.root / "params.yaml"
    return str((read_yaml(path) or {}).get("profile", "unknown")) if path.is_file() else "unknown"


def _flat_numbers(splits: Mapping[str, Mapping[str, Any] | None]) -> dict[str, float]:
    # Whole numbers are counts of what was measured, and null is what could not be.
    return {
        f"{split}/{name}": value
        for split, values in splits.items()
        for name, value in (values or {}).items()
        if isinstance(value, float)
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    result: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return result


def _curve(file: Path) -> dict[str, tuple[tuple[int, float], ...]]:
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    names = [name for name in (rows[0] if rows else ()) if name != "step"]
    return {name: tuple((int(row["step"]), float(row[name])) for row in rows if row[name]) for name in names}


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
