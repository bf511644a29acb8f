"""Dense features of the backbone of an encode folder, all its maps at one stride."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexiseg.encoders.backbone import read_backbone
from lexiseg.encoders.clip import build_clip
from lexiseg.encoders.pyramid import TinyBackbone, build_timm_backbone
from lexiseg.storage import load_tensors, read_json


class FrozenFeatures(nn.Module):
    """The maps of a frozen backbone, concatenated at one stride.

    Args:
        backbone: gives a pyramid of maps.
        stride: pixels per cell of the result.
        mean, std: of RGB in 0..1, per channel.
    """

    def __init__(self, backbone: Any, *, stride: int, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.stride = stride
        self.channels = sum(self.backbone.channels)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 RGB (B, 3, H, W) -> (B, D, H / stride, W / stride), every channel group of unit scale."""
        multiple = self.backbone.multiple
        size = [max(multiple, round(side / multiple) * multiple) for side in images.shape[-2:]]
        tensor = (images.float() / 255 - self.mean) / self.std  # type: ignore[operator]
        if list(images.shape[-2:]) != size:
            tensor = F.interpolate(tensor, size=size, mode="bilinear", align_corners=True)
        cells = [-(-side // self.stride) for side in images.shape[-2:]]
        maps = [F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1) for x in self.backbone(tensor)]
        return torch.cat([F.interpolate(x, size=cells, mode="bilinear", align_corners=True) for x in maps], dim=1)


def load_features(encode: Path, *, stride: int) -> FrozenFeatures:
    """The features of the backbone in an encode folder."""
    config, weights = read_backbone(encode)
    if config["source"] == "clip":
        clip = read_json(encode / "clip" / "clip.json")
        model = build_clip(clip, source=str(encode / "clip" / "clip.json"))
        model.load_state_dict(load_tensors(encode / "clip" / "model.safetensors"))
        backbone: Any = TinyBackbone(model.visual)  # type: ignore[arg-type]
        config = {**config, "mean": clip["mean"], "std": clip["std"]}
    else:
        backbone = build_timm_backbone(config["name"], options=config["options"], readout="ignore", weights=weights)
    return FrozenFeatures(backbone, stride=stride, mean=config["mean"], std=config["std"])
