"""What reads classes out of codes: cluster centres (by gradient as in the paper, or by k-means), and a linear layer.

Letters: B pictures, K channels of a code, N clusters, C classes, T tokens (cells of all pictures together).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexiseg.errors import DataError
from lexiseg.segmentation import IGNORE_LABEL

_BLOCK = 8192  # tokens whose cosines with all centres are made at a time


class ClusterProbe(nn.Module):
    """N centres, compared by cosine (section 3.4): mini-batch k-means by gradient.

    Args:
        dim: K.
        clusters: N.
    """

    def __init__(self, dim: int, clusters: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(clusters, dim))

    def cosines(self, codes: Tensor) -> Tensor:
        """(B, K, h, w) -> (B, N, h, w), -1..1."""
        return cluster_cosines(codes, self.centres)

    def loss(self, codes: Tensor, *, alpha: float | None = None) -> Tensor:
        """Minus the mean cosine of each code with its centre; with `alpha`, with all centres by their shares."""
        cosines = self.cosines(codes)
        if alpha is None:
            return -cosines.amax(dim=1).mean()
        return -((cosines * alpha).softmax(dim=1) * cosines).sum(dim=1).mean()


def cluster_cosines(codes: Tensor, centres: Tensor) -> Tensor:
    """Cosines (B, N, h, w) of codes (B, K, h, w) with centres (N, K)."""
    return torch.einsum("bkhw,nk->bnhw", F.normalize(codes, dim=1), F.normalize(centres, dim=1))


def linear_loss(probe: nn.Conv2d, codes: Tensor, labels: Tensor, *, classes: int) -> Tensor:
    """Cross entropy of a linear layer on codes, at the size of the labels.

    Args:
        probe: 1 x 1 convolution, K -> C.
        codes: (B, K, h, w).
        labels: integers (B, H, W); what is not in 0..C-1 does not count.
        classes: C.

    Returns:
        A scalar; 0 where no pixel counts.
    """
    logits = F.interpolate(probe(codes), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    counted = (labels >= 0) & (labels < classes)
    targets = labels.long().where(counted, IGNORE_LABEL)
    total = F.cross_entropy(logits, targets, ignore_index=IGNORE_LABEL, reduction="sum")
    return total / counted.sum().clamp(min=1)


def kmeans(
    tokens: Tensor,
    *,
    clusters: int,
    restarts: int,
    iterations: int = 25,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, float]:
    """Centres of the best of several k-means by cosine (Lloyd's steps from k-means++ starts).

    "Best" is the highest mean cosine of a token with its centre; no label is looked at.

    Args:
        tokens: float (T, K), any length.
        clusters: N.
        restarts: number of starts.
        iterations: steps of each; fewer where no token changes its centre.
        generator: of the starts.

    Returns:
        Centres (N, K) of length 1, and their mean cosine.

    Raises:
        DataError: fewer different tokens than clusters, or tokens that are not finite.
    """
    if not bool(tokens.isfinite().all()):
        raise DataError(
            found="codes that are NaN or infinite",
            allowed="finite codes",
            fix="look at the training curve: a run that diverged needs a lower `stego.train.lr`",
        )
    unit = F.normalize(tokens.float(), dim=1)
    # Nearly always the first tokens are enough to tell; to sort all of them takes a while.
    if len(unit[: 50 * clusters].unique(dim=0)) < clusters and (different := len(unit.unique(dim=0))) < clusters:
        raise DataError(
            found=f"{different} different feature vectors for {clusters} clusters",
            allowed="at least as many as clusters",
            fix="add pictures, or ask for fewer clusters (`stego.probe.clusters`)",
        )
    best: tuple[Tensor, float] | None = None
    for _ in range(restarts):
        centres = _lloyd(unit, _plus_plus(unit, clusters, generator), iterations)
        objective = float(_assign(unit, centres)[0].mean())
        if best is None or objective > best[1]:
            best = centres, objective
    assert best is not None
    return best


def _plus_plus(unit: Tensor, clusters: int, generator: torch.Generator | None) -> Tensor:
    chosen = [int(torch.randint(len(unit), (1,), generator=generator))]
    far = 1 - unit @ unit[chosen[0]]
    for _ in range(clusters - 1):
        # Half the squared distance of unit vectors is 1 - cos.
        chosen.append(int(torch.multinomial(far.clamp(min=1e-12), 1, generator=generator)))
        far = torch.minimum(far, 1 - unit @ unit[chosen[-1]])
    return unit[chosen]


def _lloyd(unit: Tensor, centres: Tensor, iterations: int) -> Tensor:
    before: Tensor | None = None
    for _ in range(iterations):
        cosine, owner = _assign(unit, centres)
        if before is not None and torch.equal(owner, before):
            break
        before = owner
        sums = torch.zeros_like(centres).index_add_(0, owner, unit)
        empty = owner.bincount(minlength=len(centres)) == 0
        # A centre without tokens begins anew at the token that is farthest from its own.
        sums[empty] = unit[cosine.topk(int(empty.sum()), largest=False).indices]
        centres = F.normalize(sums, dim=1)
    return centres


def _assign(unit: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    found = [(block @ centres.T).max(dim=1) for block in unit.split(_BLOCK)]
    return torch.cat([values for values, _ in found]), torch.cat([indices for _, indices in found])


Projection = Literal["pca", "whitened"]


class Project(nn.Module):
    """Features on their principal axes, or whitened: what plain k-means may read instead of codes.

    Args:
        mean: (D,).
        axes: (K, D) principal axes, for "whitened" each divided by the deviation along it.
    """

    def __init__(self, mean: Tensor, axes: Tensor) -> None:
        super().__init__()
        self.dim = len(axes)
        self.mean: Tensor
        self.axes: Tensor
        self.register_buffer("mean", mean)
        self.register_buffer("axes", axes)

    @classmethod
    def fit(cls, tokens: Tensor, *, kind: Projection, dim: int) -> Project:
        """From tokens (T, D): `dim` axes of the largest variance, or as many as there are.

        Raises:
            DataError: tokens that are all the same.
        """
        mean = tokens.double().mean(dim=0)
        centred = tokens.double() - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / max(1, len(tokens) - 1))
        # Features are kept in half precision: what varies less than that rounds is noise, which whitening would raise.
        count = min(dim, int((values > max(float(values[-1]) * 1e-6, float(mean.square().max()) * 1e-8)).sum()))
        if not count:
            raise DataError(
                found="features that are the same everywhere",
                allowed="features that differ: pictures with something in them, and a trunk that sees it",
                fix="look at the pictures; or leave `pca` and `whitened` out of `stego.baselines`",
            )
        axes = vectors[:, -count:].flip(1).T
        # An axis has no direction of its own: the largest entry is positive, whatever the library gave.
        largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
        axes = axes * largest.sign()
        if kind == "whitened":
            axes = axes / values[-count:].flip(0).sqrt()[:, None]
        return cls(mean.float(), axes.float())

    def forward(self, features: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, K, h, w)."""
        return torch.einsum("bdhw,kd->bkhw", features - self.mean[:, None, None], self.axes)
