"""Shifts b of the loss without labels: where the correspondences of each kind of pairs divide in two.

What a good shift is depends on trunk and data; the paper's were found with labels. The rule "otsu" looks at the centred
correspondences alone: for pairs of a picture with itself and with its neighbours, the border between the two groups
that their histogram falls into (Otsu 1979), a little lower; for random pairs, what few of them exceed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BELOW_OTSU = 0.05
RANDOM_SHARE = 0.02  # of the random pairs that may attract their codes
QUANTILE_SHARE = 0.7  # of self and neighbour pairs that do, by the rule "quantile"
_BINS = 256


@dataclass(frozen=True)
class Shifts:
    """b of self, neighbour and random pairs, and why.

    Attributes:
        self_, knn, random: the shifts.
        reason: a sentence for each.
    """

    self_: float
    knn: float
    random: float
    reason: tuple[str, str, str]


def suggest_shifts(self_: Tensor, knn: Tensor, random: Tensor, *, rule: str = "otsu") -> Shifts:
    """Shifts from samples of centred correspondences.

    Args:
        self_, knn, random: float tensors of any shape, a sample of each kind of pairs.
        rule: "otsu" or "quantile".
    """
    high = exceeded_by(random, RANDOM_SHARE)
    third = f"{100 * RANDOM_SHARE:g} % of the random pairs exceed it"
    if rule == "quantile":
        found = [exceeded_by(sample, QUANTILE_SHARE) for sample in (self_, knn)]
        why = [f"{100 * QUANTILE_SHARE:g} % of the {name} pairs exceed it" for name in ("self", "neighbour")]
    else:
        found = [otsu(sample) - BELOW_OTSU for sample in (self_, knn)]
        why = [f"{BELOW_OTSU:g} below the border of the {name} pairs' two groups" for name in ("self", "neighbour")]
    return Shifts(found[0], found[1], high, reason=(why[0], why[1], third))


def exceeded_by(sample: Tensor, share: float) -> float:
    """The value that this share of a sample exceeds."""
    values = sample.flatten().double().sort().values
    return float(values[min(len(values) - 1, int((1 - share) * len(values)))])


def otsu(sample: Tensor) -> float:
    """The border between two groups whose means are the farthest apart, weighted by their sizes (Otsu 1979)."""
    values = sample.flatten().double()
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-9:
        return low
    counts = torch.histc(values, _BINS, low, high)
    centres = low + (torch.arange(_BINS, dtype=torch.float64) + 0.5) * (high - low) / _BINS
    share = counts.cumsum(0) / counts.sum()
    mean = (counts * centres).cumsum(0) / counts.sum()
    between = (mean[-1] * share - mean) ** 2 / (share * (1 - share)).clamp(min=1e-12)
    best = int(between[:-1].argmax())
    return float(low + (best + 1) * (high - low) / _BINS)
