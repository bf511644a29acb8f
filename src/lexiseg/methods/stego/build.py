"""STEGO from and to folders: head and probes, beside the trunk that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lexiseg.encoders.trunk import Trunk, load_trunk, trunk_sha256
from lexiseg.errors import ModelError, SettingsError
from lexiseg.methods.stego.features import FeatureStore
from lexiseg.methods.stego.head import SegmentationHead
from lexiseg.methods.stego.model import Stego, build, build_head
from lexiseg.methods.stego.probes import Project
from lexiseg.methods.stego.settings import ModelSettings
from lexiseg.storage import load_tensors, read_json, save_tensors, write_json
from lexiseg.workspace import resolve_model, resolve_weights

HEAD = "head."


def new_head(settings: ModelSettings, *, store: FeatureStore, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """A head before training, and what model.json says of it.

    Args:
        settings: `stego.model`.
        store: features of the trunk.
        seed: of the features that the heads "pca" and "whitened" are fitted on; torch's own seed is that of weights.

    Raises:
        ModelError: the model folder to start from is for another trunk.
        SettingsError: settings that are not those of the model folder to start from.
    """
    if settings.init != "random":
        return _from_folder(settings, features=store.channels)
    if settings.head in ("none", "pca", "whitened"):
        return plain_head(settings.head, dim=settings.dim, tokens=settings.tokens, store=store, seed=seed)
    head = SegmentationHead(store.channels, dim=settings.dim, kind=settings.head, dropout=settings.dropout)
    config = {"features": store.channels, "dim": head.dim, "kind": settings.head, "dropout": settings.dropout}
    return head, config


def plain_head(
    kind: Literal["none", "pca", "whitened"], *, dim: int, tokens: int, store: FeatureStore, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """Codes that need no training, as a head, and what model.json says of it.

    Args:
        kind: "none": the features themselves; "pca": on their principal axes; "whitened": also divided by their
            deviations.
        dim: number of axes.
        tokens: number of features that the axes are fitted on.
        store: features of the trunk.
        seed: of the choice of these.
    """
    if kind == "none":
        head: Any = SegmentationHead(store.channels, kind=kind)
    else:
        sample = store.sample(tokens, generator=torch.Generator().manual_seed(seed))
        head = Project.fit(sample, kind=kind, dim=dim)
    return head.eval(), {"features": store.channels, "dim": head.dim, "kind": kind, "dropout": 0.0}


def _from_folder(settings: ModelSettings, *, features: int) -> tuple[nn.Module, dict[str, Any]]:
    folder = resolve_model(settings.init, sha256=settings.sha256, setting="stego.model.sha256")
    head, config = load_head(folder)
    if config["features"] != features:
        raise ModelError(
            found=f"a trunk of {features} channels for the head of {settings.init}, which takes {config['features']}",
            allowed="the trunk that the head was trained on",
            fix=f"set `encode.trunk.source: model` and `encode.trunk.weights: {settings.init}`, with its sha256",
        )
    head.requires_grad_(True)
    if isinstance(head, SegmentationHead):
        head.dropout = settings.dropout
    # The parameters say what runs, so they have to be true.
    own = {"head": config["kind"], "dim": config["dim"]}
    differing = {key: value for key, value in own.items() if value != getattr(settings, key)}
    if differing:
        raise SettingsError(
            found=f"{settings.init} is another network than `stego.model` describes",
            allowed=", ".join(f"stego.model.{key}: {value}" for key, value in differing.items()),
            fix="set these",
        )
    return head, config | {"dropout": settings.dropout}


def origin(settings: ModelSettings) -> dict[str, Any]:
    """`imported` for model.json: what the model folder to start from was made of; empty where nothing was imported."""
    card = resolve_weights(settings.init) / "card.json"
    imported = read_json(card).get("imported") if settings.init != "random" and card.is_file() else None
    return {"imported": imported} if imported else {}


def save_head(folder: Path, head: nn.Module, config: dict[str, Any]) -> None:
    """Write model.safetensors and model.json of a head without probes, the output of the stage train."""
    save_tensors(folder / "model.safetensors", {f"{HEAD}{name}": value for name, value in head.state_dict().items()})
    write_json(folder / "model.json", config)


def load_head(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The head in the folder of a stage train or of a whole model, frozen, and what its model.json says of it.

    Raises:
        ModelError: missing or damaged files, or a folder of another method.
    """
    config = _config(folder)
    head = build_head(config["head"])
    tensors = load_tensors(folder / "model.safetensors")
    _load(head, {n.removeprefix(HEAD): value for n, value in tensors.items() if n.startswith(HEAD)}, folder)
    return head.eval().requires_grad_(False), config["head"]


def save_model(folder: Path, model: Stego, config: dict[str, Any]) -> None:
    """Write model.safetensors and model.json of a whole model, its trunk excepted."""
    save_tensors(folder / "model.safetensors", model.state_dict())
    write_json(folder / "model.json", config)


def load_probes(settings: ModelSettings, head: nn.Module, config: Mapping[str, Any]) -> tuple[Stego, tuple[str, ...]]:
    """The probes of the model folder in `stego.model.init`, on a head, and the classes of its linear probe.

    Raises:
        ModelError: not that folder, or probes for codes of another size.
    """
    folder = resolve_model(settings.init, sha256=settings.sha256, setting="stego.model.sha256")
    own = _config(folder)
    if own["head"]["dim"] != config["dim"]:
        raise ModelError(
            found=f"probes of {settings.init} for codes of {own['head']['dim']} numbers, and codes of {config['dim']}",
            allowed="the head that they were trained on",
            fix=f"set `stego.model.dim: {own['head']['dim']}`",
        )
    model, _ = load_model(folder)
    model.head = head  # type: ignore[assignment]  # it may have learned on
    return model, tuple(own["classes"] or ())


def load_model(folder: Path) -> tuple[Stego, dict[str, Any]]:
    """Read what `save_model` wrote, in evaluation mode.

    Raises:
        ModelError: missing or damaged files, or weights of another network.
    """
    config = _config(folder)
    model = build(config)
    _load(model, load_tensors(folder / "model.safetensors"), folder)
    return model.eval().requires_grad_(False), config


def load_with_trunk(folder: Path, *, trunk: Path) -> tuple[Trunk, Stego, dict[str, Any]]:
    """The same, and the trunk in a folder of its own.

    Raises:
        ModelError: also where it is another trunk than the head was trained on.
    """
    model, config = load_model(folder)
    own, found = config["backbone"].get("sha256"), trunk_sha256(trunk)
    if own is not None and own != found:
        raise ModelError(
            found=f"the trunk {found[:12]} in {trunk} for a head that was trained on {own[:12]}",
            allowed="the trunk that the head was trained on",
            fix="name the folder that has it, or train the head again (`dvc repro`)",
        )
    return load_trunk(trunk), model, config


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "model.json"
    if not path.is_file():
        raise ModelError(
            found=f"{folder} has no model.json",
            allowed="the folder of a stage stego-train or stego-probe, or a model folder",
            fix="run `dvc repro stego-probe`",
        )
    config = read_json(path)
    if config.get("method") != "stego":
        raise ModelError(
            found=f"{folder} holds a model of {config.get('method')!r}",
            allowed="a model of STEGO",
            fix="name another folder in `stego.model.init`",
        )
    return config


def _load(module: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    expected = {name: value.shape for name, value in module.state_dict().items()}
    found = {name: value.shape for name, value in tensors.items()}
    if found != expected:
        differing = sorted({name for name, _ in found.items() ^ expected.items()})
        raise ModelError(
            found=f"{folder / 'model.safetensors'} does not fit model.json: {', '.join(differing[:3])}",
            allowed="the two files that one training wrote",
            fix="copy the whole model folder again",
        )
    module.load_state_dict(tensors)
