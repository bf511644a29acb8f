"""The image backbone that an encode folder offers to the methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg

from lexiseg.encoders.settings import BackboneSettings
from lexiseg.errors import ModelError
from lexiseg.storage import load_tensors, read_json, save_tensors, write_json
from lexiseg.workspace import resolve_weights

# The names of the papers: timm's ImageNet-21k/1k ViTs at 384 px, which LSeg and DPT start from, and torchvision's first
# ImageNet weights of the ResNet, which LSeg's zero-shot network starts from; torchvision's own file fits as it is.
ALIASES = {
    "ViT-L/16": "vit_large_patch16_384",
    "ViT-B/16": "vit_base_patch16_384",
    "ViT-B/32": "vit_base_patch32_384",
    "ResNet-101": "resnet101.tv_in1k",
}


def save_backbone(folder: Path, settings: BackboneSettings) -> None:
    """Write `folder/backbone`: its name, preprocessing and, where there are any, its weights.

    Raises:
        ModelError: unknown name, or weights that cannot be read or do not fit.
    """
    target = folder / "backbone"
    target.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"source": settings.source, "options": settings.options, "licence": settings.licence}
    if settings.source != "clip":
        name = check_name(str(settings.name))
        config |= {"name": name}
        if settings.source == "timm":
            save_tensors(target / "model.safetensors", _weights(name, settings))
        statistics = get_pretrained_cfg(name)
        assert statistics is not None  # check_name
        config["mean"] = list(settings.mean or statistics.mean)
        config["std"] = list(settings.std or statistics.std)
    write_json(target / "backbone.json", config)


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
    """Config and weights (None where the backbone is the CLIP's own tower, or random)."""
    path = folder / "backbone" / "backbone.json"
    if not path.is_file():
        raise ModelError(
            found=f"{folder} has no backbone/backbone.json",
            allowed="a folder written by the encode stage",
            fix="run `dvc repro encode`",
        )
    weights = folder / "backbone" / "model.safetensors"
    return read_json(path), load_tensors(weights) if weights.is_file() else None


def _is_known(name: str) -> bool:
    try:
        return timm.is_model(name) and get_pretrained_cfg(name) is not None
    except RuntimeError:  # a name of timm with a tag that it does not have
        return False


def _weights(name: str, settings: BackboneSettings) -> dict[str, torch.Tensor]:
    # Without the ImageNet classifier, which a dense method has no use for.
    options: dict[str, Any] = {"num_classes": 0, **settings.options}
    if settings.weights == "hub":
        return _from_hub(name, options)
    state = load_tensors(resolve_weights(str(settings.weights)), sha256=settings.sha256)
    own = timm.create_model(name, pretrained=False, **options).state_dict()
    missing = sorted(own.keys() - state.keys())
    wrong = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    if missing or wrong:
        raise ModelError(
            found=f"{settings.weights} lacks {len(missing)} tensors ({', '.join(missing[:3])}) "
            f"and has {len(wrong)} of another shape ({', '.join(wrong[:3])})",
            allowed=f"the weights of timm's {settings.name}",
            fix="check `encode.backbone.name` and `encode.backbone.weights`",
        )
    return {key: state[key] for key in own}


def _from_hub(name: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    try:
        return timm.create_model(name, pretrained=True, **options).state_dict()
    except (OSError, RuntimeError) as error:
        raise ModelError(
            found=f"the weights of {name} could not be fetched: {' '.join(str(error).split())[:300]}",
            allowed="a network connection, or a local weight file",
            fix="allow the download (HF_HUB_OFFLINE=0 dvc repro encode); or `lexiseg weights add FILE` and set "
            "`encode.backbone.weights` to it",
        ) from error
