"""Which pictures look alike: exact nearest neighbours of mean features (section 3.2)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lexiseg.errors import DataError, SettingsError
from lexiseg.methods.stego.features import not_there
from lexiseg.storage import load_tensors, save_tensors

_FILE = "neighbours.safetensors"
# Cosines that are in memory at a time: 64 MiB of float32.
_BLOCK_VALUES = 2**24


def pool(features: Tensor) -> Tensor:
    """Unit vectors (B, D) of the spatial means of features (B, D, h, w)."""
    return F.normalize(features.float().mean(dim=(2, 3)), dim=1)


@torch.no_grad()
def nearest_neighbours(
    pooled: Tensor, *, count: int, backend: Literal["exact", "faiss"] = "exact"
) -> tuple[Tensor, Tensor]:
    """The most similar pictures of every picture, by cosine, exactly, in blocks of bounded memory.

    Args:
        pooled: unit vectors (N, D).
        count: neighbours per picture, itself not counted.
        backend: "exact": by torch; "faiss": by the library of that name, as exactly, for hundreds of thousands of
            pictures.

    Returns:
        int64 (N, count + 1) numbers and float32 (N, count + 1) cosines, the most similar first. The picture itself is
        the first, also where a copy of it is as similar.

    Raises:
        DataError: fewer pictures than that.
        SettingsError: faiss is not installed.
    """
    size = len(pooled)
    if size < count + 1:
        raise DataError(
            found=f"{size} picture{'s' * (size != 1)} to find {count} neighbours of each among",
            allowed=f"at least {count + 1} pictures",
            fix="add pictures, or set `stego.neighbours.count` lower",
        )
    if backend == "faiss":
        return _by_faiss(pooled, count)
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


def save_neighbours(folder: Path, numbers: Tensor, cosines: Tensor) -> None:
    """Write the neighbours of every picture, itself left out: numbers (N, k) as int32, cosines (N, k)."""
    save_tensors(folder / _FILE, {"neighbours": numbers.int(), "cosines": cosines})


def read_neighbours(folder: Path) -> Tensor:
    """The numbers (N, k) int64 that `save_neighbours` wrote.

    Raises:
        DataError: there are none.
    """
    if not (folder / _FILE).is_file():
        raise not_there(folder, _FILE, what="neighbours")
    return load_tensors(folder / _FILE)["neighbours"].long()


def _by_faiss(pooled: Tensor, count: int) -> tuple[Tensor, Tensor]:
    try:
        import faiss
    except ImportError as error:
        raise SettingsError(
            found="`stego.neighbours.backend: faiss`, and faiss is not installed",
            allowed="exact, or faiss with the extra of that name",
            fix="pip install -c constraints.txt -e '.[faiss]', or set `stego.neighbours.backend: exact`",
        ) from error
    rows = pooled.float().contiguous().numpy()
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)  # type: ignore[call-arg]
    cosines, numbers = (torch.from_numpy(found) for found in index.search(rows, count + 1))  # type: ignore[call-arg]
    # The picture itself is the first, also where copies of it took its place.
    own = torch.arange(len(pooled))
    place = (numbers == own[:, None]).int().argmax(dim=1)
    missing = (numbers != own[:, None]).all(dim=1)
    place[missing] = count
    itself = (pooled * pooled).sum(dim=1)
    order = torch.arange(count + 1).expand(len(pooled), -1)
    order = torch.where(order == 0, place[:, None], order - (order <= place[:, None]).long())
    numbers, cosines = numbers.gather(1, order), cosines.gather(1, order)
    numbers[:, 0], cosines[:, 0] = own, itself
    return numbers, cosines
