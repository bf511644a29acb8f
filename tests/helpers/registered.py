"""Versions of a registered model with scores as a test wants them: the weights are those of the tree's own model."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lexiseg.evaluation.image_counts import ImageCounts, write_image_counts
from lexiseg.promotion import promote
from lexiseg.promotion.bootstrap import pooled_iou
from lexiseg.storage import read_json, sha256_of_json, write_json
from lexiseg.tracking.publish import publish_run
from lexiseg.tracking.records import ModelFolder, Record
from lexiseg.tracking.registry import publish_model
from lexiseg.tracking.store import connect

IMAGES = 60


def without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No processes load and measure a version: what they would say is known."""
    monkeypatch.setattr(promote, "check_loading", lambda candidate: {"fault": None, "signature": None})
    monkeypatch.setattr(promote, "measure_costs", lambda root, candidate, split: {"latency": 40.0, "memory": 900.0})


class Registry:
    """Registers versions of LSeg's model in the MLflow of a working tree.

    Args:
        root: a working tree in which the graph has run.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._source, self._number = root / "outputs/lseg/register", 0
        self.classes = tuple(read_json(self._source / "vocabulary.json")["names"])
        rng = np.random.default_rng(0)
        self._true = rng.integers(1, 200, (IMAGES, len(self.classes)))
        self._hard = rng.beta(8, 2, (IMAGES, 1))

    def counts(self, skill: float) -> ImageCounts:
        """What a model of this skill, 0..1, gets right of the same pictures; equal skills err in other places."""
        rng = np.random.default_rng(self._number)
        right = rng.binomial(self._true, np.clip(skill * self._hard, 0, 1))
        wrong = rng.permuted(self._true - right, axis=1)
        ids = tuple(f"picture-{row:03d}" for row in range(IMAGES))
        return ImageCounts(ids, self.classes, right, self._true, right + wrong)

    def add(
        self,
        skill: float,
        *,
        change: Callable[[dict[str, Any]], None] | None = None,
        counts: ImageCounts | None = None,
        recorded: bool = True,
        params: Mapping[str, str] | None = None,
    ) -> str:
        """Register a version, as the alias challenger; returns its number.

        Args:
            skill: of its scores on the split test.
            change: of its card.json, in place.
            counts: by picture, instead of those of its skill.
            recorded: whether its run has its scores by picture.
            params: of its run.
        """
        self._number += 1
        folder = self.root / ".lexiseg" / "made" / str(self._number)
        shutil.copytree(self._source, folder / "register")
        counts = counts or self.counts(skill)
        metrics = {"miou": float(np.nanmean(pooled_iou(counts))), "pixel_accuracy": skill}
        card = read_json(folder / "register/card.json") | {"metrics": {"test": metrics}, "made": self._number}
        if change is not None:
            change(card)
        write_json(folder / "register/card.json", card)
        tables = folder / "tables"
        tables.mkdir()
        with (tables / "test_per_class.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([("class", "iou"), *zip(counts.classes, pooled_iou(counts), strict=True)])
        if recorded:
            write_image_counts(tables / "test_images.parquet", counts)
        content = sha256_of_json(card)
        record = Record(
            method="lseg",
            experiment="lexiseg-world",
            fingerprint=content,
            tags={
                "lexiseg.fingerprint": content,
                "lexiseg.method": "lseg",
                "lexiseg.protocol_hash": card["protocol"]["hash"],
                "lexiseg.data_version": "d" * 32,
                "lexiseg.commit": "0" * 40,
            },
            params=params or {"seed": "0", "made": str(self._number)},
            metrics={f"test/{name}": value for name, value in metrics.items()},
            curves={},
            files={f"evaluate/tables/{path.name}": path for path in tables.iterdir()},
            data=("world", "d" * 32),
            model=ModelFolder(path=folder / "register", content=content, card=card),
        )
        store = connect(self.root)
        run_id, _ = publish_run(store, record)
        publish_model(store, record, run_id)
        return str(max(int(one.version) for one in store.client.search_model_versions("name = 'lexiseg-lseg'")))

    def files(self, version: str) -> Path:
        """What MLflow loads of a version."""
        store = connect(self.root)
        source = store.client.get_model_version("lexiseg-lseg", version).source
        assert source is not None
        return Path(source.removeprefix("file://"))
