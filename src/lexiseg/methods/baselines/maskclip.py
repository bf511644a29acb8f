"""MaskCLIP-style zero-shot segmentation: the dense embeddings of the frozen CLIP against the label vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lexiseg.device import best_device
from lexiseg.encoders.clip import FrozenClip, load_clip
from lexiseg.encoders.text import ClipText, load_text
from lexiseg.errors import ModelError

LOGIT_SCALE = 100.0  # CLIP's trained scale; the label map does not depend on it


class MaskClip:
    """Scores pictures by cosine similarity; nothing is trained (Zhou et al., ECCV 2022; see `dense_embeddings`)."""

    def __init__(self, clip: FrozenClip, *, text: ClipText, device: torch.device | None = None) -> None:
        self.clip, self.text, self.device = clip, text, device or best_device()
        clip.model.to(self.device)

    def scores(self, images: Sequence[np.ndarray], labels: Sequence[str]) -> list[np.ndarray]:
        """Logits (N, h, w) float32 per uint8 RGB picture (H, W, 3), one cell per patch."""
        if len({image.shape for image in images}) > 1:
            return [self.scores([image], labels)[0] for image in images]
        return list(self._logits(np.stack(images), self.text.embed(labels)).cpu().numpy())

    def _logits(self, images: np.ndarray, vectors: Tensor) -> Tensor:
        tensor = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)
        patch = self.clip.patch_size
        size = [max(patch, round(side / patch) * patch) for side in tensor.shape[-2:]]
        if list(tensor.shape[-2:]) != size:
            tensor = F.interpolate(tensor.float(), size=size, mode="bilinear").round().to(torch.uint8)
        dense = self.clip.embed_patches(tensor)
        return LOGIT_SCALE * torch.einsum("nc,bchw->bnhw", vectors.to(self.device), dense)


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
