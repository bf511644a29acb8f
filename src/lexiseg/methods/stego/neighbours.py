"""Which pictures look alike: exact nearest neighbours of mean features (section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lexiseg.errors import DataError

# Cosines that are in memory at a time: 64 MiB of float32.
_BLOCK_VALUES = 2**24


def pool(features: Tensor) -> Tensor:
    """Unit vectors (B, D) of the spatial means of features (B, D, h, w)."""
    return F.normalize(features.float().mean(dim=(2, 3)), dim=1)


@torch.no_grad()
def nearest_neighbours(pooled: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """The most similar pictures of every picture, by cosine, exactly, in blocks of bounded memory.

    Args:
        pooled: unit vectors (N, D).
        count: neighbours per picture, itself not counted.

    Returns:
        int64 (N, count + 1) numbers and float32 (N, count + 1) cosines, the most similar first. The picture itself is
        the first, also where a copy of it is as similar.

    Raises:
        DataError: fewer pictures than that.
    """
    size = len(pooled)
    if size < count + 1:
        raise DataError(
            found=f"{size} picture{'s' * (size != 1)} to find {count} neighbours of each among",
            allowed=f"at least {count + 1} pictures",
            fix="add pictures, or set `stego.neighbours.count` lower",
        )
    numbers = torch.empty(size, count + 1, dtype=torch.int64)
    cosines = torch.empty(size, count + 1)
    rows = max(1, _BLOCK_VALUES // size)
    columns = pooled.T.contiguous()
    for start in tqdm(range(0, size, rows), desc="neighbours", unit="block", mininterval=1, delay=2):
        block = pooled[start : start + rows] @ columns
        own = torch.arange(start, start + len(block))
        itself = block[torch.arange(len(block)), own].clone()
        block[torch.arange(len(block)), own] = torch.inf
        values, indices = block.topk(count + 1, dim=1)
        values[:, 0] = itself
        numbers[start : start + rows], cosines[start : start + rows] = indices.cpu(), values.cpu()
    return numbers, cosines
