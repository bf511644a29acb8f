"""The stage `<method>-evaluate`: predictions become metrics, tables and pictures.

metrics.json                        {"method", "protocol": {name, hash, card}, "splits": {split: metrics}}
tables/<split>_per_class.csv        a row per class
tables/<split>_confusions.csv       the most frequent mistakes (not of episodes, where classes do not compete)
pictures/<split>_<k>.png            photo, truth, prediction
pictures/<split>_overview.png       all of them on one sheet
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lexiseg.evaluation.episodes import evaluate_episodes
from lexiseg.evaluation.evaluate import SplitResult, evaluate_split
from lexiseg.evaluation.protocol import load_protocol
from lexiseg.evaluation.sheets import example_picture, overview_picture
from lexiseg.methods import METHODS, resolve
from lexiseg.pictures import write_png
from lexiseg.storage import read_json, write_json, write_text
from lexiseg.vocabulary import Vocabulary

PER_CLASS: tuple[str, ...] = (
    "class",
    "seen",
    "thing",
    "iou",
    "accuracy",
    "boundary_f",
    "pixels_true",
    "pixels_predicted",
)
PER_EPISODE_CLASS: tuple[str, ...] = ("class", "seen", "episodes", "iou", "intersection", "union")
CONFUSIONS: tuple[str, ...] = ("true", "predicted", "pixels", "share")


def run(settings: Any, inputs: Mapping[str, Path], outputs: Path, *, method: str) -> None:
    """Evaluate one method's predictions on every split of `evaluate.splits`.

    Args:
        settings: root settings; `evaluate` is read.
        inputs: "prepare", and "<method>/predict" with the predictions.
        outputs: folder to write to.
        method: name of the method as in outputs/, such as "lseg" or "baselines/maskclip".

    Raises:
        SettingsError: an unknown protocol.
        ProtocolError: a protocol that does not fit the data set.
        DataError: an unknown split, or predictions that do not belong to the prepared data.
    """
    prepared, predictions = inputs["prepare"], inputs[f"{method}/predict"]
    info = read_json(prepared / "info.json")
    vocabulary = Vocabulary.from_json(read_json(prepared / "vocabulary.json"))
    protocol = load_protocol(settings.evaluate.protocol).resolve(
        vocabulary=vocabulary,
        dataset=info["name"],
        adapter=info["adapter"],
        templates=_templates(settings.encode.text, vocabulary),
        boundary_tolerance=settings.evaluate.boundary_tolerance,
        episodes=settings.evaluate.episodes,
        inference=_inference(settings, method),
    )
    refine = _refiner(settings, method)
    entry = METHODS.get(method)
    overlapping = entry is not None and entry.overlapping
    # In episodes there is no background to be found.
    measure = evaluate_episodes if protocol.episodes else partial(evaluate_split, overlapping=overlapping)
    metrics = {}
    for split in settings.evaluate.splits:
        result = measure(
            predictions=predictions,
            prepared=prepared,
            split=split,
            protocol=protocol,
            pictures=settings.evaluate.pictures,
            refine=refine,
        )
        metrics[split] = result.metrics
        _write_tables(outputs / "tables", split, result, episodes=bool(protocol.episodes))
        _write_pictures(outputs / "pictures", split, result, vocabulary.unseen_names)
    write_json(outputs / "metrics.json", {"method": method, "protocol": protocol.entry(), "splits": metrics})


def _refiner(settings: Any, method: str) -> Any:
    entry = METHODS.get(method)
    if entry is None or entry.refiner is None:
        return None
    return resolve(entry.refiner)(getattr(settings, method).refine.model_dump(mode="json"))


def _inference(settings: Any, method: str) -> dict[str, Any]:
    # Baselines see each picture once and whole.
    if method.startswith("baselines/"):
        return {}
    own = getattr(settings, method)
    return own.predict.card() | (own.refine.card() if METHODS[method].refiner else {})


def _templates(text: Any, vocabulary: Vocabulary) -> tuple[str, ...]:
    if text.source == "table":
        return ()
    return vocabulary.templates if text.templates == "vocabulary" else ("{}",)


def _write_tables(folder: Path, split: str, result: SplitResult, *, episodes: bool) -> None:
    tables = [("per_class", PER_EPISODE_CLASS if episodes else PER_CLASS, result.per_class)]
    if not episodes:
        tables.append(("confusions", CONFUSIONS, result.confusions))
    for name, columns, rows in tables:
        stream = io.StringIO()
        table = csv.DictWriter(stream, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_text(folder / f"{split}_{name}.csv", stream.getvalue())


def _write_pictures(folder: Path, split: str, result: SplitResult, unseen: Sequence[str]) -> None:
    for number, example in enumerate(result.examples):
        picture = example_picture(example, classes=result.classes, unseen=unseen)
        write_png(folder / f"{split}_{number}.png", picture)
    if result.examples:
        picture = overview_picture(result.examples, classes=result.classes, unseen=unseen)
        write_png(folder / f"{split}_overview.png", picture)
