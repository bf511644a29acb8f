"""STEGO's network without its trunk: a head that makes codes, and what reads classes out of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lexiseg.methods.stego.head import SegmentationHead
from lexiseg.methods.stego.probes import ClusterProbe, Project


class Stego(nn.Module):
    """Codes of frozen features, cluster centres, and a linear probe where there were labels.

    Letters: B pictures, D channels of a feature, K of a code, N clusters, C classes, h x w cells.

    Args:
        head: (B, D, h, w) -> codes (B, K, h, w): STEGO's, or what k-means reads in its place.
        dim: K.
        clusters: N.
        classes: C; 0: no linear probe.
    """

    def __init__(self, head: SegmentationHead | Project, *, dim: int, clusters: int, classes: int = 0) -> None:
        super().__init__()
        self.head = head
        self.probe = ClusterProbe(dim, clusters)
        self.linear = nn.Conv2d(dim, classes, 1) if classes else None

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D, h, w) -> codes (B, K, h, w), not normalised."""
        return self.head(features)

    @property
    def linear_probe(self) -> tuple[Tensor, Tensor] | None:
        """Weight (C, K) and bias (C,) of the linear probe."""
        if self.linear is None:
            return None
        assert self.linear.bias is not None
        return self.linear.weight.detach()[:, :, 0, 0], self.linear.bias.detach()


def build_head(config: dict[str, Any]) -> SegmentationHead | Project:
    """The head that `head` of a model.json describes, untrained."""
    if config["kind"] in ("pca", "whitened"):
        return Project(torch.zeros(config["features"]), torch.zeros(config["dim"], config["features"]))
    return SegmentationHead(config["features"], dim=config["dim"], kind=config["kind"], dropout=config["dropout"])


def build(config: dict[str, Any]) -> Stego:
    """The network that a model.json describes, untrained."""
    head = config["head"]
    return Stego(build_head(head), dim=head["dim"], clusters=config["clusters"], classes=len(config["classes"] or ()))
