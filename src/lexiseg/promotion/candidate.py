"""A registered version with everything that was recorded of it."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexiseg.evaluation.image_counts import ImageCounts, read_image_counts
from lexiseg.evaluation.metrics import mean_over
from lexiseg.promotion.bootstrap import pooled_iou
from lexiseg.storage import read_json
from lexiseg.tracking.registry import download_pyfunc, find_version, model_folder_in, model_name
from lexiseg.tracking.store import Store, tracking_errors

TABLES = "evaluate/tables"
SAME = 1e-6  # of two mIoU of one model


@dataclass(frozen=True, eq=False)
class Candidate:
    """One version of a method's registered model.

    Attributes:
        method: such as "lseg".
        version: its number.
        run_id: of the run that it came from.
        tags: of the version: fingerprint, protocol, data version, commit, licences, seed.
        folder: the model folder, on this machine.
        pyfunc: what MLflow loads, on this machine.
        card: the folder's card.json.
    """

    method: str
    version: str
    run_id: str
    tags: Mapping[str, str]
    folder: Path
    pyfunc: Path
    card: Mapping[str, Any]

    @property
    def data_digest(self) -> str:
        """Hash of the prepared data that it was evaluated on."""
        return self.card.get("data", {}).get("content_digest", "unknown")

    @property
    def protocol(self) -> Mapping[str, Any]:
        """The entry of the card that it was evaluated under: name, hash, card."""
        return self.card["protocol"]

    def identity(self) -> dict[str, str]:
        """The hashes that say what the version is."""
        kept = ("fingerprint", "data_version", "protocol_hash", "commit", "seed", "content")
        found = {key: self.tags.get(f"lexiseg.{key}", "unknown") for key in kept}
        return {"version": self.version, **found, "data_digest": self.data_digest}


@dataclass(frozen=True, eq=False)
class Scores:
    """What a version scored on a split.

    Attributes:
        protocol: the entry of the card it was counted under.
        data_digest: hash of the prepared data.
        counts: by picture and class.
        metrics: of the whole split, by their names in metrics.json.
        measured: "recorded": by the run of the version; "again": now, here.
    """

    protocol: Mapping[str, Any]
    data_digest: str
    counts: ImageCounts
    metrics: Mapping[str, float | None]
    measured: str

    @property
    def absent_class(self) -> Any:
        """The card's policy for classes that are in neither truth nor prediction."""
        return self.protocol["card"]["absent_class"]


def read_candidate(root: Path, method: str, which: str) -> Candidate:
    """Read a version.

    Args:
        root: the working tree.
        method: such as "lseg".
        which: "@challenger", or "/3".

    Raises:
        TrackingError: MLflow is out of reach, or there is no such version.
        ModelError: the version is no model of lexiseg.
    """
    store, found = find_version(f"models:/{model_name(method)}{which}", root)
    pyfunc = download_pyfunc(store, found, root)
    folder = model_folder_in(pyfunc)
    return Candidate(
        method=method,
        version=str(found.version),
        run_id=str(found.run_id),
        tags=dict(found.tags),
        folder=folder,
        pyfunc=pyfunc,
        card=read_json(folder / "card.json"),
    )


def recorded_scores(store: Store, candidate: Candidate, split: str) -> Scores | None:
    """What the run of a version recorded of a split; None where it did not, not by picture, or of another model.

    A run is known by settings, data and code. A training that is repeated on another machine has the same run and
    other weights, so the counts have to give the score that the version's own card states.

    Raises:
        TrackingError: MLflow is out of reach.
    """
    metrics = candidate.card.get("metrics", {}).get(split)
    if not metrics or metrics.get("miou") is None:
        return None
    with tracking_errors(store.uri), tempfile.TemporaryDirectory() as scratch:
        there = {info.path for info in store.client.list_artifacts(candidate.run_id, TABLES)}
        wanted = [f"{TABLES}/{split}_{name}" for name in ("images.parquet", "per_class.csv")]
        if not set(wanted) <= there:
            return None
        images, classes = (Path(store.client.download_artifacts(candidate.run_id, path, scratch)) for path in wanted)
        counts = read_counts(images, classes)
    scores = Scores(candidate.protocol, candidate.data_digest, counts, metrics, "recorded")
    found = mean_over(pooled_iou(counts), absent_class=scores.absent_class)
    return scores if found is not None and abs(found - metrics["miou"]) < SAME else None


def read_counts(images: Path, per_class: Path) -> ImageCounts:
    """The counts by picture in a file of the stage evaluate, with the names of the classes from the one beside it.

    Args:
        images: SPLIT_images.parquet.
        per_class: SPLIT_per_class.csv, a row per class in the order of the counts.

    Raises:
        FileNotFoundError: one of them is missing.
    """
    with per_class.open(newline="", encoding="utf-8") as stream:
        names = [row["class"] for row in csv.DictReader(stream)]
    return read_image_counts(images, names)
