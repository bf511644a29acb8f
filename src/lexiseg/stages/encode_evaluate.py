"""Stage encode-evaluate: what the frozen encoders can do by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lexiseg.data.dataset import PreparedSplit
from lexiseg.encoders.clip import FrozenClip, load_clip
from lexiseg.encoders.pretrain import retrieval_recall
from lexiseg.encoders.text import load_text
from lexiseg.storage import write_json

PAIRS = 256  # image-caption pairs of the retrieval test


def run(settings: Any, inputs: Mapping[str, Path], outputs: Path) -> None:
    """Write metrics.json: retrieval on the first 256 captioned pictures of each evaluated split, and stand-ins.

    What cannot be measured (no CLIP, no captions) is null, and without a text side nothing stands in.
    """
    splits = {name: PreparedSplit(inputs["prepare"], name) for name in settings.evaluate.splits}
    names = next(iter(splits.values())).vocabulary.names
    text = load_text(inputs["encode"]) if (inputs["encode"] / "text").is_dir() else None
    stand_ins = {name: text.stand_in(name) for name in names if text.stand_in(name)} if text else {}
    result: dict[str, Any] = {"stand_ins": stand_ins, "retrieval": {}}
    clip = load_clip(inputs["encode"] / "clip") if (inputs["encode"] / "clip").is_dir() else None
    for name, split in splits.items():
        result["retrieval"][name] = retrieval(clip, split) if clip else None
    write_json(outputs / "metrics.json", result)


def retrieval(clip: FrozenClip, split: PreparedSplit) -> dict[str, float] | None:
    """Recall at 1 and 5 between pictures and their first caption (in the world, the full one).

    None where no picture has a caption.
    """
    captions = split.captions
    chosen = [index for index, texts in enumerate(captions) if texts][:PAIRS]
    if not chosen:
        return None
    images = [_embed(clip, split.image(index)) for index in chosen]
    texts = [captions[index][0] for index in chosen]  # type: ignore[index]
    return {"pairs": len(chosen), **retrieval_recall(torch.cat(images), clip.embed_texts(texts), texts)}


def _embed(clip: FrozenClip, image: np.ndarray) -> Tensor:
    visual: Any = clip.model.visual
    size = visual.image_size  # of a ViT both sides, of a ResNet one
    side = size if isinstance(size, int) else size[0]
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    if tensor.shape[-2:] != (side, side):
        tensor = torch.nn.functional.interpolate(tensor.float(), size=(side, side), mode="bicubic", antialias=True)
        tensor = tensor.clamp(0, 255).round().to(torch.uint8)
    return clip.embed_images(tensor)
