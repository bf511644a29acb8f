"""Masks of whole pictures at their own size, step by step as in the official evaluation of one window."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lexiseg.methods.tcl.model import TCL
from lexiseg.methods.tcl.refine import refine


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
