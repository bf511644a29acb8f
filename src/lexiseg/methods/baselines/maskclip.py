"""MaskCLIP-style zero-shot segmentation: the dense embeddings of the frozen CLIP against the label vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lexiseg.encoders.clip import FrozenClip, load_clip
from lexiseg.encoders.text import ClipText, load_text
from lexiseg.errors import ModelError

LOGIT_SCALE = 100.0  # CLIP's trained scale; the label map does not depend on it


class MaskClip:
    """Scores pictures by cosine similarity; nothing is trained (Zhou et al., ECCV 2022; see `dense_embeddings`)."""

    def __init__(self, clip: FrozenClip, *, text: ClipText) -> None:
        self.clip, self.text = clip, text

    def scores(self, images: Sequence[np.ndarray], labels: Sequence[str]) -> list[np.ndarray]:
        """Logits (N, h, w) float32 per uint8 RGB picture (H, W, 3), one cell per patch."""
        if len({image.shape for image in images}) > 1:
            return [self.scores([image], labels)[0] for image in images]
        tensor = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        patch = self.clip.patch_size
        size = [max(patch, round(side / patch) * patch) for side in tensor.shape[-2:]]
        if list(tensor.shape[-2:]) != size:
            tensor = F.interpolate(tensor.float(), size=size, mode="bilinear").round().to(torch.uint8)
        dense = self.clip.embed_patches(tensor)
        logits = LOGIT_SCALE * torch.einsum("nc,bchw->bnhw", self.text.embed(labels), dense)
        return list(logits.numpy())


def predictor(settings: Any, inputs: Mapping[str, Path]) -> MaskClip:
    """The baseline of the graph.

    Raises:
        ModelError: the label vectors do not come from the CLIP whose image tower is used.
    """
    text = load_text(inputs["encode"])
    if not isinstance(text, ClipText):
        raise ModelError(
            found="the baseline `maskclip` while `encode.text.source` is not clip",
            allowed="label vectors of the same CLIP as the image tower",
            fix="remove maskclip from `baselines` in params.yaml, or set `encode.text.source: clip`",
        )
    return MaskClip(load_clip(inputs["encode"] / "clip"), text=text)
