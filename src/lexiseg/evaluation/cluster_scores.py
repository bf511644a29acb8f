"""Scores of clusters at low resolution that upsample as the codes they were made of would.

The classes of a cluster probe are read from codes that were upsampled first: cos(up(code), centre). A code has tens to
hundreds of channels and there are few clusters, so codes are not kept. The product of a code and a centre is linear in
the code and may be upsampled in its place; the length of an upsampled code follows from the products of neighbouring
cells. Both together give the same cosines, and a linear probe's logits are linear anyway.

What is kept are cosines and one length per cell, not products: in half precision these keep their digits also where
the codes of a picture differ much in length.

Letters: B pictures, K channels of a code, N clusters, C classes of the linear probe, h x w cells, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

REGIONS = "regions.safetensors"  # in a model folder: what a CLIP sees in each cluster, where there was one
ALPHA = 2.0  # logits are so many times the cosine, as in the authors' evaluation

_CLUSTER, _LINEAR = "cluster ", "linear "
# The length of a cell's code, and its cosines with the right one, the one below, the one below on the right; and of the
# right one with the one below.
_CELLS = ("length", "right", "below", "across", "counter")


def cluster_names(count: int) -> tuple[str, ...]:
    """What clusters are called before anything names them: "cluster 0", "cluster 1", …"""
    return tuple(f"{_CLUSTER}{number}" for number in range(count))


def map_names(clusters: int, classes: Sequence[str] = ()) -> tuple[str, ...]:
    """The names of the maps that `pack` makes, as labels of saved predictions."""
    return (*cluster_names(clusters), *_CELLS, *(f"{_LINEAR}{name}" for name in classes))


def read_names(names: Sequence[str]) -> tuple[int, tuple[str, ...]]:
    """The inverse of `map_names`: the number of clusters and the classes of the linear probe.

    Raises:
        ValueError: names that `map_names` does not give.
    """
    count = sum(name.startswith(_CLUSTER) for name in names)
    classes = tuple(name.removeprefix(_LINEAR) for name in names[count + len(_CELLS) :])
    if not count or tuple(names) != map_names(count, classes):
        raise ValueError(f"expected the maps of clusters, got {', '.join(names[:8])}")
    return count, classes


def pack(codes: Tensor, centres: Tensor, linear: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """All maps that `ClusterMaps` needs, of codes.

    Args:
        codes: float (B, K, h, w), of any length.
        centres: (N, K), of any length.
        linear: weight (C, K) and bias (C,) of a linear probe, or None.

    Returns:
        (B, N + 5 + C, h, w), in the order of `map_names`. Lengths count in units of the longest code of their picture,
        which changes no cosine.
    """
    lengths = codes.norm(dim=1, keepdim=True)
    unit = codes / lengths.clamp(min=1e-12)
    longest = lengths.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)
    padded = F.pad(unit, (0, 1, 0, 1), mode="replicate")
    here, right, below = padded[..., :-1, :-1], padded[..., :-1, 1:], padded[..., 1:, :-1]
    pairs = [(here, right), (here, below), (here, padded[..., 1:, 1:]), (right, below)]
    maps = [torch.einsum("bkhw,nk->bnhw", unit, F.normalize(centres, dim=1)), lengths / longest]
    maps += [(one * other).sum(dim=1, keepdim=True) for one, other in pairs]
    if linear is not None:
        weight, bias = linear
        maps.append(torch.einsum("bkhw,ck->bchw", codes, weight) + bias[:, None, None])
    return torch.cat(maps, dim=1)


@dataclass(frozen=True, eq=False)
class ClusterMaps:
    """Maps of one picture, as `pack` made them, split into their kinds; float32.

    Attributes:
        clusters: (N, h, w) cosines of codes and centres.
        cells: (5, h, w) lengths of codes, and cosines of neighbouring ones.
        linear: (C, h, w) logits of the linear probe; C is 0 where there is none.
    """

    clusters: Tensor
    cells: Tensor
    linear: Tensor

    @classmethod
    def unpack(cls, names: Sequence[str], maps: Tensor) -> ClusterMaps:
        """From maps (N + 5 + C, h, w) of any float type and their names.

        Raises:
            ValueError: names that `map_names` does not give.
        """
        count, classes = read_names(names)
        return cls(*maps.float().split([count, len(_CELLS), len(classes)]))

    def cosines(self, *, height: int, width: int, align_corners: bool = False) -> Tensor:
        """Cosines (N, H, W) of bilinearly upsampled codes with the centres, -1..1; 0 where a code is 0."""
        products = _resized(self.clusters * self.cells[0], (height, width), align_corners)
        # Rounding of what was kept must not lead beyond the cosines that there are.
        return products.div_(self._lengths((height, width), align_corners)).clamp_(-1, 1)

    def logits(self, *, height: int, width: int, align_corners: bool = False) -> Tensor:
        """Logits (C, H, W) of the linear probe on bilinearly upsampled codes."""
        return _resized(self.linear, (height, width), align_corners)

    def _lengths(self, size: tuple[int, int], align_corners: bool) -> Tensor:
        """(H, W), of codes that are sums of four with bilinear weights."""
        (y, below, down), (x, right, across) = (
            _places(source, target, align_corners) for source, target in zip(self.cells.shape[-2:], size, strict=True)
        )
        y, below, down = y[:, None], below[:, None], down[:, None]
        length, side, under, diagonal, counter = self.cells
        # Length times weight of the four codes of a pixel.
        one, two = length[y, x] * (1 - down) * (1 - across), length[y, right] * (1 - down) * across
        three, four = length[below, x] * down * (1 - across), length[below, right] * down * across
        squared = one**2 + two**2 + three**2 + four**2
        squared += 2 * (one * two * side[y, x] + three * four * side[below, x])
        squared += 2 * (one * three * under[y, x] + two * four * under[y, right])
        squared += 2 * (one * four * diagonal[y, x] + two * three * counter[y, x])
        return squared.clamp(min=1e-12).sqrt()


def _resized(maps: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=align_corners)[0]


def _places(source: int, target: int, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Where `interpolate` reads along one axis: lower and upper cell (target,), and the share of the upper one."""
    steps = torch.arange(target, dtype=torch.float32)
    if align_corners:
        place = steps * ((source - 1) / max(1, target - 1))
    else:
        place = ((steps + 0.5) * (source / target) - 0.5).clamp(min=0)
    low = place.floor().clamp(max=source - 1)
    return low.long(), (low + 1).clamp(max=source - 1).long(), place - low
