"""The stage `<method>-evaluate`: predictions become metrics, tables and pictures.

metrics.json                        {"method", "protocol": {name, hash, card}, "splits": {split: metrics}}; of clusters
                                    also "clusters": {"matched_on", "names", "classes"}: the class of each cluster
                                    (null: none) and the split whose labels say so, both null without labels; all
                                    classes
tables/<split>_per_class.csv        a row per class, of clusters without the column `seen`
tables/<split>_images.parquet       pixels by picture and class (`lexiseg.evaluation.image_counts`)
tables/<split>_confusions.csv       the most frequent mistakes (not of episodes, where classes do not compete)
tables/<split>_clusters.csv         a row per cluster
tables/<split>_cluster_classes.csv  labelled pixels by cluster (rows) and class
pictures/<split>_<k>.png            photo, truth, prediction; photo and clusters where no labels are read
pictures/<split>_overview.png       all of them on one sheet
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lexiseg.evaluation.cluster_scores import cluster_names
from lexiseg.evaluation.clusters import count_clusters, evaluate_clusters
from lexiseg.evaluation.coarse import evaluated_classes
from lexiseg.evaluation.episodes import evaluate_episodes
from lexiseg.evaluation.evaluate import SplitResult, evaluate_split
from lexiseg.evaluation.image_counts import write_image_counts
from lexiseg.evaluation.protocol import EVALUATED, Matching, ProtocolCard, load_protocol
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
# To clusters no class was labelled in training.
PER_CLUSTERED_CLASS: tuple[str, ...] = tuple(column for column in PER_CLASS if column != "seen")
PER_EPISODE_CLASS: tuple[str, ...] = ("class", "seen", "episodes", "iou", "intersection", "union")
CONFUSIONS: tuple[str, ...] = ("true", "predicted", "pixels", "share")
CLUSTERS: tuple[str, ...] = ("cluster", "class", "pixels", "share", "cosine", "precision")


def run(settings: Any, inputs: Mapping[str, Path], outputs: Path, *, method: str) -> None:
    """Evaluate one method's predictions on every split of `evaluate.splits`.

    Args:
        settings: root settings; `evaluate` is read, and the method's block. Of methods of clusters, and of baselines
            that stand beside one, that block has the protocol, too.
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
    owner = _clusters_as(method)
    asked = getattr(settings, owner) if owner else settings.evaluate
    protocol = load_protocol(asked.protocol).resolve(
        vocabulary=vocabulary,
        dataset=info["name"],
        adapter=info["adapter"],
        # Clusters are found without names, and there is nothing that they could be asked for.
        templates=() if owner else _templates(settings.encode.text, vocabulary),
        boundary_tolerance=settings.evaluate.boundary_tolerance,
        episodes=None if owner else settings.evaluate.episodes,
        inference=_inference(settings, owner or method, predictions),
    )
    how: dict[str, Any] = {
        "predictions": predictions,
        "prepared": prepared,
        "protocol": protocol,
        "pictures": settings.evaluate.pictures,
        "refine": _refiner(settings, owner or method),
    }
    if owner:
        measure = partial(evaluate_clusters, **how)
    elif protocol.episodes:  # in which there is no background to be found
        measure = partial(evaluate_episodes, **how)
    else:
        entry = METHODS.get(method)
        measure = partial(evaluate_split, **how, overlapping=entry is not None and entry.overlapping)
    metrics: dict[str, Any] = {}
    clusters: dict[str, Any] = {}
    for split in settings.evaluate.splits:
        result = measure(split=split)
        metrics[split] = result.metrics
        _write_tables(outputs / "tables", split, result, protocol)
        # Of clusters there is nothing to mark.
        _write_pictures(outputs / "pictures", split, result, () if owner else vocabulary.unseen_names)
        if result.clusters is not None and not clusters:
            classes = evaluated_classes(protocol, vocabulary).names
            named = {"matched_on": result.clusters.matched_on, "names": list(result.clusters.names) or None}
            clusters = {"clusters": named | {"classes": list(classes)}}
            if isinstance(protocol.matching, Matching) and protocol.matching.split != EVALUATED:
                measure = partial(measure, names=result.clusters.names)  # the same for all splits
    content = {"method": method, "protocol": protocol.entry(), "splits": metrics}
    write_json(outputs / "metrics.json", content | clusters)


def _clusters_as(method: str) -> str | None:
    """The method of clusters whose settings say how a method is evaluated: itself, or the one it is a baseline of."""
    for name, entry in METHODS.items():
        if entry.clusters and (method == name or method.startswith(f"baselines/{entry.baselines}-")):
            return name
    return None


def _refiner(settings: Any, method: str) -> Any:
    entry = METHODS.get(method)
    if entry is None or entry.refiner is None:
        return None
    return resolve(entry.refiner)(getattr(settings, method).refine.model_dump(mode="json"))


def _inference(settings: Any, method: str, predictions: Path) -> dict[str, Any]:
    # Baselines of methods without clusters see each picture once and whole.
    if method.startswith("baselines/"):
        return {}
    own, entry = getattr(settings, method), METHODS[method]
    card = own.predict.card() | (own.refine.card() if entry.refiner else {})
    if not entry.clusters:
        return card
    return card | own.match.card(clusters=count_clusters(predictions, settings.evaluate.splits[0]))


def _templates(text: Any, vocabulary: Vocabulary) -> tuple[str, ...]:
    if text.source in ("table", "none"):
        return ()
    return vocabulary.templates if text.templates == "vocabulary" else ("{}",)


def _write_tables(folder: Path, split: str, result: SplitResult, protocol: ProtocolCard) -> None:
    def write(name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows([columns, *rows])
        write_text(folder / f"{split}_{name}.csv", stream.getvalue())

    def write_rows(name: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
        write(name, columns, [[row[column] for column in columns] for row in rows])

    if protocol.labelled:
        columns = PER_CLUSTERED_CLASS if protocol.of_clusters else PER_CLASS
        write_rows("per_class", PER_EPISODE_CLASS if protocol.episodes else columns, result.per_class)
    if result.by_image is not None:
        write_image_counts(folder / f"{split}_images.parquet", result.by_image)
    if protocol.labelled and not protocol.episodes:
        write_rows("confusions", CONFUSIONS, result.confusions)
    if result.clusters is not None:
        write_rows("clusters", CLUSTERS, result.clusters.rows)
    if result.clusters is not None and protocol.labelled:
        names, counts = cluster_names(len(result.clusters.counts)), result.clusters.counts.tolist()
        rows = ([name, *row] for name, row in zip(names, counts, strict=True))
        write("cluster_classes", ("cluster", *result.classes), rows)


def _write_pictures(folder: Path, split: str, result: SplitResult, unseen: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)  # also where no picture is asked for
    for number, example in enumerate(result.examples):
        picture = example_picture(example, classes=result.classes, unseen=unseen)
        write_png(folder / f"{split}_{number}.png", picture)
    if result.examples:
        picture = overview_picture(result.examples, classes=result.classes, unseen=unseen)
        write_png(folder / f"{split}_overview.png", picture)
