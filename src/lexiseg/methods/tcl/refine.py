"""From soft masks to those that are compared: PAMR and the knowledge branch (the official evaluation)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lexiseg.layers.pamr import pamr
from lexiseg.methods.tcl.settings import RefineSettings
from lexiseg.settings import parse

CELL = 4  # pixels of the network's input per cell of a mask: patches of 16 by two doublings, of 8 by one


def refine(masks: Tensor, knowledge: Tensor, image: Tensor, *, iterations: int, knowledge_weight: float) -> Tensor:
    """Masks drawn to the picture's edges by PAMR, then mixed with those of the untrained CLIP, which PAMR leaves alone.

    Args:
        masks: soft, 0..1, (B, N, h, w).
        knowledge: soft, 0..1, (B, N, h', w'), of the untrained CLIP.
        image: normalised, (B, 3, H, W).
        iterations: of PAMR; 0: none.
        knowledge_weight: share of `knowledge`, 0..1; paper's code 0.3.

    Returns:
        (B, N, h, w), 0..1.
    """
    size = masks.shape[-2:]
    if iterations:
        guidance = F.interpolate(image, size=size, mode="bilinear", align_corners=True)
        masks = pamr(guidance, masks, iterations=iterations)
    if knowledge_weight:
        knowledge = F.interpolate(knowledge, size=size, mode="bilinear", align_corners=False)
        masks = knowledge_weight * knowledge + (1 - knowledge_weight) * masks
    return masks


def refiner(values: Mapping[str, Any]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """What makes final soft masks (N, h, w) of the saved ones (2, N, h, w) and the picture, uint8 RGB (H, W, 3).

    PAMR's weights do not depend on the scale of a channel, so the picture needs no normalisation.

    Args:
        values: `tcl.refine`; what it leaves out is as in the authors' evaluation.
    """
    settings = parse(dict(values), RefineSettings, source="tcl.refine")

    def refined(scores: np.ndarray, image: np.ndarray) -> np.ndarray:
        pixels = torch.tensor(image).permute(2, 0, 1)[None].float() / 255
        # About the picture that the network saw: PAMR picks single pixels of it, which noise would decide otherwise.
        seen = tuple(CELL * side for side in scores.shape[-2:])
        if seen[0] < image.shape[0] or seen[1] < image.shape[1]:
            pixels = F.interpolate(pixels, size=seen, mode="bilinear", align_corners=False, antialias=True)
        masks, knowledge = torch.from_numpy(scores)[:, None]
        iterations, weight = settings.pamr_iterations, settings.knowledge_weight
        return refine(masks, knowledge, pixels, iterations=iterations, knowledge_weight=weight)[0].numpy()

    return refined
