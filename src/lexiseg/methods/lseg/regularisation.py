"""Spatial regularisation blocks (paper section 3.3)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

ACTIVATIONS = {"lrelu": nn.LeakyReLU(0.01), "tanh": nn.Tanh(), "relu": nn.ReLU()}


class SpatialRegularisation(nn.Module):
    """One 3x3 kernel applied to every label's map by itself, `depth` times with the same weights.

    A kernel with one input and one output channel knows nothing of the labels, so their number and order stay
    free. The last application has no activation.

    Args:
        block: "bottleneck" adds the maximum over the labels before the activation; "depthwise" does not.
        depth: number of applications; 0 counts as 1, as in the official code.
        activation: between the applications.
    """

    def __init__(
        self,
        block: Literal["bottleneck", "depthwise"],
        *,
        depth: int,
        activation: Literal["lrelu", "tanh", "relu"],
    ) -> None:
        super().__init__()
        self.block, self.depth = block, max(1, depth)
        self.depthwise = nn.Conv2d(1, 1, 3, padding=1)
        self.activation = ACTIVATIONS[activation]

    def forward(self, logits: Tensor) -> Tensor:
        """(B, N, h, w) -> (B, N, h, w)."""
        for turn in range(self.depth):
            batch, labels, height, width = logits.shape
            flat = logits.reshape(batch * labels, 1, height, width)
            result = self.depthwise(flat).reshape(batch, labels, height, width)
            if self.block == "bottleneck":
                result = result + torch.amax(logits, dim=1, keepdim=True)
            logits = result if turn == self.depth - 1 else self.activation(result)
        return logits
