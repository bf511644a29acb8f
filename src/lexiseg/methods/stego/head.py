"""STEGO's segmentation head: frozen features -> codes (section 3.3 of the paper)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

HeadKind = Literal["nonlinear", "linear", "none"]


class SegmentationHead(nn.Module):
    """codes = A(f) + N(f): a linear map beside one with a hidden layer, both 1 x 1 convolutions.

    Letters: B pictures, D channels of a feature, K of a code, h x w cells.

    Each of the two has its own dropout of whole channels at its input. Codes are not normalised here: all that reads
    them takes cosines.

    Args:
        features: D.
        dim: K; ignored with the kind "none".
        kind: "nonlinear": both maps (paper); "linear": A alone; "none": codes are the features.
        dropout: share of the channels that are zeroed in training (authors' code 0.1); the rest is scaled up.
    """

    def __init__(self, features: int, *, dim: int = 70, kind: HeadKind = "nonlinear", dropout: float = 0.1) -> None:
        super().__init__()
        self.dim = features if kind == "none" else dim
        self.dropout = dropout
        self.linear = nn.Conv2d(features, dim, 1) if kind != "none" else None
        self.nonlinear = (
            nn.Sequential(nn.Conv2d(features, features, 1), nn.ReLU(), nn.Conv2d(features, dim, 1))
            if kind == "nonlinear"
            else None
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, D, h, w) -> codes (B, K, h, w)."""
        if self.linear is None:
            return features
        codes = self.linear(self.drop(features))
        return codes if self.nonlinear is None else codes + self.nonlinear(self.drop(features))

    def drop(self, features: Tensor) -> Tensor:
        """Dropout of whole channels, drawn anew at every call; the identity outside of training."""
        return F.dropout2d(features, self.dropout, self.training)
