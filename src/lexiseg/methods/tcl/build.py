"""TCL from and to folders: the learned weights, beside the CLIP that they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from lexiseg.encoders.clip import FrozenClip, load_clip
from lexiseg.errors import ModelError, SettingsError
from lexiseg.methods.tcl.model import TCL
from lexiseg.methods.tcl.settings import ModelSettings
from lexiseg.settings import parse
from lexiseg.storage import hash_tree, load_tensors, read_json, save_tensors, write_json
from lexiseg.workspace import resolve_model

FROZEN = "visual."  # tensors of the CLIP, which is kept in a folder of its own


def new_model(encode: Path, settings: ModelSettings) -> tuple[TCL, FrozenClip, dict[str, Any]]:
    """A model ready for training, its CLIP, and the config that describes it.

    Args:
        encode: the encode folder, with a CLIP in it.
        settings: `tcl.model`.

    Raises:
        ModelError: there is no CLIP, its image tower is no ViT, or the model folder to start from is on another CLIP.
        SettingsError: settings that are not those of the model folder to start from.
    """
    clip = load_clip(encode / "clip")
    config: dict[str, Any] = {"method": "tcl", "model": settings.model_dump(mode="json"), "text_dim": clip.dim}
    config["backbone"] = {"source": "clip", "licence": clip.licence}
    imagenet = settings.statistics == "imagenet"
    config["mean"] = list(IMAGENET_DEFAULT_MEAN if imagenet else clip.mean)
    config["std"] = list(IMAGENET_DEFAULT_STD if imagenet else clip.std)
    if settings.init == "clip":
        return build_model(config, clip), clip, config
    model, origin = _from_folder(settings, clip=encode / "clip")
    return model, clip, config | origin


def _from_folder(settings: ModelSettings, *, clip: Path) -> tuple[TCL, dict[str, Any]]:
    """The model of a folder on the graph's CLIP, and what is to be noted of it."""
    folder = resolve_model(settings.init, sha256=settings.sha256, setting="tcl.model.sha256")
    if (folder / "clip").is_dir() and hash_tree(folder / "clip") != hash_tree(clip):
        raise ModelError(
            found=f"another CLIP in the graph than in {settings.init}",
            allowed="the CLIP that the grounder was trained on",
            fix=f"set `encode.clip.source: model` and `encode.clip.weights: {settings.init}`, with its sha256",
        )
    model, config = load_model(folder, clip=clip)
    own = parse(config["model"], ModelSettings, source=str(folder / "model.json"))
    # The parameters say what runs, so they have to be true. What training starts from is in the folder.
    free = {"init", "sha256", "gate", "scale", "bias", "temperature"}
    differing = {key: value for key, value in own if key not in free and value != getattr(settings, key)}
    if differing:
        raise SettingsError(
            found=f"{settings.init} is another network than `tcl.model` describes",
            allowed=", ".join(f"tcl.model.{key}: {value}" for key, value in differing.items()),
            fix="set these",
        )
    card = folder / "card.json"
    imported = read_json(card).get("imported") if card.is_file() else None
    return model, {"imported": imported} if imported else {}


def build_model(config: dict[str, Any], clip: FrozenClip) -> TCL:
    """The network of a model.json on its CLIP, as it is before training.

    Raises:
        ModelError: the image tower is no ViT, or of another CLIP.
    """
    _ = clip.patch_size  # raises where the tower is no ViT
    if clip.dim != config["text_dim"]:
        raise ModelError(
            found=f"a CLIP of {clip.dim} channels for a grounder of {config['text_dim']}",
            allowed="the CLIP that the grounder was trained on",
            fix="name the folder that has it",
        )
    settings = parse(config["model"], ModelSettings, source="model.json")
    grounder = settings.model_dump(exclude={"init", "sha256", "temperature", "statistics"})
    return TCL(clip.model.visual, temperature=settings.temperature, **grounder)


def learned(model: TCL) -> dict[str, Tensor]:
    """All tensors but those of the frozen tower."""
    return {name: value for name, value in model.state_dict().items() if not name.startswith(FROZEN)}


def save_model(folder: Path, model: TCL, config: dict[str, Any]) -> None:
    """Write model.safetensors, with what was learned, and model.json."""
    save_tensors(folder / "model.safetensors", learned(model))
    write_json(folder / "model.json", config)


def load_model(folder: Path, *, clip: Path) -> tuple[TCL, dict[str, Any]]:
    """Read what `save_model` wrote, in evaluation mode.

    Args:
        folder: with model.json and model.safetensors.
        clip: folder of the CLIP.

    Raises:
        ModelError: missing or damaged files, or weights of another network.
    """
    config = read_json(folder / "model.json")
    model = build_model(config, load_clip(clip))
    tensors = load_tensors(folder / "model.safetensors")
    expected = {name: value.shape for name, value in learned(model).items()}
    found = {name: value.shape for name, value in tensors.items()}
    if found != expected:
        differing = sorted({name for name, _ in found.items() ^ expected.items()})
        raise ModelError(
            found=f"{folder / 'model.safetensors'} does not fit model.json: {', '.join(differing[:3])}",
            allowed="the two files that one training wrote",
            fix="copy the whole model folder again",
        )
    model.load_state_dict(tensors, strict=False)
    return model.eval(), config
