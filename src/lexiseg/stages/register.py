"""Stage <method>-register: a self-contained model folder, usable without the graph that made it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lexiseg
from lexiseg.encoders.text import copy_text
from lexiseg.evaluation.cluster_scores import REGIONS, cluster_names
from lexiseg.methods import METHODS
from lexiseg.storage import read_json, write_json
from lexiseg.vocabulary import Vocabulary


def run(settings: Any, inputs: Mapping[str, Path], outputs: Path, *, method: str) -> None:
    """Write model.json, weights, vocabulary.json, the text side, the trunk and card.json.

    The card holds the data with what validation said of it, the licence of each ingredient, protocol and metrics.

    A method of clusters gets their names: those that the evaluation matched, or without labels those of the stage name.
    """
    trained, encode = inputs[f"{method}/{METHODS[method].model}"], inputs["encode"]
    config, metrics = read_json(trained / "model.json"), read_json(inputs[f"{method}/evaluate/metrics.json"])
    # The folder predicts as it was evaluated.
    config["predict"] = getattr(settings, method).predict.model_dump(mode="json")
    if METHODS[method].refiner is not None:
        config["refine"] = getattr(settings, method).refine.model_dump(mode="json")
    outputs.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(trained / "model.safetensors", outputs / "model.safetensors")
    if METHODS[method].clusters:
        shutil.copytree(inputs["encode-trunk"], outputs / "trunk", ignore=shutil.ignore_patterns("curve.csv"))
        _name_clusters(config, metrics, inputs[f"{method}/name"], outputs)
    if not METHODS[method].clusters or (outputs / REGIONS).is_file():
        copy_text(encode, outputs)
    write_json(outputs / "model.json", config)
    data = read_json(inputs["prepare"] / "info.json")
    write_json(outputs / "vocabulary.json", config["vocabulary"])
    clip = encode / "clip" / "clip.json"
    clip_licence = read_json(clip)["licence"] if clip.is_file() else None
    card = {
        "method": method,
        "package": f"lexiseg {lexiseg.__version__}",
        "data": {
            "name": data["name"],
            "content_digest": data["content_digest"],
            "validation": _validation(read_json(inputs["validate/validation.json"])),
        },
        "licences": {
            "data": data["licence"],
            "text": _text_licence(outputs, clip_licence),
            "backbone": clip_licence if config["backbone"]["source"] == "clip" else config["backbone"]["licence"],
            "code": "Apache-2.0",
        },
        "protocol": metrics["protocol"],
        "metrics": metrics["splits"],
    }
    if "imported" in config:
        card["imported"] = config["imported"]
    write_json(outputs / "card.json", card)


def _validation(found: Mapping[str, Any]) -> dict[str, Any]:
    failed = [one["name"] for one in found["expectations"] if not one["success"]]
    return {"success": found["success"], "expectations": len(found["expectations"]), "failed": sorted(failed)}


def _text_licence(folder: Path, clip_licence: str | None) -> str | None:
    path = folder / "text" / "text.json"
    if not path.is_file():
        return None  # a model of clusters without words
    text = read_json(path)
    return clip_licence if text["source"] == "clip" else text["licence"]


def _name_clusters(config: dict[str, Any], metrics: Mapping[str, Any], naming: Path, outputs: Path) -> None:
    matched = (metrics.get("clusters") or {}).get("names")
    by_text = read_json(naming / "naming.json")["names"]
    config["names"] = matched or by_text
    config["named_by"] = "labels" if matched else "text" if by_text else None
    names = config["names"] or [None] * config["clusters"]
    own = [name or cluster for name, cluster in zip(names, cluster_names(config["clusters"]), strict=True)]
    config["vocabulary"] = Vocabulary(names=tuple(dict.fromkeys(own))).to_json()
    if (naming / REGIONS).is_file():
        shutil.copyfile(naming / REGIONS, outputs / REGIONS)
