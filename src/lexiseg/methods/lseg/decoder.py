"""The fusion decoder of DPT ("scratch" in the official code)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualConvUnit(nn.Module):
    """x + BN(conv(relu(BN(conv(relu(x)))))), 3x3 convolutions without bias; x itself is not activated."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn1(self.conv1(F.relu(x)))
        return x + self.bn2(self.conv2(F.relu(inner)))


class FusionBlock(nn.Module):
    """Adds a finer map to the path and doubles the resolution.

    Args:
        channels: of path and map.
        has_skip: False for the coarsest block, which only starts the path.
    """

    def __init__(self, channels: int, *, has_skip: bool) -> None:
        super().__init__()
        self.unit1 = ResidualConvUnit(channels) if has_skip else None
        self.unit2 = ResidualConvUnit(channels)
        self.out_conv = nn.Conv2d(channels, channels, 1)

    def forward(self, path: Tensor, skip: Tensor | None, *, size: tuple[int, int]) -> Tensor:
        """path, skip (B, F, h, w) -> (B, F, *size); the 1x1 convolution comes after upsampling."""
        if self.unit1 is not None and skip is not None:
            path = path + self.unit1(skip)
        path = self.unit2(path)
        if path.shape[-2:] != size:
            path = F.interpolate(path, size=size, mode="bilinear", align_corners=True)
        return self.out_conv(path)


class FusionDecoder(nn.Module):
    """Four maps, fine to coarse -> one map at half the image's resolution.

    Each block ends at the size of the next finer map (twice its own, in a pyramid of strides 4 to 32), the
    finest at half the image, so sides that are no multiples of 32 work.

    Args:
        channels: of the four maps.
        features: F, width of the decoder (256 in the paper).
    """

    def __init__(self, channels: Sequence[int], *, features: int) -> None:
        super().__init__()
        self.layer_rn = nn.ModuleList(nn.Conv2d(c, features, 3, padding=1, bias=False) for c in channels)
        last = len(channels) - 1
        self.refinenet = nn.ModuleList(FusionBlock(features, has_skip=i != last) for i in range(len(channels)))

    def forward(self, maps: Sequence[Tensor], *, image_size: tuple[int, int]) -> Tensor:
        """Maps (B, c_i, h_i, w_i) and (H, W) -> (B, F, ceil(H/2), ceil(W/2))."""
        skips = [layer(x) for layer, x in zip(self.layer_rn, maps, strict=True)]
        half = (-(-image_size[0] // 2), -(-image_size[1] // 2))
        sizes = [half, *[tuple(skip.shape[-2:]) for skip in skips[:-1]]]
        path = skips[-1]
        for level in range(len(skips) - 1, -1, -1):
            skip = None if level == len(skips) - 1 else skips[level]
            path = self.refinenet[level](path, skip, size=sizes[level])
        return path
