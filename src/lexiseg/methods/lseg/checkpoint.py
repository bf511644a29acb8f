"""Official LSeg checkpoints (isl-org/lang-seg) -> our network: the table of keys, and the sizes that they imply."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lexiseg.encoders.backbone import ALIASES
from lexiseg.encoders.pyramid import TARGET_STRIDES
from lexiseg.errors import ModelError
from lexiseg.foreign import ForeignCheckpoint
from lexiseg.methods import Imported
from lexiseg.methods.lseg.build import build_model
from lexiseg.methods.lseg.settings import PredictSettings
from lexiseg.settings import Block, parse

LICENCE = "repository isl-org/lang-seg: MIT (its code); nothing is stated for the weights alone"
_PREFIX = "net."  # of Lightning's module around the network
_CLIP = "clip_pretrained."
_BLOCKS = {1: "bottleneck", 2: "depthwise"}  # arch_option of the official code
_VIT_SIZES = {(1024, 24, 16): "ViT-L/16", (768, 12, 16): "ViT-B/16", (768, 12, 32): "ViT-B/32"}

# Official names -> ours. The first pattern that matches a whole name decides; None: left out on purpose.
_KEYS: tuple[tuple[str, str | None], ...] = (
    (r"pretrained\.model\.head\..*", None),  # classifier of the ImageNet ViT
    (r"pretrained\.model\.(.*)", r"backbone.vit.\1"),
    (r"pretrained\.act_postprocess(\d)\.0\.project\.0\.(.*)", r"backbone.reassemble.{0}.project.0.\2"),
    (r"pretrained\.act_postprocess(\d)\.3\.(.*)", r"backbone.reassemble.{0}.reduce.\2"),
    (r"pretrained\.act_postprocess(\d)\.4\.(.*)", r"backbone.reassemble.{0}.resample.\2"),
    (r"pretrained\.layer1\.0\.(.*)", r"backbone.cnn.conv1.\1"),
    (r"pretrained\.layer1\.1\.(.*)", r"backbone.cnn.bn1.\1"),
    (r"pretrained\.layer1\.4\.(.*)", r"backbone.cnn.layer1.\1"),
    (r"pretrained\.(layer[234]\..*)", r"backbone.cnn.\1"),
    (r"scratch\.layer(\d)_rn\.(.*)", r"decoder.layer_rn.{0}.\2"),
    (r"scratch\.refinenet4\.resConfUnit1\..*", None),  # the coarsest block has no skip: never computed, no gradient
    (r"scratch\.refinenet(\d)\.resConfUnit(\d)\.(.*)", r"decoder.refinenet.{0}.unit\2.\3"),
    (r"scratch\.refinenet(\d)\.out_conv\.(.*)", r"decoder.refinenet.{0}.out_conv.\2"),
    (r"scratch\.head1\.(.*)", r"head.\1"),
    (r"scratch\.head_block\.depthwise\.depthwise\.(.*)", r"regularisation.depthwise.\1"),
)


class ImportOptions(Block):
    """What a state dict alone does not tell; Lightning's checkpoints do.

    Attributes:
        block: spatial regularisation; needed where the file has its kernel but no settings.
        block_depth: its applications.
        activation: between them.
        readout: of the class token; needed where it has no weights ("add" and "ignore").
        heads: attention heads of the ViT; None: one per 64 channels, as in all ViTs of the paper.
        temperature: constant t of the softmax; never in the file.
    """

    block: Literal["none", "bottleneck", "depthwise"] | None = None
    block_depth: int | None = Field(default=None, ge=0)
    activation: Literal["lrelu", "tanh", "relu"] | None = None
    readout: Literal["project", "add", "ignore"] | None = None
    heads: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.07, gt=0)


_PREDICT = "predict."  # options with this prefix are those of `lseg.predict`


def import_checkpoint(checkpoint: ForeignCheckpoint, options: Mapping[str, Any]) -> Imported:
    """The network of an official checkpoint.

    Args:
        checkpoint: ViT or ResNet variant, with or without the prefix of Lightning's module.
        options: fields of `ImportOptions`; with the prefix `predict.`, those of `lseg.predict`.

    Raises:
        ModelError: another network, missing tensors, sizes that do not belong together, or an option that is needed.
        SettingsError: an option that does not exist or a wrong value.
    """
    source = "the options of `lexiseg import lseg`"
    own = {key: value for key, value in options.items() if not key.startswith(_PREDICT)}
    chosen = parse(own, ImportOptions, source=source)
    inference = {key.removeprefix(_PREDICT): value for key, value in options.items() if key.startswith(_PREDICT)}
    official = {name.removeprefix(_PREFIX): tensor for name, tensor in checkpoint.tensors.items()}
    if "scratch.head1.weight" not in official:
        some = sorted(official)[:3]
        raise ModelError(
            found=f"{checkpoint.file} is no LSeg checkpoint: no scratch.head1.weight, but {', '.join(some)}, …",
            allowed="a checkpoint of isl-org/lang-seg, with keys `net.pretrained.…` and `net.scratch.…`",
            fix="check the file; a model folder of lexiseg needs no import",
        )
    official_of, dropped, unexpected = _names(official)
    tensors = {ours: official[name] for ours, name in official_of.items()}
    clip = {name.removeprefix(_CLIP): tensor for name, tensor in official.items() if name.startswith(_CLIP)}
    try:
        config = _config(official, checkpoint, chosen)
        with torch.device("meta"):  # for names and sizes alone
            model = build_model(config)
    except (KeyError, RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        raise ModelError(
            found=f"{checkpoint.file} has no complete LSeg network ({type(error).__name__}: {_line(error)})",
            allowed="all tensors of one network: pretrained.*, scratch.*",
            fix="fetch the file again, or name another one",
        ) from error
    expected = model.state_dict()
    wrong = [
        f"{official_of[name]} {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    missing = sorted(expected.keys() - tensors.keys())
    if wrong or missing:
        faults = [f"{len(missing)} tensors missing (in our words {_some(missing)})"] * bool(missing)
        faults += [f"{len(wrong)} of another size ({_some(wrong)})"] * bool(wrong)
        raise ModelError(
            found=f"{checkpoint.file}: {'; '.join(faults)}",
            allowed="all tensors of the network that the others are of",
            fix="fetch the file again; give what the sizes do not tell (--set heads=…, readout=…)",
        )
    # Unless said otherwise: one pass over a picture, at about the size that the network was trained with.
    usual = {"max_side": 520} if _is_vit(official) else {"resize": (480, 480)}
    config["predict"] = parse(inference or usual, PredictSettings, source=source).model_dump(mode="json")
    unexpected = sorted([*unexpected, *(official_of[name] for name in tensors.keys() - expected.keys())])
    return Imported(
        config=config,
        tensors={name: tensors[name].to(value.dtype) for name, value in expected.items()},
        clip=clip or None,
        text_dim=config["text_dim"],
        dropped=dropped,
        unexpected=tuple(unexpected),
        licence=LICENCE,
    )


def our_name(official: str) -> str | None:
    """Our name for an official tensor; None for what is left out on purpose.

    Raises:
        KeyError: the importer does not know the name.
    """
    for pattern, ours in _KEYS:
        match = re.fullmatch(pattern, official)
        if match and ours is None:
            return None
        if match and ours is not None:
            # The official code counts levels from 1. Only our own text is a format: the file's may be anything.
            return match.expand(ours.replace("{0}", str(int(match[1]) - 1)) if "{0}" in ours else ours)
    raise KeyError(official)


def _is_vit(official: Mapping[str, Tensor]) -> bool:
    return "pretrained.model.cls_token" in official


def _names(official: Iterable[str]) -> tuple[dict[str, str], dict[str, int], list[str]]:
    """Our names -> official ones; how many are left out on purpose, by the start of their names; unknown ones."""
    official_of: dict[str, str] = {}
    dropped: dict[str, int] = {}
    unexpected = []
    for name in official:
        if name.startswith(_CLIP):
            continue
        try:
            ours = our_name(name)
        except KeyError:
            unexpected.append(name)
            continue
        if ours is None:
            start = ".".join(name.split(".")[:3])
            dropped[start] = dropped.get(start, 0) + 1
        else:
            official_of[ours] = name
    return official_of, dropped, unexpected


def _config(official: Mapping[str, Tensor], checkpoint: ForeignCheckpoint, chosen: ImportOptions) -> dict[str, Any]:
    """model.json, from the sizes of the tensors, the settings beside them and the options, in that order."""
    is_vit = _is_vit(official)
    model = {
        "init": "backbone",
        "features": official["scratch.layer1_rn.weight"].shape[0],
        "readout": _readout(official, chosen) if is_vit else "project",
        "temperature": chosen.temperature,
        "clip_residual": False,
        "freeze_norm": False,
        **_block(official, checkpoint, chosen),
    }
    backbone = _vit(official, chosen) if is_vit else _resnet(official)
    imagenet = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    return {
        "method": "lseg",
        "model": model,
        "text_dim": official["scratch.head1.weight"].shape[0],
        "backbone": backbone | {"source": "timm", "licence": LICENCE},
        **(half if is_vit else imagenet),
    }


def _block(official: Mapping[str, Tensor], checkpoint: ForeignCheckpoint, chosen: ImportOptions) -> dict[str, Any]:
    plain = {"block": "none", "block_depth": 1, "activation": "lrelu"}
    if "scratch.head_block.depthwise.depthwise.weight" not in official:
        if chosen.block not in (None, "none"):
            raise ModelError(
                found=f"--set block={chosen.block} for a checkpoint without scratch.head_block.*",
                allowed="a block where the checkpoint has its kernel",
                fix="leave the option out",
            )
        return plain
    # Beside the weights stands what they were trained with; faults there are the file's.
    said = {name: checkpoint.settings[name] for name in ("block_depth", "activation") if name in checkpoint.settings}
    settings = parse(said, ImportOptions, source=f"the hyper-parameters in {checkpoint.file} (--set overrides them)")
    block = chosen.block or _BLOCKS.get(checkpoint.settings.get("arch_option", 0))
    if block is None:
        raise ModelError(
            found="the checkpoint has a spatial regularisation block, and no settings that say which one",
            allowed="bottleneck (arch_option 1) or depthwise (arch_option 2), and the depth it was trained with",
            fix="name them: --set block=bottleneck --set block_depth=2 --set activation=lrelu",
        )
    depth = next((depth for depth in (chosen.block_depth, settings.block_depth) if depth is not None), 0)
    return {"block": block, "block_depth": depth, "activation": chosen.activation or settings.activation or "lrelu"}


def _readout(official: Mapping[str, Tensor], chosen: ImportOptions) -> str:
    if "pretrained.act_postprocess1.0.project.0.weight" in official:
        if chosen.readout not in (None, "project"):
            raise ModelError(
                found=f"--set readout={chosen.readout} for a checkpoint with weights of the readout `project`",
                allowed="project",
                fix="leave the option out",
            )
        return "project"
    if chosen.readout in (None, "project"):
        raise ModelError(
            found="the checkpoint has no weights of the readout `project`",
            allowed="add or ignore, which have none",
            fix="name the one it was trained with: --set readout=ignore",
        )
    return str(chosen.readout)


def _vit(official: Mapping[str, Tensor], chosen: ImportOptions) -> dict[str, Any]:
    width, _, patch, _ = official["pretrained.model.patch_embed.proj.weight"].shape
    depth = len({m[1] for name in official if (m := re.match(r"pretrained\.model\.blocks\.(\d+)\.", name))})
    side = round((official["pretrained.model.pos_embed"].shape[1] - 1) ** 0.5) * patch
    hidden = official["pretrained.model.blocks.0.mlp.fc1.weight"].shape[0]
    channels = [official[f"pretrained.act_postprocess{i}.3.weight"].shape[0] for i in range(1, 1 + len(TARGET_STRIDES))]
    known = _VIT_SIZES.get((width, depth, patch))
    heads = chosen.heads or max(1, width // 64)
    options: dict[str, Any] = {}
    if known is None or hidden != 4 * width or side != 384 or heads != width // 64:
        options = {"embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": hidden / width}
        options |= {"img_size": side, "patch_size": patch}
    return {"name": ALIASES[known or "ViT-B/16"], "options": options, "channels": channels}


def _resnet(official: Mapping[str, Tensor]) -> dict[str, Any]:
    counts = [len({name.split(".")[start] for name in official if re.match(stage, name)}) for stage, start in _STAGES]
    names: dict[tuple[int, ...], str] = {
        (3, 4, 6, 3): "resnet50",
        (3, 4, 23, 3): "resnet101",
        (3, 8, 36, 3): "resnet152",
    }
    if tuple(counts) not in names:
        raise ModelError(
            found=f"a ResNet with {counts} blocks",
            allowed=", ".join(f"{name} {list(blocks)}" for blocks, name in names.items()),
            fix="check the file: the official zero-shot models have a ResNet-101",
        )
    return {"name": names[tuple(counts)], "options": {}}


_STAGES = ((r"pretrained\.layer1\.4\.", 3), *((rf"pretrained\.layer{i}\.", 2) for i in (2, 3, 4)))


def _some(names: list[str], *, most: int = 3) -> str:
    return ", ".join(names[:most]) + ("" if len(names) <= most else f" and {len(names) - most} more")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
