"""STEGO's own nodes of the graph: features, neighbours, train, probe, predict, name; and its k-means baselines.

What a single node needs and takes seconds to import (Lightning, the CLIP) is imported there.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lexiseg.data.dataset import PreparedSplit
from lexiseg.encoders.trunk import load_trunk, trunk_sha256
from lexiseg.evaluation.cluster_scores import REGIONS
from lexiseg.evaluation.matching import ClusterCounts, class_scores
from lexiseg.evaluation.predictions import PredictionWriter
from lexiseg.methods.stego.build import load_head, load_model, new_head, origin, plain_head, save_head, save_model
from lexiseg.methods.stego.diagnostics import (
    chosen_shifts,
    similarities,
    similarity_picture,
    similarity_table,
    table_lines,
    usage_picture,
)
from lexiseg.methods.stego.features import BATCH_PIXELS, FeatureStore, Pieces, write_features
from lexiseg.methods.stego.naming import names_of, region_embeddings
from lexiseg.methods.stego.neighbours import nearest_neighbours, pool, read_neighbours, save_neighbours
from lexiseg.methods.stego.segmenter import StegoSegmenter
from lexiseg.methods.stego.settings import ProbeSettings
from lexiseg.pictures import write_png
from lexiseg.storage import read_json, save_tensors, write_json, write_text
from lexiseg.vocabulary import Vocabulary

if TYPE_CHECKING:
    from lexiseg.methods.stego.probing import Fitted

_POOLED_TOGETHER = 32  # pictures whose features are in memory at a time
# Steps before a collapse is looked for: codes of an untrained head are alike.
_ALARM_AFTER = 50


def features(settings: Any, inputs: Mapping[str, Path], outputs: Path) -> None:
    """Stage stego-features: pictures of one split -> dense features of the frozen trunk, see `FeatureStore`."""
    own = settings.stego.features
    pieces = Pieces(PreparedSplit(inputs["prepare"], own.split), own)
    write_features(pieces, load_trunk(inputs["encode-trunk"]), outputs)


def neighbours(settings: Any, inputs: Mapping[str, Path], outputs: Path) -> None:
    """Stage stego-neighbours: features -> the most similar other pictures of each, int32 (N, k), and their cosines."""
    own, store = settings.stego.neighbours, FeatureStore(inputs["stego/features"])
    rows = range(0, len(store), _POOLED_TOGETHER)
    pooled = [pool(store.maps(range(start, min(start + _POOLED_TOGETHER, len(store))))) for start in rows]
    numbers, cosines = nearest_neighbours(torch.cat(pooled), count=own.count, backend=own.backend)
    save_neighbours(outputs, numbers[:, 1:], cosines[:, 1:])


def train(settings: Any, inputs: Mapping[str, Path], outputs: Path) -> None:
    """Stage stego-train: features and neighbours -> the head; curve, similarities by kind of pair, and shifts.

    Without steps, or with a head that has nothing to learn, there is no curve.
    """
    from lexiseg.methods.stego.batches import PairBatches
    from lexiseg.methods.stego.module import CollapseAlarm, StegoTraining
    from lexiseg.training import curve_csv, fit

    stego, recipe = settings.stego, settings.stego.train
    store, near = FeatureStore(inputs["stego/features"]), read_neighbours(inputs["stego/neighbours"])
    torch.manual_seed(settings.seed)
    head, config = new_head(stego.model, store=store, seed=settings.seed)
    sampling: dict[str, Any] = {"centring": stego.loss.centring, "points": stego.loss.points, "seed": settings.seed}
    if len(store) > 1:
        shifts = chosen_shifts(similarities(store, near, **sampling), stego.loss)
    if recipe.steps:
        batches = PairBatches(store, near, size=recipe.batch, seed=settings.seed)
        module = StegoTraining(head, loss=stego.loss, train=recipe, shifts=shifts)  # type: ignore[arg-type]
        curve = fit(
            module,
            batch=batches,
            steps=recipe.steps,
            seed=settings.seed,
            precision=recipe.precision,
            title="train STEGO",
            callbacks=[CollapseAlarm(recipe.alarm, after=min(_ALARM_AFTER, recipe.steps - 1))],
        )
        write_text(outputs / "curve.csv", curve_csv(curve))
    head.eval().requires_grad_(False)
    if len(store) > 1:
        found = similarities(store, near, **sampling, head=head)
        table = similarity_table(found, shifts, limit=recipe.alarm)
        print("\n".join(table_lines(table)))
        write_json(outputs / "similarities.json", table)
        write_png(outputs / "pictures" / "similarities.png", similarity_picture(found, shifts))
    model = {"method": "stego", "head": config, "backbone": _backbone(inputs)}
    save_head(outputs, head, model | origin(stego.model))


def _backbone(inputs: Mapping[str, Path]) -> dict[str, Any]:
    """What model.json says of the trunk."""
    folder = inputs["encode-trunk"]
    trunk = read_json(folder / "trunk.json")
    return {"source": trunk["source"], "licence": trunk.get("licence"), "sha256": trunk_sha256(folder)}


def probe(settings: Any, inputs: Mapping[str, Path], outputs: Path) -> None:
    """Stage stego-probe: codes -> cluster centres, and a linear probe where there are labels."""
    from lexiseg.methods.stego.probing import loaded_probes

    stego = settings.stego
    head, own = load_head(inputs["stego/train"])
    config = read_json(inputs["stego/train"] / "model.json")
    if stego.probe.kind == "model":
        store = FeatureStore(inputs["stego/features"])
        fitted = loaded_probes(stego.model, head, own, store=store, seed=settings.seed, linear=stego.probe.linear)
    else:
        fitted = _fit(head, own, stego.probe, settings, inputs)
    _save(fitted, config, inputs, outputs)


def _fit(
    head: nn.Module, config: Mapping[str, Any], probe: ProbeSettings, settings: Any, inputs: Mapping[str, Path]
) -> Fitted:
    from lexiseg.methods.stego.probing import fit_probes

    own = settings.stego.features
    return fit_probes(
        head,
        config,
        store=FeatureStore(inputs["stego/features"]),
        pieces=Pieces(PreparedSplit(inputs["prepare"], own.split), own),
        prepared=inputs["prepare"],
        settings=probe,
        protocol=settings.stego.protocol,
        seed=settings.seed,
    )


def _save(fitted: Fitted, config: Mapping[str, Any], inputs: Mapping[str, Path], outputs: Path) -> None:
    from lexiseg.training import curve_csv

    if fitted.curve:
        write_text(outputs / "curve.csv", curve_csv(fitted.curve))
    vocabulary = Vocabulary.from_json(read_json(inputs["prepare"] / "vocabulary.json"))
    model = {
        **config,
        "clusters": len(fitted.model.probe.centres),
        "classes": list(fitted.classes) or None,
        "names": None,
        "vocabulary": vocabulary.to_json(),
        "stand_ins": {},
    }
    save_model(outputs, fitted.model, model)
    write_json(outputs / "clusters.json", {"mean_cosine": fitted.mean_cosine, "usage": fitted.usage})
    write_png(outputs / "pictures" / "usage.png", usage_picture(fitted.usage))


def predict(settings: Any, inputs: Mapping[str, Path], outputs: Path) -> None:
    """Stage stego-predict: score maps of the evaluated splits, and of the one that names the clusters."""
    _predict(settings, inputs["stego/probe"], inputs, outputs)


def _predict(settings: Any, folder: Path, inputs: Mapping[str, Path], outputs: Path) -> None:
    options = settings.stego.predict.model_dump()
    segmenter = StegoSegmenter.load(folder, encode=inputs["encode-trunk"], predict=options)
    splits = list(dict.fromkeys([*settings.evaluate.splits, *filter(None, [settings.stego.match.split])]))
    with PredictionWriter(outputs) as writer:
        for name in splits:
            split = PreparedSplit(inputs["prepare"], name)
            waiting: list[tuple[str, np.ndarray]] = []
            for index, id in enumerate(tqdm(split.ids, desc=f"predict {name}", unit="image", mininterval=1)):
                image = split.image(index)
                full = (len(waiting) + 1) * image[..., 0].size > BATCH_PIXELS
                if waiting and (full or waiting[0][1].shape != image.shape):
                    _flush(writer, segmenter, name, waiting)
                waiting.append((id, image))
            _flush(writer, segmenter, name, waiting)


def _flush(
    writer: PredictionWriter, segmenter: StegoSegmenter, split: str, waiting: list[tuple[str, np.ndarray]]
) -> None:
    if waiting:
        found = segmenter.score_maps([image for _, image in waiting])
        for (id, _), maps in zip(waiting, found, strict=True):
            writer.add(split, segmenter.maps, id, maps)
        waiting.clear()


def kmeans_predict(settings: Any, inputs: Mapping[str, Path], outputs: Path, *, kind: str) -> None:
    """Stage kmeans-predict@<kind>: the same probes on features without STEGO's head, then the same prediction."""
    own, probe, store = settings.stego.model, settings.stego.probe, FeatureStore(inputs["stego/features"])
    code: Any = "none" if kind == "raw" else kind
    head, config = plain_head(code, dim=own.dim, tokens=own.tokens, store=store, seed=settings.seed)
    if probe.kind == "model":  # which has centres for STEGO's codes alone
        probe = probe.model_copy(update={"kind": "kmeans"})
    folder = outputs / "model"
    folder.mkdir(parents=True)
    model = {"method": "stego", "head": config, "backbone": _backbone(inputs)}
    _save(_fit(head, config, probe, settings, inputs), model, inputs, folder)
    _predict(settings, folder, inputs, outputs)


def name(settings: Any, inputs: Mapping[str, Path], outputs: Path) -> None:
    """Stage stego-name: names of the clusters that need no label, by what a CLIP sees in their regions.

    Writes naming.json: `names` (null without a CLIP or without class names) and, where labels could be counted,
    what the names are worth; and regions.safetensors, by which a registered model answers to other words.
    """
    from lexiseg.encoders.clip import load_clip

    clip_folder, text_file = inputs["encode"] / "clip", inputs["encode"] / "text" / "text.json"
    reason = None
    if not clip_folder.is_dir() or not text_file.is_file() or read_json(text_file)["source"] != "clip":
        reason = "no CLIP: `encode.text.source` is not clip"
    elif not (clip := load_clip(clip_folder)).is_dense:
        reason = "the image tower of `encode.clip` is no ViT, so there are no embeddings of regions"
    if reason is not None:
        write_json(outputs / "naming.json", {"names": None, "splits": {}, "reason": reason})
        return
    own = settings.stego.features
    model, _ = load_model(inputs["stego/probe"])
    pieces = Pieces(PreparedSplit(inputs["prepare"], own.split), own)
    regions = region_embeddings(model, FeatureStore(inputs["stego/features"]), pieces, clip)
    save_tensors(outputs / REGIONS, {"regions": regions})
    result = _names_by_text(regions, inputs)
    write_json(outputs / "naming.json", result)


def _names_by_text(regions: Tensor, inputs: Mapping[str, Path]) -> dict[str, Any]:
    from lexiseg.encoders.text import load_text

    metrics = read_json(inputs["stego/evaluate/metrics.json"])
    labels = metrics.get("clusters", {}).get("classes") or []
    if not labels:
        return {"names": None, "splits": {}, "reason": "no class names in the data set"}
    names = names_of(regions, load_text(inputs["encode"]).embed(labels), labels)
    splits = {}
    for file in sorted(inputs["stego/evaluate/tables"].glob("*_cluster_classes.csv")):
        splits[file.name.removesuffix("_cluster_classes.csv")] = _worth(file, names)
    return {"names": names, "splits": splits}


def _worth(file: Path, names: list[str]) -> dict[str, float | None]:
    """mIoU and accuracy of clusters with these names, from the pixels by cluster and true class."""
    with file.open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    found = ClusterCounts(len(rows), len(header) - 1)
    found.counts += np.array([[int(value) for value in row[1:]] for row in rows], dtype=np.int64)
    table = found.matched(np.array([header[1:].index(one) for one in names]))
    return {f"text_named_{key}": value for key, value in class_scores(table).items()}
