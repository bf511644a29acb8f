"""TCL's losses (paper section 3.3) as functions of tensors; over all ranks where there are several.

Letters: B images and B texts of the global batch, b of them on this rank, C channels, h x w the mask grid.

A loss that compares across the batch is computed in full on every rank, from what the ranks gather. Gathering adds up
the gradients of all ranks, and DistributedDataParallel takes the mean over them: so the gradients are those of one
process with the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor

from lexiseg.methods.tcl.masks import unit

MOST_SCALE = 100.0  # limit of the learned logit scales
POOL_EPS = 1e-6


class _Gather(torch.autograd.Function):
    """All ranks' tensors, one behind the other.

    torch.distributed.all_gather passes no gradient on. The one that does is deprecated, and with gloo its gradients
    were not those of one process.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total.chunk(distributed.get_world_size())[distributed.get_rank()]


def gather(x: Tensor) -> Tensor:
    """(b, ...) of each rank -> (B, ...), with gradients; x itself where there is one process."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return x
    return _Gather.apply(x.contiguous())  # type: ignore[return-value]


def contrast(similarities: Tensor, log_scale: Tensor, *, also: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE of similarities (b, B), row i of rank r belonging to text r b + i.

    Args:
        similarities: cosines of local images and all texts.
        log_scale: learned; its exponential is at most 100.
        also: bool (b, B), pairs beside the matching ones whose text is known to be true of the image: they are left
            out, neither pulled together nor pushed apart.
    """
    logits = gather(similarities) * log_scale.exp().clamp(max=MOST_SCALE)
    if also is not None:
        logits = logits.masked_fill(gather(also), -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def image_level(image: Tensor, text: Tensor, log_scale: Tensor, *, also: Tensor | None = None) -> Tensor:
    """TCL_v: InfoNCE of the embeddings of masked images (b, C) and all texts (B, C), neither of them normalised."""
    return contrast(unit(image) @ unit(text).T, log_scale, also=also)


def pooled(masks: Tensor, embedding: Tensor) -> Tensor:
    """Mean dense embedding under each mask: masks (b, B, h, w), embedding (b, C, h, w) -> (b, B, C)."""
    flat, weight = embedding.flatten(2), masks.flatten(2)
    return weight @ flat.transpose(1, 2) / (weight.sum(dim=2, keepdim=True) + POOL_EPS)


def feature_level(
    masks: Tensor, embedding: Tensor, text: Tensor, log_scale: Tensor, *, also: Tensor | None = None
) -> Tensor:
    """TCL_f: InfoNCE in which each pair of image and text has an image embedding of its own, pooled under its mask.

    Args:
        masks: soft, (b, B, h, w).
        embedding: dense, (b, C, h, w), not normalised.
        text: (B, C).
        log_scale, also: see `contrast`.
    """
    images = unit(pooled(masks, embedding))
    return contrast((images * unit(text)).sum(dim=2), log_scale, also=also)


def area(
    masks: Tensor, *, rank: int = 0, positive: float = 0.4, negative: float = 0.0, also: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """|mean - prior| of the masks of matching pairs, and of all others; means over the global batch and all pixels.

    The authors' code takes the means of each rank by itself; this one does not depend on the number of ranks.

    Args:
        masks: soft, (b, B, h, w).
        rank: of this process: its images match the texts from rank * b on.
        positive: prior p+, the expected share of the picture that a caption describes.
        negative: prior p-.
        also: see `contrast`; such masks count on neither side.
    """
    means = masks.mean(dim=(2, 3))
    own = torch.zeros_like(means, dtype=torch.bool)
    own[torch.arange(len(means)), rank * len(means) + torch.arange(len(means))] = True
    other = ~own if also is None else ~own & ~also
    matching, others = gather(means[own]), gather((means * other).sum()[None])
    # A batch of one pair has no others: nothing to ask of them.
    count = gather(other.sum()[None]).sum()
    rest = (others.sum() / count - negative).abs() if count else means.sum() * 0.0
    return (matching.mean() - positive).abs(), rest


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbours along both axes of (..., h, w), the two means added.

    Along an axis of one pixel it is 0.
    """
    across, down = x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]
    return sum((step.abs().mean() for step in (across, down) if step.numel()), x.new_zeros(()))
