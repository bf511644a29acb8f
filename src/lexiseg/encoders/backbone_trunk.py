"""The backbone of an encode folder as a frozen trunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lexiseg.encoders.backbone import read_backbone
from lexiseg.encoders.features import FrozenFeatures
from lexiseg.encoders.pyramid import VitBackbone, build_timm_backbone
from lexiseg.encoders.tiny_trunk import check_sides
from lexiseg.encoders.trunk import Trunk
from lexiseg.errors import ModelError


class BackboneTrunk(Trunk):
    """The encode folder's backbone as a trunk: its maps side by side at one stride, each of unit scale."""

    def __init__(self, features: FrozenFeatures) -> None:
        super().__init__()
        self.features = features
        self.multiple, self.channels = features.stride, features.channels
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 RGB (B, 3, H, W), sides multiples of the stride -> (B, D, H / stride, W / stride)."""
        check_sides(images, self.multiple)
        return self.features(images)


def backbone_trunk(backbone: Path, *, stride: int) -> tuple[BackboneTrunk, dict[str, Any]]:
    """The backbone of an encode folder as a trunk, and what trunk.json says of it.

    Args:
        backbone: the folder `backbone` in the encode folder.
        stride: pixels per cell.

    Raises:
        ModelError: there is no backbone, or it is the CLIP's own tower or a ViT.
    """
    config, weights = read_backbone(backbone.parent)
    if config["source"] == "clip":
        raise ModelError(
            found="`encode.trunk.source: backbone` while `encode.backbone.source` is clip",
            allowed="a CNN of timm",
            fix="set `encode.backbone.source: timm`, or another source of the trunk",
        )
    network = build_timm_backbone(config["name"], options=config["options"], readout="ignore", weights=weights)
    if isinstance(network, VitBackbone):  # its pyramid begins with layers that nothing has trained
        raise ModelError(
            found=f"`encode.trunk.source: backbone` while the backbone is the ViT {config['name']}",
            allowed="a CNN of timm",
            fix="set `encode.trunk.source: timm`, and name and weights as in `encode.backbone`",
        )
    features = FrozenFeatures(network, stride=stride, mean=config["mean"], std=config["std"])
    kept = {key: config[key] for key in ("name", "options", "mean", "std", "licence")}
    return BackboneTrunk(features), {"source": "backbone", "stride": stride, **kept}
