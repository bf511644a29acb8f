"""A CLIP in the state dict of OpenAI's release, as other programs carry it along in their checkpoints."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.tokenizer import default_bpe
from torch import Tensor

from lexiseg.encoders.clip import BYTE_PAIRS, build_clip
from lexiseg.errors import ModelError
from lexiseg.storage import save_tensors, write_json

_HEAD = 64  # channels of an attention head in every model of the release
# Sizes that the release stores beside the tensors.
_NUMBERS = ("input_resolution", "context_length", "vocab_size")


LICENCE = "MIT; OpenAI CLIP"


def openai_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The clip.json of a state dict: sizes of both towers from the shapes, QuickGELU, OpenAI's pixel statistics.

    Raises:
        KeyError: a tensor that the sizes are read from is missing.
    """
    width = state["ln_final.weight"].shape[0]
    text = {
        "context_length": state["positional_embedding"].shape[0],
        "vocab_size": state["token_embedding.weight"].shape[0],
        "width": width,
        "heads": max(1, width // _HEAD),
        "layers": _count(state, r"transformer\.resblocks\.(\d+)\."),
    }
    model = {
        "embed_dim": state["text_projection"].shape[1],
        "vision_cfg": _vit(state) if "visual.proj" in state else _resnet(state),
        "text_cfg": text,
        "quick_gelu": True,
    }
    statistics = {"mean": list(OPENAI_DATASET_MEAN), "std": list(OPENAI_DATASET_STD)}
    return {"kind": "open_clip", "model": model, "licence": LICENCE, **statistics}


def save_openai_clip(folder: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a folder that `load_clip` reads; the tensors keep their precision (float16 for most of the release's).

    Args:
        folder: where to write.
        state: the complete state dict.

    Returns:
        The clip.json.

    Raises:
        ModelError: tensors are missing or have other sizes.
    """
    tensors = {name: value for name, value in state.items() if name not in _NUMBERS}
    try:
        config = openai_config(tensors)
        build_clip(config, source="the checkpoint").load_state_dict(tensors)
    except (KeyError, IndexError, ValueError, ZeroDivisionError, AssertionError, RuntimeError) as error:
        raise ModelError(
            found=f"the CLIP in the checkpoint is not complete: {' '.join(str(error).split())[:300]}",
            allowed="the state dict of a CLIP as OpenAI released it",
            fix="fetch the file again, or take the text side from a folder: --text outputs/encode",
        ) from error
    save_tensors(folder / "model.safetensors", tensors)
    shutil.copyfile(default_bpe(), folder / BYTE_PAIRS)
    write_json(folder / "clip.json", config)
    return config


def _vit(state: Mapping[str, Tensor]) -> dict[str, Any]:
    width, _, patch, _ = state["visual.conv1.weight"].shape
    side = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    layers = _count(state, r"visual\.transformer\.resblocks\.(\d+)\.")
    return {
        "layers": layers,
        "width": width,
        "head_width": min(_HEAD, width),
        "patch_size": patch,
        "image_size": side * patch,
    }


def _resnet(state: Mapping[str, Tensor]) -> dict[str, Any]:
    layers = [_count(state, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)]
    width = state["visual.layer1.0.conv1.weight"].shape[0]
    side = round((state["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
    return {"layers": layers, "width": width, "head_width": _HEAD, "patch_size": None, "image_size": side * 32}


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for name in state if (match := re.match(pattern, name))})
