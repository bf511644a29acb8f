"""Stage <method>-register: a self-contained model folder, usable without the graph that made it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lexiseg
from lexiseg.encoders.text import copy_text
from lexiseg.methods import METHODS
from lexiseg.storage import read_json, write_json


def run(settings: Any, inputs: Mapping[str, Path], outputs: Path, *, method: str) -> None:
    """Write model.json, weights, vocabulary.json, the text side and card.json (licences, protocol, metrics)."""
    trained, encode = inputs[f"{method}/train"], inputs["encode"]
    config, metrics = read_json(trained / "model.json"), read_json(inputs[f"{method}/evaluate/metrics.json"])
    # The folder predicts as it was evaluated.
    config["predict"] = getattr(settings, method).predict.model_dump(mode="json")
    if METHODS[method].refiner is not None:
        config["refine"] = getattr(settings, method).refine.model_dump(mode="json")
    write_json(outputs / "model.json", config)
    shutil.copyfile(trained / "model.safetensors", outputs / "model.safetensors")
    copy_text(encode, outputs)
    data = read_json(inputs["prepare"] / "info.json")
    write_json(outputs / "vocabulary.json", config["vocabulary"])
    clip, text = encode / "clip" / "clip.json", read_json(encode / "text" / "text.json")
    clip_licence = read_json(clip)["licence"] if clip.is_file() else None
    card = {
        "method": method,
        "package": f"lexiseg {lexiseg.__version__}",
        "data": {"name": data["name"], "content_digest": data["content_digest"]},
        "licences": {
            "data": data["licence"],
            "text": clip_licence if text["source"] == "clip" else text["licence"],
            "backbone": clip_licence if config["backbone"]["source"] == "clip" else config["backbone"]["licence"],
            "code": "Apache-2.0",
        },
        "protocol": metrics["protocol"],
        "metrics": metrics["splits"],
    }
    if "imported" in config:
        card["imported"] = config["imported"]
    write_json(outputs / "card.json", card)
