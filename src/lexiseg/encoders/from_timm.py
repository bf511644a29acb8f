"""Models of timm by name: their weights, from a file or the hub, and the backbone of an encode folder made of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg

from lexiseg.encoders.backbone import check_name
from lexiseg.encoders.settings import BackboneSettings
from lexiseg.errors import ModelError
from lexiseg.foreign import read_checkpoint
from lexiseg.storage import check_sha256, save_tensors, write_json
from lexiseg.workspace import resolve_weights

# What self-supervised trainings put before a backbone's names; of student and teacher, the teacher is what is meant.
_OWNERS, _WRAPPERS = ("", "teacher."), ("", "backbone.", "module.", "module.backbone.")
_PREFIXES = [owner + wrapper for owner in _OWNERS for wrapper in _WRAPPERS]


def save_backbone(folder: Path, settings: BackboneSettings) -> None:
    """Write `folder/backbone`: its name, preprocessing and, where there are any, its weights; or that there is none.

    Raises:
        ModelError: unknown name, or weights that cannot be read or do not fit.
    """
    target = folder / "backbone"
    target.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"source": settings.source, "options": settings.options, "licence": settings.licence}
    if settings.source not in ("clip", "none"):
        name = check_name(str(settings.name))
        config |= {"name": name}
        if settings.source == "timm":
            # Without the ImageNet classifier, which a dense method has no use for.
            weights = timm_weights(
                name,
                weights=str(settings.weights),
                sha256=settings.sha256,
                options={"num_classes": 0, **settings.options},
                block="encode.backbone",
            )
            save_tensors(target / "model.safetensors", weights)
        mean, std = statistics_of(name)
        config["mean"] = list(settings.mean or mean)
        config["std"] = list(settings.std or std)
    write_json(target / "backbone.json", config)


def timm_weights(
    name: str, *, weights: str, sha256: str | None, options: dict[str, Any], block: str
) -> dict[str, torch.Tensor]:
    """The state dict of a model of timm.

    Args:
        name: timm's.
        weights: a safetensors file or what torch.save wrote, or "hub". A file may hold more, such as a classifier or
            the head of a self-supervised training, and its names may begin with `teacher.`, `module.` and `backbone.`.
        sha256: expected hash of the file.
        options: for timm.create_model.
        block: of params.yaml, for the text of errors.

    Raises:
        ModelError: weights that cannot be read, are not the expected ones, or do not fit.
    """
    if weights == "hub":
        return _from_hub(name, options, block=block)
    path = resolve_weights(weights)
    if sha256:
        check_sha256(path, sha256)
    found, own = read_checkpoint(path).tensors, timm.create_model(name, pretrained=False, **options).state_dict()
    first = next(iter(own))
    prefix = next((prefix for prefix in _PREFIXES if prefix + first in found), "")
    state = {key: found[prefix + key] for key in own if prefix + key in found}
    missing = sorted(own.keys() - state.keys())
    wrong = sorted(key for key in state if own[key].shape != state[key].shape)
    if missing or wrong:
        raise ModelError(
            found=f"{weights} lacks {len(missing)} tensors ({', '.join(missing[:3])}) "
            f"and has {len(wrong)} of another shape ({', '.join(wrong[:3])})",
            allowed=f"the weights of timm's {name}",
            fix=f"check `{block}.name`, `{block}.options` and `{block}.weights`",
        )
    return state


def statistics_of(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel of RGB in 0..1 that timm states for a model it knows."""
    statistics = get_pretrained_cfg(name)
    assert statistics is not None, name
    return tuple(statistics.mean), tuple(statistics.std)


def _from_hub(name: str, options: dict[str, Any], *, block: str) -> dict[str, torch.Tensor]:
    try:
        return timm.create_model(name, pretrained=True, **options).state_dict()
    except (OSError, RuntimeError) as error:
        raise ModelError(
            found=f"the weights of {name} could not be fetched: {' '.join(str(error).split())[:300]}",
            allowed="a network connection, or a local weight file",
            fix=f"allow the download (HF_HUB_OFFLINE=0 dvc repro); or `lexiseg weights add FILE` and set "
            f"`{block}.weights` to it",
        ) from error
