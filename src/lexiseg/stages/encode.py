"""Stage encode: the frozen encoders of params.yaml's `encode` as one folder, whatever they came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexiseg.data.dataset import PreparedSplit
from lexiseg.encoders.clip import copy_clip, save_open_clip, save_tiny_clip
from lexiseg.encoders.from_timm import save_backbone
from lexiseg.encoders.text import save_text
from lexiseg.errors import SettingsError
from lexiseg.storage import read_json, write_text
from lexiseg.training import curve_csv
from lexiseg.vocabulary import Vocabulary
from lexiseg.workspace import resolve_model, resolve_weights


def run(settings: Any, inputs: Mapping[str, Path], outputs: Path) -> None:
    """Write clip/ and text/, unless there is none, and backbone/, which may say that there is none."""
    encode = settings.encode
    if encode.clip.source == "none" and "clip" in (encode.text.source, encode.backbone.source):
        raise SettingsError(
            found="`encode.clip.source: none` while `encode.text.source` or `encode.backbone.source` is clip",
            allowed="a CLIP for what uses one",
            fix="choose a CLIP, or another source of text and backbone",
        )
    vocabulary = Vocabulary.from_json(read_json(inputs["prepare"] / "vocabulary.json"))
    if encode.clip.source == "pretrain":
        from lexiseg.encoders.pretrain import pretrain

        names = [encode.pretrain.scenes]
        if encode.pretrain.iconic in read_json(inputs["prepare"] / "info.json")["splits"]:
            names.append(encode.pretrain.iconic)
        splits = {name: PreparedSplit(inputs["prepare"], name) for name in names}
        model, tokenizer, curve = pretrain(splits, encode.pretrain, seed=settings.seed)
        save_tiny_clip(model, tokenizer, outputs / "clip")
        write_text(outputs / "clip" / "curve.csv", curve_csv(curve))
    elif encode.clip.source == "open_clip":
        weights = resolve_weights(str(encode.clip.weights))
        save_open_clip(
            outputs / "clip",
            name=str(encode.clip.model),
            pretrained=str(weights if weights.is_file() else encode.clip.weights),
            sha256=encode.clip.sha256,
            licence=str(encode.clip.licence),
        )
    elif encode.clip.source == "model":
        folder = resolve_model(str(encode.clip.weights), sha256=encode.clip.sha256, setting="encode.clip.sha256")
        copy_clip(folder, outputs)
    save_text(outputs, encode.text, vocabulary)
    save_backbone(outputs, encode.backbone)
