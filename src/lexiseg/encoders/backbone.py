"""The image backbone that an encode folder offers to the methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg

from lexiseg.errors import ModelError
from lexiseg.storage import load_tensors, read_json

# The names of the papers: timm's ImageNet-21k/1k ViTs at 384 px, which LSeg and DPT start from, and torchvision's first
# ImageNet weights of the ResNet, which LSeg's zero-shot network starts from; torchvision's own file fits as it is.
ALIASES = {
    "ViT-L/16": "vit_large_patch16_384",
    "ViT-B/16": "vit_base_patch16_384",
    "ViT-B/32": "vit_base_patch32_384",
    "ResNet-101": "resnet101.tv_in1k",
}


def check_name(name: str) -> str:
    """timm's name for a backbone.

    Raises:
        ModelError: timm knows no such model.
    """
    name = ALIASES.get(name, name)
    if not _is_known(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:8]
        raise ModelError(
            found=f"no backbone `{name}`",
            allowed=f"{', '.join(ALIASES)} or a name of timm" + (f", such as {', '.join(near)}" if near else ""),
            fix="`python -c 'import timm; print(timm.list_models())'` lists them all",
        )
    return name


def read_backbone(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor] | None]:
    """Config and weights (None where the backbone is the CLIP's own tower, or random).

    Raises:
        ModelError: there is none.
    """
    path = folder / "backbone" / "backbone.json"
    if not path.is_file():
        raise ModelError(
            found=f"{folder} has no backbone/backbone.json",
            allowed="a folder written by the encode stage",
            fix="run `dvc repro encode`",
        )
    config, weights = read_json(path), folder / "backbone" / "model.safetensors"
    if config["source"] == "none":
        raise ModelError(
            found="no backbone, since `encode.backbone.source` is none",
            allowed="a backbone: clip, timm or random",
            fix="choose one in params.yaml, then `dvc repro`",
        )
    return config, load_tensors(weights) if weights.is_file() else None


def _is_known(name: str) -> bool:
    try:
        return timm.is_model(name) and get_pretrained_cfg(name) is not None
    except RuntimeError:  # a name of timm with a tag that it does not have
        return False
