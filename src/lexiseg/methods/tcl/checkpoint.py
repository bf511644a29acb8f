"""Official TCL checkpoints (kakaobrain/tcl) -> our grounder: the table of keys, and the sizes that they imply."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transformer import LayerNorm, ResidualAttentionBlock
from pydantic import Field
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from lexiseg.errors import ModelError
from lexiseg.foreign import ForeignCheckpoint
from lexiseg.methods import Imported
from lexiseg.methods.tcl.build import learned
from lexiseg.methods.tcl.model import TCL
from lexiseg.settings import Block, parse

LICENCE = "repository kakaobrain/tcl: MIT (its code); nothing is stated for the weights alone"

# Seven of CLIP's sentences and two more; the mean of their vectors is taken before any of them is normalised.
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of a {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "a photo of many {}.",
    "a photo of {}s.",
)

# Official names -> ours. The first pattern that matches a whole name decides.
_KEYS: tuple[tuple[str, str], ...] = (
    (r"masker\.image_encoder\.backbone\.transformer\.resblocks\.\d+\.(.*)", r"grounder.block.\1"),
    (r"masker\.image_encoder\.decoder\.decoder\.net\.(\d+)\.conv\.gate\.gate", r"grounder.decoder.stages.\1.0.gate"),
    (r"masker\.image_encoder\.decoder\.decoder\.net\.(\d+)\.conv2\.gate\.gate", r"grounder.decoder.stages.\1.1.gate"),
    (r"masker\.image_encoder\.decoder\.decoder\.net\.(\d+)\.conv\.(.*)", r"grounder.decoder.stages.\1.0.\2"),
    (r"masker\.image_encoder\.decoder\.decoder\.net\.(\d+)\.conv2\.(.*)", r"grounder.decoder.stages.\1.1.\2"),
    (r"masker\.image_encoder\.decoder\.image_proj\.ln\.(.*)", r"grounder.ln_post.\1"),
    (r"masker\.image_encoder\.decoder\.image_proj\.proj", r"grounder.proj"),
    (r"masker\.sim2mask\.w", r"grounder.sim_to_mask.scale"),
    (r"masker\.sim2mask\.b", r"grounder.sim_to_mask.bias"),
    (r"tcli_loss\.logit_scale", r"image_log_scale"),
    (r"tclf_loss\.logit_scale", r"feature_log_scale"),
)
# The frozen CLIP, where a checkpoint carries it: official names -> OpenAI's.
_CLIP_KEYS: tuple[tuple[str, str], ...] = (
    (r"clip_image_encoder\.clip_visual\.(.*)", r"visual.\1"),
    (r"clip_image_encoder\.clip_proj\.ln\.(.*)", r"visual.ln_post.\1"),
    (r"clip_image_encoder\.clip_proj\.proj", r"visual.proj"),
    (r"clip_text_encoder\.(.*)", r"\1"),
)
_LOG_SCALES = ("image_log_scale", "feature_log_scale")


class ImportOptions(Block):
    """What a state dict does not tell.

    Attributes:
        statistics: how pixels were normalised in training.
        temperature: of the losses, for training further where the file has not kept the learned ones.
    """

    statistics: Literal["clip", "imagenet"] = "imagenet"
    temperature: float = Field(default=0.07, gt=0)


def import_checkpoint(checkpoint: ForeignCheckpoint, options: Mapping[str, Any]) -> Imported:
    """The grounder of an official checkpoint: the released file, or the state dict of a training, with the CLIP in it.

    (The files that a training writes hold objects beside the state dict, which are refused: save `["model"]` of them.)

    Args:
        checkpoint: with the names of the authors' code.
        options: fields of `ImportOptions`.

    Raises:
        ModelError: another network, or tensors that are missing.
        SettingsError: an option that does not exist or a wrong value.
    """
    chosen = parse(dict(options), ImportOptions, source="the options of `lexiseg import tcl`")
    official = checkpoint.tensors
    if "masker.sim2mask.w" not in official:
        some = ", ".join(sorted(official)[:3])
        raise ModelError(
            found=f"{checkpoint.file} is no TCL checkpoint: no masker.sim2mask.w, but {some}, …",
            allowed="a checkpoint of kakaobrain/tcl, with keys `masker.…`",
            fix="check the file; a model folder of lexiseg needs no import",
        )
    tensors = {ours: value for name, value in official.items() if (ours := our_name(name))}
    clip = {ours: value for name, value in official.items() if (ours := _named(name, _CLIP_KEYS))}
    if clip:  # CLIP's own scale was deleted there; nothing computes with it
        clip.setdefault("logit_scale", torch.tensor(100.0).log())
    blocks = {match[1] for name in official if (match := re.match(r"masker\..*\.resblocks\.(\d+)\.", name))}
    if len(blocks) > 1:
        raise ModelError(
            found=f"{checkpoint.file} has trained the blocks {', '.join(sorted(blocks))} of CLIP",
            allowed="the last one alone, as in the released model",
            fix="import a checkpoint of a training with the default `ie_freeze`",
        )
    unexpected = sorted(name for name in official if not our_name(name) and not _named(name, _CLIP_KEYS))
    # The released file leaves the temperatures out: nothing but training needs them.
    fresh = torch.tensor(1 / chosen.temperature).log()
    tensors = {**{name: fresh.clone() for name in _LOG_SCALES}, **tensors}
    try:
        sizes = _decoder_size(tensors)
        expected = _expected(tensors, sizes)
    except (KeyError, IndexError, ValueError, RuntimeError, AssertionError) as error:
        raise ModelError(
            found=f"{checkpoint.file} has no complete grounder ({type(error).__name__}: {error})",
            allowed="all tensors of one grounder: masker.image_encoder.*, masker.sim2mask.*",
            fix="fetch the file again, or name another one",
        ) from error
    missing = sorted(expected.keys() - tensors.keys())
    wrong = sorted(name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape)
    if missing or wrong:
        raise ModelError(
            found=f"{checkpoint.file}: {len(missing)} tensors missing and {len(wrong)} of another size "
            f"(in our words {', '.join([*missing, *wrong][:3])})",
            allowed="all tensors of one grounder: masker.image_encoder.*, masker.sim2mask.*",
            fix="fetch the file again, or name another one",
        )
    surplus = tensors.keys() - expected.keys()
    unexpected = sorted([*unexpected, *(name for name in official if our_name(name) in surplus)])
    tensors = {name: value for name, value in tensors.items() if name in expected}
    imagenet = {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)}
    own = {"mean": list(OPENAI_DATASET_MEAN), "std": list(OPENAI_DATASET_STD)}
    model = {**sizes, "gate": 0.0, "scale": 10.0, "bias": -2.5}
    return Imported(
        config={
            "method": "tcl",
            "model": {**model, "temperature": chosen.temperature, "statistics": chosen.statistics},
            "text_dim": int(tensors["grounder.proj"].shape[1]),
            "backbone": {"source": "clip"},
            # As the authors evaluate it.
            "predict": {"short_side": 448, "max_side": 2048, "window": 448, "stride": 224},
            "refine": {"pamr_iterations": 10, "knowledge_weight": 0.3},
            **(imagenet if chosen.statistics == "imagenet" else own),
        },
        tensors=tensors,
        text_dim=int(tensors["grounder.proj"].shape[1]),
        clip=clip or None,
        dropped={},
        unexpected=tuple(unexpected),
        licence=LICENCE,
        templates=TEMPLATES,
        average="raw",
        needs_clip=True,
    )


def our_name(official: str) -> str | None:
    """The name in our network of an official tensor of the grounder or of a temperature; None for any other."""
    return _named(official, _KEYS)


def _named(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    for pattern, ours in table:
        if match := re.fullmatch(pattern, name):
            return re.sub(r"\\(\d)", lambda group: match[int(group[1])], ours)
    return None


def _decoder_size(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    gates = [m for name in tensors if (m := re.match(r"grounder\.decoder\.stages\.(\d+)\.(\d+)\.gate", name))]
    first = tensors.get("grounder.decoder.stages.0.0.conv.weight")
    return {
        "stages": len({gate[1] for gate in gates}),
        "units": len({gate[2] for gate in gates}),
        "kernel": 3 if first is None else int(first.shape[-1]),
    }


def _expected(tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """What a whole model of these sizes has learned: names and shapes, without values."""
    width, channels = tensors["grounder.proj"].shape
    ratio = tensors["grounder.block.mlp.c_fc.weight"].shape[0] / width
    with torch.device("meta"):
        tower = nn.Module()
        tower.transformer, tower.ln_post = nn.Module(), LayerNorm(width)
        # The number of heads is in no tensor; it comes with the CLIP.
        tower.transformer.resblocks = nn.ModuleList([ResidualAttentionBlock(width, 1, mlp_ratio=ratio)])
        tower.proj = nn.Parameter(torch.empty(width, channels))
        return learned(TCL(tower, **sizes))
