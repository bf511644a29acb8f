"""STEGO's correspondence loss (section 3.2), and the contrastive CRF loss of the authors' code.

Letters: B pictures, D channels of a feature, K of a code, h x w cells, P sampled points, M kinds of partners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPSILON = 1e-10  # of the cosines, as in the authors' code
UNCLAMPED = -9999.0  # the authors' bound where codes may be opposed

Centring = Literal["paper", "code", "none"]
"""Of the features' correspondences. "paper": of each point's, the mean is taken off. "code": then the mean of all is
put back, as in the authors' code, which keeps the strength of a shift. "none": they are left as they are."""


@dataclass(frozen=True)
class Terms:
    """The three means that the loss is a weighted sum of, and what became of the codes.

    Attributes:
        self_, knn, random: scalar losses of a picture with itself, with a neighbour, and with other pictures.
        self_code, knn_code, random_code: scalar mean cosine of the codes of each kind of pairs, without gradient.
    """

    self_: Tensor
    knn: Tensor
    random: Tensor
    self_code: Tensor
    knn_code: Tensor
    random_code: Tensor


def sample_points(maps: Tensor, points: Tensor, *, pictures: Tensor | None = None) -> Tensor:
    """Bilinear values of maps at continuous points; the same as `grid_sample` with border padding and aligned corners.

    Rows are gathered instead of resampling maps: no copy of a map is made for a picture that is sampled several times.

    Args:
        maps: float (N, C, h, w).
        points: float (B, P, 2), x and y in -1..1, where -1 and 1 are the centres of the outermost cells.
        pictures: int64 (B,), which map each row of `points` is about; None: one after the other, and B is N.

    Returns:
        (B, P, C).
    """
    height, width = maps.shape[-2:]
    rows = maps.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
    scale = torch.tensor([width - 1, height - 1], dtype=points.dtype, device=points.device)
    place = ((points + 1) / 2 * scale).clamp(min=0)
    place = torch.minimum(place, scale)
    low = place.floor()
    share = place - low
    x, y = low.long().unbind(-1)
    right, below = (x + 1).clamp(max=width - 1), (y + 1).clamp(max=height - 1)
    if pictures is None:
        pictures = torch.arange(len(points), device=points.device)
    start = (pictures * (height * width))[:, None]
    across, down = share.unbind(-1)
    corners = torch.stack([y * width + x, y * width + right, below * width + x, below * width + right], dim=-1)
    weights = [(1 - across) * (1 - down), across * (1 - down), (1 - across) * down, across * down]
    # A "bag" is the weighted sum of a few rows, made without the rows themselves.
    values = F.embedding_bag(
        (start[..., None] + corners).flatten(0, 1),
        rows,
        mode="sum",
        per_sample_weights=torch.stack(weights, dim=-1).flatten(0, 1).to(rows.dtype),
    )
    return values.view(*points.shape[:2], -1)


def random_points(batch: int, count: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Points (B, P, 2) drawn uniformly from -1..1, as the authors draw them: no fixed grid."""
    return torch.rand(batch, count, 2, generator=generator) * 2 - 1


def super_permutation(order: Tensor) -> Tensor:
    """Partners for the random pairs: no picture is its own, but one may occur twice and another not at all.

    Args:
        order: int64 (B,), a permutation; each fixed point of it is moved on to the next number, modulo B.

    Raises:
        ValueError: fewer than two pictures, of which none has a partner.
    """
    size = len(order)
    if size < 2:
        raise ValueError(f"random pairs need at least 2 pictures in a batch, got {size}")
    own = order == torch.arange(size, device=order.device)
    return (order + own.long()) % size


def unit_rows(values: Tensor) -> Tensor:
    """Values of length 1 along the last axis; zeros stay zeros."""
    return F.normalize(values, dim=-1, eps=NORM_EPSILON)


def correspondences(first: Tensor, second: Tensor) -> Tensor:
    """Cosines of all points with all points: (B, P, C) and (B, Q, C), of length 1 -> (B, P, Q)."""
    return first @ second.transpose(1, 2)


def centred(features: Tensor, centring: Centring) -> Tensor:
    """Spatial centring of the correspondences (B, P, Q) of one kind of pairs, see `Centring`."""
    if centring == "none":
        return features
    spread = features - features.mean(dim=2, keepdim=True)
    return spread if centring == "paper" else spread - spread.mean() + features.mean()


def pair_losses(
    features: Tensor,
    codes: Tensor,
    *,
    shift: float,
    centring: Centring = "code",
    clamp: bool = True,
    stabilise: bool = False,
) -> Tensor:
    """The loss of every pair of points, before the mean.

    Args:
        features: (B, P, Q) correspondences F of the frozen features.
        codes: (B, P, Q) correspondences C of the codes.
        shift: b; features above it attract their codes, those below repel them.
        centring: see `Centring`.
        clamp: codes count as at least 0, so that unrelated points become orthogonal instead of opposed.
        stabilise: codes count as at most 0.8.

    Returns:
        -C (F - b), (B, P, Q).
    """
    bounded = codes.clamp(0.0 if clamp else UNCLAMPED, 0.8 if stabilise else None)
    return -bounded * (centred(features, centring) - shift)


def correspondence_terms(
    features: Tensor,
    codes: Tensor,
    neighbour_features: Tensor,
    neighbour_codes: Tensor,
    *,
    points: Tensor,
    partner_points: Tensor,
    partners: Tensor,
    shifts: Sequence[float],
    centring: Centring = "code",
    clamp: bool = True,
    stabilise: bool = False,
) -> Terms:
    """The three terms of the loss.

    Args:
        features: (B, D, h, w) of the batch; no gradient flows into features.
        codes: (B, K, h, w) of the batch.
        neighbour_features: the same of one neighbour of each picture.
        neighbour_codes: the same.
        points: (B, P, 2), where a picture is sampled.
        partner_points: (B, P, 2), where its partners are, neighbour and random ones alike.
        partners: int64 (R, B), the random partners of each picture, from `super_permutation`.
        shifts: b of self, neighbour and random pairs.
        centring, clamp, stabilise: see `pair_losses`.
    """
    how: dict[str, Any] = {"centring": centring, "clamp": clamp, "stabilise": stabilise}
    # Once for all samplings; what a ViT gives has this layout already.
    features, codes = (maps.contiguous(memory_format=torch.channels_last) for maps in (features, codes))
    with torch.no_grad():
        f = unit_rows(sample_points(features, points))
        g = [f, unit_rows(sample_points(neighbour_features, partner_points))]
        g += [unit_rows(sample_points(features, partner_points, pictures=row)) for row in partners]
        # One product for the partners of all kinds: (B, P, M P), then a block of P columns for each.
        alike = correspondences(f, torch.cat(g, dim=1)).split(len(points[0]), dim=2)
    s = unit_rows(sample_points(codes, points))
    t = [s, unit_rows(sample_points(neighbour_codes, partner_points))]
    t += [unit_rows(sample_points(codes, partner_points, pictures=row)) for row in partners]
    close = correspondences(s, torch.cat(t, dim=1)).split(len(points[0]), dim=2)
    self_, knn, random = shifts
    both = list(zip(alike, close, strict=True))
    by_kind = [both[:1], both[1:2], both[2:]]
    terms, means = [], []
    for pairs, shift in zip(by_kind, (self_, knn, random), strict=True):
        losses = [pair_losses(one, other, shift=shift, **how).mean() for one, other in pairs]
        terms.append(sum(losses) / len(losses))
        means.append(torch.stack([other.detach().mean() for _, other in pairs]).mean())
    return Terms(*terms, *means)


def contrastive_crf_loss(
    guidance: Tensor,
    codes: Tensor,
    coords: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.15,
    gamma: float = 0.05,
    w1: float = 10.0,
    w2: float = 3.0,
    shift: float = 0.0,
) -> Tensor:
    """A term of the authors' code (weight 0 there): codes of pixels that are near and of one colour attract.

    Args:
        guidance: picture (B, 3, H, W), normalised.
        codes: (B, K, H, W), of length 1 along K for cosines.
        coords: int64 (2, n): rows y and x of the n pixels that are compared.
        alpha: width of the bilateral kernel in space, in pixels.
        beta: its width in colour.
        gamma: width of the second kernel, in space alone.
        w1, w2: weights of the kernels.
        shift: taken off their sum.

    Returns:
        (B, n, n), of which the mean is the loss.
    """
    apart = ((coords[:, :, None] - coords[:, None, :]) ** 2).sum(dim=0)
    colours = guidance[:, :, coords[0], coords[1]]
    other = ((colours[:, :, :, None] - colours[:, :, None, :]) ** 2).sum(dim=1)
    bilateral = w1 * torch.exp(-apart / (2 * alpha) - other / (2 * beta))
    kernel = bilateral + w2 * torch.exp(-apart / (2 * gamma)) - shift
    chosen = codes[:, :, coords[0], coords[1]]
    return -torch.einsum("bki,bkj->bij", chosen, chosen) * kernel
