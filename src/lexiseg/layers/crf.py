"""Fully connected conditional random field by mean field (Krähenbühl and Koltun 2011), without compiled code.

Two kernels with Potts compatibility: a Gaussian of the distance alone, and a bilateral one of distance and colour. The
first is a separable convolution; the second is filtered on a permutohedral lattice (Adams, Baek and Davis 2010), whose
vertices are found by sorting and whose steps are weighted sums of rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_SHARE = 1e-5  # of a label in the unary term, as in the reference wrapper
# A label that is below this at every pixel takes no further part: its message could change a share by no more.
NEGLIGIBLE = 1e-4
_PRUNE_AFTER = (1, 3, 6)  # iterations; to look costs about a tenth of one
_FARTHEST = 2**24  # of a place from the origin, in widths of the kernel: float32 has no fractions beyond
_TOO_NARROW = "kernels so narrow that vertices of the lattice cannot be numbered; take wider ones"


class NarrowKernelError(ValueError):
    """The bilateral kernel is so narrow that vertices of its lattice cannot be numbered."""


class HeavyKernelError(ValueError):
    """Messages are beyond the numbers that they are computed with; those of the bilateral kernel are float16."""


@dataclass(frozen=True)
class CrfSettings:
    """Widths and weights of the two kernels; the defaults are those of STEGO's evaluation.

    Attributes:
        iterations: of the mean field.
        gaussian_width: standard deviation of the first kernel, in pixels.
        gaussian_weight: its compatibility, how much an equal neighbour counts.
        bilateral_width: standard deviation of the second kernel in space, in pixels.
        bilateral_colour: the same in colour, in steps of 0..255.
        bilateral_weight: its compatibility.
    """

    iterations: int = 10
    gaussian_width: float = 1.0
    gaussian_weight: float = 3.0
    bilateral_width: float = 67.0
    bilateral_colour: float = 3.0
    bilateral_weight: float = 4.0


@torch.no_grad()
def dense_crf(images: Tensor, shares: Tensor, settings: CrfSettings | None = None) -> Tensor:
    """Shares of labels, drawn to the edges of the picture.

    Letters: B pictures of H x W pixels, C labels.

    Args:
        images: uint8 RGB (B, 3, H, W).
        shares: float (B, C, H, W), >= 0, of each label at each pixel; brought to sum 1.
        settings: None: the defaults.

    Returns:
        (B, C, H, W) float32, sum 1 over C, channels last in memory. Labels that are negligible everywhere end as 0.

    Raises:
        ValueError: pictures and shares of different sizes, or shares that are not finite.
        NarrowKernelError: kernels so narrow that the lattice cannot be numbered; a ValueError too.
        HeavyKernelError: weights so large that messages overflow; a ValueError too.
    """
    settings = settings or CrfSettings()
    batch, labels, height, width = shares.shape
    if images.shape != (batch, 3, height, width):
        raise ValueError(f"images must be ({batch}, 3, {height}, {width}) as the shares are, got {tuple(images.shape)}")
    # Rows are pixels from here on: (B H W, C). Torch turns maps into this layout faster than it permutes them.
    rows = shares.float().contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).reshape(-1, labels)
    total = rows.sum(dim=1, keepdim=True)
    if broken := int((~total.isfinite()).sum()):
        raise ValueError(f"shares must be finite, got NaN or infinity at {broken} of {len(total)} pixels")
    current = rows / total.clamp_(min=1e-12)
    current.clamp_(min=SMALLEST_SHARE)
    logits = current.log()
    current /= current.sum(dim=1, keepdim=True)
    if settings.iterations == 0:
        return current.view(batch, height, width, labels).permute(0, 3, 1, 2)
    kernels: list[GaussianFilter | LatticeFilter] = []
    if settings.gaussian_weight:
        how = {"spread": settings.gaussian_width, "weight": settings.gaussian_weight}
        kernels.append(GaussianFilter(height, width, **how, device=images.device))
    if settings.bilateral_weight:
        places = _places(images, space=settings.bilateral_width, colour=settings.bilateral_colour)
        kernels.append(LatticeFilter(places, weight=settings.bilateral_weight))
    alive, energy, message = torch.arange(labels, device=images.device), logits, torch.empty_like(logits)
    for step in range(settings.iterations):
        message.copy_(energy)
        for kernel in kernels:
            kernel.add_to(message, current)
        torch.softmax(message, dim=1, out=current)
        if step in _PRUNE_AFTER:
            # Of thousands of labels all may be below that; half of their mean share is below every pixel's best one.
            seen = ~(_column_maxima(current) <= min(NEGLIGIBLE, 0.5 / len(alive)))  # NaN stays, and is refused below
            if not bool(seen.all()):
                alive, current, energy = alive[seen], current[:, seen], energy[:, seen]
                message = torch.empty_like(current)
    if not math.isfinite(float(current.sum())):
        raise HeavyKernelError("weights of kernels so large that messages overflow; take smaller ones")
    if len(alive) < labels:
        current = torch.zeros_like(logits).index_copy_(1, alive, current)
        current /= current.sum(dim=1, keepdim=True)
    return current.view(batch, height, width, labels).permute(0, 3, 1, 2)


class GaussianFilter:
    """w D^-1/2 K D^-1/2 for the kernel exp(-d^2 / 2 s^2) of the distance d in pixels; the pixel itself counts.

    Args:
        height, width: H, W.
        spread: s, in pixels; beyond 5 s the kernel counts as 0.
        weight: w.
        device: to compute on.
    """

    def __init__(self, height: int, width: int, *, spread: float, weight: float, device: torch.device) -> None:
        self.size, self.weight = (height, width), weight
        reach = torch.arange(-max(1, round(5 * spread)), max(1, round(5 * spread)) + 1, device=device)
        self.taps = torch.exp(-((reach.float() / spread) ** 2) / 2)
        self.norm = self._filter(torch.ones(height * width, 1, device=device)).rsqrt_()

    def add_to(self, total: Tensor, rows: Tensor) -> None:
        """Add the filtered rows (B H W, C) to `total`, of the same shape."""
        norm = self.norm.repeat(len(rows) // len(self.norm), 1)
        total.addcmul_(self._filter(rows * norm), norm, value=self.weight)

    def _filter(self, rows: Tensor) -> Tensor:
        labels, radius = rows.shape[1], len(self.taps) // 2
        maps = rows.view(-1, *self.size, labels).permute(0, 3, 1, 2)
        taps = self.taps.expand(labels, 1, -1)
        maps = F.conv2d(maps, taps[:, :, None], padding=(0, radius), groups=labels)
        maps = F.conv2d(maps, taps[..., None], padding=(radius, 0), groups=labels)
        return maps.permute(0, 2, 3, 1).reshape(-1, labels)


class LatticeFilter:
    """w D^-1/2 K D^-1/2 for the kernel exp(-|x - y|^2 / 2) of points in d dimensions, approximately.

    A point's value is spread over the d + 1 vertices of the simplex it is in, blurred along d + 1 directions and read
    again, by the same shares.

    Args:
        places: float (B, N, d), in units of the kernel's width; pictures of a batch do not see each other.
        weight: w.

    Raises:
        NarrowKernelError: places so far apart that the vertices between them cannot be numbered.
    """

    def __init__(self, places: Tensor, *, weight: float = 1.0) -> None:
        if not float(places.abs().amax()) < _FARTHEST:
            raise NarrowKernelError(_TOO_NARROW)
        nearest, rank, shares = _simplices(places.flatten(0, 1))
        picture = torch.arange(len(places), device=places.device).repeat_interleave(places.shape[1])
        self.vertices, order, self.starts, self.blurs = _lattice(nearest, rank, picture)
        self.points = (order // shares.shape[1]).int()
        self.spread, self.read = shares.flatten()[order], shares
        norm = self._filter(torch.ones(len(shares), 1, device=places.device)).add_(1e-20).rsqrt_()
        # Into the shares once, instead of into all values at every call. Half precision: memory is what takes the time.
        self.spread = (self.spread * norm[self.points, 0]).half()
        self.read = (shares * (norm * weight)).half()
        self.blurs = [(table, weights.half()) for table, weights in self.blurs]

    def add_to(self, total: Tensor, rows: Tensor) -> None:
        """Add the filtered rows (B N, C) to `total`, of the same shape."""
        total.add_(self._filter(rows.half()).float())  # a sum of two types takes five times as long

    def _filter(self, rows: Tensor) -> Tensor:
        values = F.embedding_bag(self.points, rows, self.starts, mode="sum", per_sample_weights=self.spread)
        for table, weights in self.blurs:
            values = F.embedding_bag(table, values, mode="sum", per_sample_weights=weights)
        return F.embedding_bag(self.vertices, values, mode="sum", per_sample_weights=self.read)


def _column_maxima(rows: Tensor) -> Tensor:
    """(N, C) -> (C,). Rows are laid side by side first: along a short last axis torch takes many times as long."""
    count, labels = rows.shape
    whole = count // 64 * 64
    parts = [rows[whole:]]
    if whole:
        parts.append(rows[:whole].view(-1, 64 * labels).amax(dim=0).view(64, labels))
    return torch.cat(parts).amax(dim=0)


def _places(images: Tensor, *, space: float, colour: float) -> Tensor:
    batch, _, height, width = images.shape
    rows = torch.arange(height, device=images.device, dtype=torch.float32)[:, None].expand(height, width) / space
    columns = torch.arange(width, device=images.device, dtype=torch.float32).expand(height, width) / space
    grid = torch.stack([columns, rows]).expand(batch, 2, height, width)
    return torch.cat([grid, images.float() / colour], dim=1).flatten(2).transpose(1, 2)


def _simplices(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The simplex that each point is in.

    Args:
        points: (N, d).

    Returns:
        nearest: int64 (N, d + 1), coordinates of its first vertex on the lattice.
        rank: int64 (N, d + 1), 0..d, the order of the point's distances from that along the coordinates, largest first.
            Vertex r has r more at the coordinates of rank 0..d - r, and d + 1 - r less at the others.
        shares: float (N, d + 1), the point's barycentric coordinates.
    """
    size = points.shape[1] + 1
    number = torch.arange(1, size, device=points.device, dtype=points.dtype)
    scaled = points * (size * (2 / 3) ** 0.5 / (number * (number + 1)).sqrt())
    # Onto the plane whose coordinates sum to 0.
    later = scaled.flip(1).cumsum(1).flip(1)
    lifted = torch.cat([later[:, :1], later[:, 1:], torch.zeros_like(later[:, :1])], dim=1)
    lifted[:, 1:] -= number * scaled
    nearest = (lifted / size).round() * size
    apart = lifted - nearest
    # How many coordinates are rounded down more; of equal ones the first comes first.
    more = apart[:, None, :] > apart[:, :, None]
    more |= (apart[:, None, :] == apart[:, :, None]) & torch.ones(size, size, device=points.device).tril(-1).bool()
    rank = more.sum(dim=2)
    # The rounded point may lie beside the plane: move the coordinates that were rounded most.
    surplus = (nearest.sum(dim=1, keepdim=True) / size).round().long()
    rank = rank + surplus
    move = (rank < 0).long() - (rank >= size).long()
    nearest = nearest + (move * size).to(nearest.dtype)
    rank = rank + move * size
    apart = (lifted - nearest) / size
    shares = torch.zeros(len(points), size + 1, device=points.device, dtype=points.dtype)
    shares.scatter_add_(1, size - 1 - rank, apart)
    shares.scatter_add_(1, size - rank, -apart)
    shares[:, 0] += 1 + shares[:, size]
    return nearest.long(), rank, shares[:, :size].contiguous()


def _lattice(
    nearest: Tensor, rank: Tensor, picture: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Number the vertices and find their neighbours.

    Args:
        nearest, rank: see `_simplices`.
        picture: int64 (N,), the picture of each point.

    Returns:
        vertices: int32 (N, d + 1), the number of each corner's vertex among M.
        order: int64 (N (d + 1),), the corners by their vertex.
        starts: int32 (M,), where a vertex begins in that order.
        blurs: per direction int32 (M, 3), the vertex before, itself and the one after, and their weights float (M, 3),
            0 where there is none.
    """
    size = nearest.shape[1]
    # One number stands for all coordinates but the last, which follows from them.
    own = nearest[:, : size - 1]
    low = own.amin(dim=0) - 2 * size
    span = own.amax(dim=0) + 2 * size - low + 1
    if math.prod(span.tolist()) * (int(picture[-1]) + 1) >= 2**62:
        raise NarrowKernelError(_TOO_NARROW)
    factors = torch.ones(size, dtype=torch.int64, device=nearest.device)
    factors[1:] = span.cumprod(0)
    first = ((own - low) * factors[:-1]).sum(dim=1) + picture * factors[-1]
    digits = torch.cat([factors[:-1], factors.new_zeros(1)])
    by_rank = torch.zeros_like(rank).scatter_(1, rank, digits.expand_as(rank))
    # What d + 1 less at the last r ranks takes off.
    less = torch.cat([by_rank.new_zeros(len(rank), 1), by_rank.flip(1).cumsum(1)[:, : size - 1]], dim=1)
    steps = torch.arange(size, device=nearest.device)
    packed = (first[:, None] + steps * digits.sum() - size * less).flatten()
    sorted_, order = packed.sort()
    new = torch.ones_like(sorted_, dtype=torch.bool)
    new[1:] = sorted_[1:] != sorted_[:-1]
    number = torch.empty_like(order)
    number[order] = new.cumsum(0) - 1
    starts, vertices = new.nonzero()[:, 0], sorted_[new]
    itself = torch.arange(len(vertices), device=nearest.device)
    blurs = []
    for direction in range(size):
        # One more at every coordinate, d + 1 less at that of the direction.
        wanted = vertices + digits.sum() - size * digits[direction]
        place = torch.searchsorted(vertices, wanted).clamp(max=len(vertices) - 1)
        there = vertices[place] == wanted
        before, after = itself.clone(), torch.where(there, place, itself)
        before[place[there]] = itself[there]
        weights = torch.stack([0.5 * (before != itself), torch.ones_like(there), 0.5 * there], dim=1)
        blurs.append((torch.stack([before, itself, after], dim=1).int(), weights.float()))
    return number.view(-1, size).int(), order, starts.int(), blurs
