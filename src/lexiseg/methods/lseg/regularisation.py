"""Spatial regularisation blocks (paper section 3.3)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Values that one chunk of labels has (float32: 64 MiB).
CHUNK_VALUES = 1 << 24

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
            peak = torch.amax(logits, dim=1, keepdim=True) if self.block == "bottleneck" else None
            logits = self._once(logits, peak, last=turn == self.depth - 1)
        return logits

    def apply_(self, logits: Tensor) -> Tensor:
        """The same without gradients and in place, a chunk of labels at a time, so that no copy is made."""
        labels, values = logits.shape[1], logits[:, :1].numel()
        chunk = max(1, CHUNK_VALUES // max(1, values))
        for turn in range(self.depth):
            peak = torch.amax(logits, dim=1, keepdim=True) if self.block == "bottleneck" else None
            for start in range(0, labels, chunk):
                part = logits[:, start : start + chunk]
                part.copy_(self._once(part, peak, last=turn == self.depth - 1))
        return logits

    def _once(self, logits: Tensor, peak: Tensor | None, *, last: bool) -> Tensor:
        # As one depthwise convolution: labels as a batch of single channels take 17 times the memory on a CPU.
        maps = logits.flatten(0, 1)[None]
        weight, bias = self.depthwise.weight.expand(maps.shape[1], -1, -1, -1), self.depthwise.bias
        assert bias is not None  # it is made with one
        result = F.conv2d(maps, weight, bias.expand(maps.shape[1]), padding=1, groups=maps.shape[1]).reshape(
            logits.shape
        )
        if peak is not None:
            result = result + peak
        return result if last else self.activation(result)
