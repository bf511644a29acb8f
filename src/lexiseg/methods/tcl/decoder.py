"""The grounder's gated convolutional decoder (paper section 3.2, figure 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel: (B, C, h, w) -> (B, C, h, w)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GatedUnit(nn.Module):
    """x + tanh(gate) * conv(GELU(norm(x))): (B, D, h, w) -> (B, D, h, w).

    Args:
        width: D.
        kernel: side of the convolution in pixels, odd.
        gate: its initial value; at 0, as in the paper, the unit passes its input on.
    """

    def __init__(self, width: int, *, kernel: int = 3, gate: float = 0.0) -> None:
        super().__init__()
        self.norm = ChannelNorm(width, eps=1e-5)
        self.conv = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        self.gate = nn.Parameter(torch.tensor(gate))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate.tanh() * self.conv(F.gelu(self.norm(x)))


class GatedDecoder(nn.Module):
    """Stages of nearest-neighbour upsampling by two and gated units: (B, D, h, w) -> (B, D, s h, s w), s = 2^stages.

    Args:
        width: D.
        stages: how often the size doubles.
        units: gated units per stage.
        kernel: side of their convolutions.
        gate: initial value of their gates; at 0 the decoder starts as plain upsampling.
    """

    def __init__(self, width: int, *, stages: int = 2, units: int = 2, kernel: int = 3, gate: float = 0.0) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(*(GatedUnit(width, kernel=kernel, gate=gate) for _ in range(units))) for _ in range(stages)
        )

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(F.interpolate(x, scale_factor=2, mode="nearest"))
        return x
