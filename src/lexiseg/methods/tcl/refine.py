"""From the grounder's masks to those of a picture: knowledge branch, PAMR, size (the official evaluation)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lexiseg.layers.pamr import pamr
from lexiseg.methods.tcl.model import TCL


def refine(masks: Tensor, knowledge: Tensor, image: Tensor, *, iterations: int, knowledge_weight: float) -> Tensor:
    """Masks drawn to the picture's edges by PAMR, then mixed with those of the untrained CLIP, which PAMR leaves alone.

    Args:
        masks: soft, 0..1, (B, N, h, w).
        knowledge: soft, 0..1, (B, N, h', w'), of `TCL.knowledge`.
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


@torch.inference_mode()
def masks_of_pictures(
    model: TCL, images: Tensor, text: Tensor, *, iterations: int = 10, knowledge_weight: float = 0.3
) -> Tensor:
    """Soft masks (B, N, H, W) of normalised images (B, 3, H, W) of any size, for texts (N, C).

    Sides that are no multiples of the patch are padded with zeros, half on each side, and cut off again.
    """
    height, width = images.shape[-2:]
    padded, (top, left) = pad_to_patches(images, model.visual.patch_size)
    tokens, grid = model.tokens(padded)
    masks = model.grounder.mask_logits(model.grounder(tokens, grid), text).sigmoid()
    knowledge = model.knowledge(tokens, grid, text) if knowledge_weight else masks
    masks = refine(masks, knowledge, padded, iterations=iterations, knowledge_weight=knowledge_weight)
    masks = F.interpolate(masks, size=padded.shape[-2:], mode="bilinear", align_corners=False)
    return masks[..., top : top + height, left : left + width]


def pad_to_patches(images: Tensor, patch_size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Images (B, 3, H, W) with zeros around them, so that both sides are whole patches; and what is above and left."""
    rows, columns = (-side % patch for side, patch in zip(images.shape[-2:], patch_size, strict=True))
    top, left = rows // 2, columns // 2
    return F.pad(images, (left, columns - left, top, rows - top)), (top, left)
