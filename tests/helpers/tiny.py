"""Networks, folders and settings so small that whole stages run in a second."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from helpers.micro import save, write_photos
from lexiseg.data.settings import DataSettings
from lexiseg.encoders.clip import save_tiny_clip
from lexiseg.encoders.from_timm import save_backbone
from lexiseg.encoders.settings import EncodeSettings
from lexiseg.encoders.text import save_text
from lexiseg.encoders.tiny_clip import TinyClip, TinyClipConfig
from lexiseg.encoders.tokenizer import WordTokenizer
from lexiseg.settings import override, parse, read_yaml
from lexiseg.stages import prepare
from lexiseg.stages.settings import parse_settings
from lexiseg.storage import read_json, sha256_of_file, write_json
from lexiseg.vocabulary import Vocabulary

SMALL: dict[str, Any] = {
    "threads": 1,
    "data.workers": 1,
    "encode.pretrain.steps": 2,
    "encode.pretrain.warmup": 1,
    "encode.pretrain.iconic_batch": 4,
    "encode.pretrain.scene_batch": 4,
    "encode.pretrain.vision_layers": 2,
    "encode.self_supervised.pictures": 4,
    "encode.self_supervised.crop": 16,
    "encode.self_supervised.steps": 2,
    "encode.self_supervised.batch": 2,
    "encode.self_supervised.warmup": 1,
    "encode.self_supervised.layers": 1,
    "encode.self_supervised.prototypes": 4,
    "evaluate.splits": ["test"],
    "baseline.linear.steps": 2,
    "baseline.linear.batch": 2,
    "lseg.model.features": 8,
    "lseg.train.steps": 2,
    "lseg.train.warmup": 1,
    "lseg.train.batch": 2,
    "stego.protocol": "clusters",
    "stego.features.pictures": None,
    "stego.neighbours.count": 2,
    "stego.model.dim": 4,
    "stego.loss.points": 3,
    "stego.train.steps": 2,
    "stego.train.batch": 2,
    "stego.probe.tokens": 40,
    "stego.probe.restarts": 2,
    "stego.probe.steps": 2,
    "stego.probe.batch": 2,
    "tcl.train.steps": 2,
    "tcl.train.warmup": 1,
    "tcl.train.batch": 2,
}
CAPTIONS = ["a small ring on grass", "grass", "a red ring", "sky over grass"]


def settings(changes: Mapping[str, Any] | None = None) -> Any:
    """The embedded profile made small, with changes by dotted keys."""
    return parse_settings(_values(changes))


def encode_settings(changes: Mapping[str, Any] | None = None) -> EncodeSettings:
    """The block `encode` alone, whatever the other blocks would need to go with it."""
    return parse(_values(changes)["encode"], EncodeSettings)


def _values(changes: Mapping[str, Any] | None) -> dict[str, Any]:
    values = read_yaml(Path(__file__).parents[2] / "profiles/embedded.yaml")
    return override(values, {**SMALL, **(changes or {})})


def prepared(folder: Path, *, height: int = 16, width: int = 16, counts: Mapping[str, int] | None = None) -> Path:
    """A prepared data set: grass, sky and ring (unseen), every picture labelled and captioned.

    Args:
        folder: where raw/ and prepare/ are written.
        height: of the pictures; those of the split `iconic` are 8 x 8.
        width: of the pictures.
        counts: pictures per split.

    Returns:
        The output folder of prepare.
    """
    raw, lines = folder / "raw", []
    for split, count in (counts or {"train": 4, "iconic": 4, "test": 3}).items():
        for number in range(count):
            rng = np.random.default_rng([number, len(split)])
            size = (8, 8) if split == "iconic" else (height, width)
            save(raw / f"images/{split}/{number}.png", rng.integers(0, 256, (*size, 3), dtype=np.uint8))
            save(raw / f"masks/{split}/{number}.png", rng.integers(0, 3, size, dtype=np.uint8))
            lines.append({"image": f"{split}/{number}.png", "captions": [CAPTIONS[number % 4]]})
    (raw / "classes.txt").write_text("0 grass | lawn\n1 sky\n2 ring [unseen] [thing]\n", encoding="utf-8")
    (raw / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return prepare_again(folder)


def validated(folder: Path) -> dict[str, Path]:
    """The input that stages have from validate: data that passed."""
    file = folder / "validation.json"
    write_json(file, {"success": True, "expectations": [{"name": "readable", "success": True}]})
    return {"validate/validation.json": file}


def prepared_photos(folder: Path) -> Path:
    """A prepared data set of three pictures in the split train, without labels, captions and classes."""
    write_photos(folder / "raw")
    return prepare_again(folder)


def prepare_again(folder: Path) -> Path:
    """Prepare folder/raw, after a test changed it."""
    changes = {"data.name": "tiny", "data.adapter": "folder"}
    block = parse(_values(changes)["data"], DataSettings)
    shutil.rmtree(folder / "prepare", ignore_errors=True)
    prepare.run(SimpleNamespace(data=block), {"data": folder / "raw"}, folder / "prepare")
    return folder / "prepare"


def prepared_with_fault(folder: Path, fault: str) -> Path:
    """Two training pictures, the second without its mask ("mask") or lower than the first ("size")."""
    prepared(folder, counts={"train": 2})
    if fault == "mask":
        (folder / "raw/masks/train/1.png").unlink()
    else:
        for kind, shape in (("images", (12, 16, 3)), ("masks", (12, 16))):
            save(folder / f"raw/{kind}/train/1.png", np.zeros(shape, np.uint8))
    return prepare_again(folder)


def tiny_clip(*, seed: int = 0, image_size: int = 16, vision_layers: int = 2) -> tuple[TinyClip, WordTokenizer]:
    """A tiny CLIP with random weights, and its tokenizer."""
    tokenizer = WordTokenizer.from_captions(CAPTIONS, context_length=12)
    config = TinyClipConfig(
        vocab_size=tokenizer.vocab_size,
        image_size=image_size,
        width=32,
        vision_layers=vision_layers,
        text_layers=1,
        heads=2,
        context_length=12,
        embed_dim=24,
    )
    torch.manual_seed(seed)
    model = TinyClip(config)
    with torch.no_grad():  # the logits of a fresh text tower are all alike
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), tokenizer


def encoded(folder: Path, *, changes: Mapping[str, Any] | None = None, vocabulary: Vocabulary | None = None) -> Path:
    """An encode folder with a random tiny CLIP (where it is used), and text and backbone as the settings say."""
    encode = encode_settings(changes)
    if encode.clip.source == "pretrain":
        save_tiny_clip(*tiny_clip(), folder / "clip")
    save_text(folder, encode.text, Vocabulary(names=("grass", "sky", "ring")) if vocabulary is None else vocabulary)
    save_backbone(folder, encode.backbone)
    return folder


def vocabulary_of(prepare_folder: Path) -> Vocabulary:
    """The vocabulary of a prepared data set."""
    return Vocabulary.from_json(read_json(prepare_folder / "vocabulary.json"))


def open_clip_model(folder: Path, *, name: str = "lexiseg-test", **vision: Any) -> Any:
    """A small open_clip architecture, made known under `name`, with random weights; `vision` changes its tower."""
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, **vision},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    return open_clip.create_model(name, pretrained=None).eval()


def small_vit(*, patch: int = 16, depth: int = 4, dim: int = 32, side: int = 4) -> Any:
    """A ViT of timm with a few thousand weights, all random, norms and positions too."""
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=side * patch,
        patch_size=patch,
        embed_dim=dim,
        depth=depth,
        num_heads=2,
        mlp_ratio=2,
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit.eval()


def timm_backbone(folder: Path, name: str = "mobilenetv3_small_050") -> dict[str, Any]:
    """Settings of a timm backbone whose weight file (random weights) is in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    path = folder / f"{name}.safetensors"
    save_file(timm.create_model(name, pretrained=False).state_dict(), path)
    block = {
        "source": "timm",
        "name": name,
        "weights": str(path),
        "sha256": sha256_of_file(path),
        "licence": "Apache-2.0",
    }
    return {f"encode.backbone.{key}": value for key, value in block.items()}


def text_table(folder: Path, names: Sequence[str], *, dim: int = 24) -> dict[str, Any]:
    """Settings of a text side that is a table of random vectors in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path, names_path = folder / "table.npy", folder / "table.names.txt"
    np.save(path, np.random.default_rng(0).normal(size=(len(names), dim)).astype(np.float16))
    names_path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    block = {"source": "table", "path": str(path), "sha256": sha256_of_file(path, names_path), "licence": "MIT"}
    return {f"encode.text.{key}": value for key, value in block.items()}
