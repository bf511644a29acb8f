"""LSeg from and to folders: the trained model of the train stage, and the network a config describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lexiseg.encoders.backbone import read_backbone
from lexiseg.encoders.clip import build_clip
from lexiseg.encoders.pyramid import TinyBackbone, build_timm_backbone
from lexiseg.errors import ModelError, SettingsError
from lexiseg.methods.lseg.model import LSeg
from lexiseg.methods.lseg.regularisation import SpatialRegularisation
from lexiseg.methods.lseg.settings import ModelSettings
from lexiseg.settings import parse
from lexiseg.storage import load_tensors, read_json, save_tensors, write_json
from lexiseg.workspace import resolve_model


def new_model(encode: Path, settings: ModelSettings, *, text_dim: int) -> tuple[LSeg, dict[str, Any]]:
    """A model ready for training, and the config that describes it.

    Args:
        encode: the encode folder: backbone and, where used, CLIP.
        settings: `lseg.model`.
        text_dim: size of the label vectors.

    Raises:
        ModelError: `clip_residual` without a CLIP backbone, or weights that do not fit.
        SettingsError: settings that are not those of the model folder to start from.
    """
    if settings.folder is not None:
        return _from_folder(settings, text_dim=text_dim)
    backbone, weights = read_backbone(encode)
    config: dict[str, Any] = {"method": "lseg", "model": settings.model_dump(mode="json"), "text_dim": text_dim}
    config["backbone"] = backbone
    if backbone["source"] == "clip":
        clip = read_json(encode / "clip" / "clip.json")
        config["clip"] = clip
        config["mean"], config["std"] = clip["mean"], clip["std"]
    else:
        config["mean"], config["std"] = backbone["mean"], backbone["std"]
    model = build_model(config, weights=weights if settings.init == "backbone" else None)
    if backbone["source"] == "clip" and settings.init == "backbone":
        towers = load_tensors(encode / "clip" / "model.safetensors")
        visual = {k.removeprefix("visual."): v for k, v in towers.items() if k.startswith("visual.")}
        model.backbone.visual.load_state_dict(visual)  # type: ignore[union-attr]
    return model, config


def _from_folder(settings: ModelSettings, *, text_dim: int) -> tuple[LSeg, dict[str, Any]]:
    folder = resolve_model(str(settings.folder), sha256=settings.sha256, setting="lseg.model.sha256")
    model, config = load_model(folder)
    own = parse(config["model"], ModelSettings, source=str(folder / "model.json"))
    # The parameters say what runs, so they have to be true. How norms behave in training is free.
    free = {"init", "sha256", "freeze_norm"}
    differing = {key: value for key, value in own if key not in free and value != getattr(settings, key)}
    if differing:
        raise SettingsError(
            found=f"{settings.folder} is another network than `lseg.model` describes",
            allowed=", ".join(f"lseg.model.{key}: {_plain(value)}" for key, value in differing.items()),
            fix="set these",
        )
    if config["text_dim"] != text_dim:
        raise ModelError(
            found=f"label vectors of {text_dim} numbers, and a network in {settings.folder} for {config['text_dim']}",
            allowed="the text encoder that the network was trained with",
            fix="take that one: `encode.clip.source: model` where the folder holds a CLIP, else its `encode.text`",
        )
    model.freeze_norm = settings.freeze_norm
    card = folder / "card.json"
    imported = read_json(card).get("imported") if card.is_file() else None
    origin = {"imported": imported} if imported else {}
    return model, {**config, "model": settings.model_dump(mode="json"), **origin}


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def build_model(config: dict[str, Any], *, weights: dict[str, Tensor] | None = None) -> LSeg:
    """The network of a model.json; `weights` are those of a timm backbone."""
    settings = parse(config["model"], ModelSettings, source="model.json")
    backbone = config["backbone"]
    if backbone["source"] == "clip":
        network: Any = TinyBackbone(build_clip(config["clip"], source="model.json").visual)  # type: ignore[arg-type]
    else:
        network = build_timm_backbone(
            backbone["name"],
            options=backbone["options"],
            readout=settings.readout,
            weights=weights,
            channels=backbone.get("channels"),
        )
    regularisation = None
    if settings.block != "none":
        regularisation = SpatialRegularisation(
            settings.block, depth=settings.block_depth, activation=settings.activation
        )
    return LSeg(
        network,
        text_dim=config["text_dim"],
        features=settings.features,
        temperature=settings.temperature,
        regularisation=regularisation,
        clip_residual=settings.clip_residual,
        freeze_norm=settings.freeze_norm,
    )


def save_model(folder: Path, model: LSeg, config: dict[str, Any]) -> None:
    """Write model.safetensors and model.json."""
    save_tensors(folder / "model.safetensors", model.state_dict())
    write_json(folder / "model.json", config)


def load_model(folder: Path) -> tuple[LSeg, dict[str, Any]]:
    """Read what `save_model` wrote, in evaluation mode.

    Raises:
        ModelError: missing or damaged files, or weights of another network.
    """
    config = read_json(folder / "model.json")
    try:
        model = build_model(config)
    except KeyError as error:
        raise ModelError(
            found=f"{folder / 'model.json'} has no entry {error}",
            allowed="a model.json that this version of lexiseg wrote",
            fix="copy the whole model folder again, or train with this version",
        ) from error
    try:
        model.load_state_dict(load_tensors(folder / "model.safetensors"))
    except RuntimeError as error:
        raise ModelError(
            found=f"{folder / 'model.safetensors'} does not fit model.json: {' '.join(str(error).split())[:300]}",
            allowed="the two files that one training wrote",
            fix="copy the whole model folder again",
        ) from error
    return model.eval(), config
