"""The frozen trunk of unsupervised methods: dense features of a self-supervised ViT, or of another backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lexiseg.encoders.backbone import check_name, read_backbone
from lexiseg.encoders.features import FrozenFeatures
from lexiseg.encoders.pyramid import build_timm_backbone
from lexiseg.encoders.self_supervised import TinyTrunk
from lexiseg.errors import ModelError
from lexiseg.storage import load_tensors, read_json

Facet = Literal["features", "keys"]
Positions = Literal["timm", "dino"]


class VitTrunk(nn.Module):
    """A ViT of timm, read out densely: DINO, DINOv2, DINOv3 and others.

    Letters: B pictures of H x W pixels, h x w patches, D channels.

    Args:
        vit: the ViT.
        facet: "features": tokens after the last norm; "keys": those of the last block's attention, heads side by side.
        positions: how positions are resized for other grids than the trained one: "timm", or "dino" as in DINO's code,
            bicubically by a scale that is 0.1 of a patch too large.
        mean, std: of RGB in 0..1, per channel.
    """

    def __init__(
        self, vit: nn.Module, *, facet: Facet, positions: Positions, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.vit: Any = vit
        self.facet, self.positions = facet, positions
        self.multiple = int(self.vit.patch_embed.patch_size[0])
        self.channels = int(self.vit.embed_dim)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        if facet == "keys" and not hasattr(self.vit.blocks[-1].attn, "qkv"):
            raise ModelError(
                found=f"`encode.trunk.facet: keys` with {type(vit).__name__}, whose attention keeps no qkv together",
                allowed="keys of a plain ViT, or `facet: features`",
                fix="set `encode.trunk.facet: features`",
            )
        if positions == "dino" and not (isinstance(vit, VisionTransformer) and self.vit.num_prefix_tokens == 1):
            raise ModelError(
                found=f"`encode.trunk.positions: dino` with {type(vit).__name__}",
                allowed="a ViT with one class token and learned positions, such as vit_small_patch8_224.dino",
                fix="set `encode.trunk.positions: timm`",
            )
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 RGB (B, 3, H, W), sides multiples of the patch -> (B, D, h, w)."""
        return self.dense((images.float() / 255 - self.mean) / self.std)  # type: ignore[operator]

    def dense(self, pixels: Tensor) -> Tensor:
        """Normalised floats (B, 3, H, W) -> (B, D, h, w)."""
        check_sides(pixels, self.multiple)
        height, width = (side // self.multiple for side in pixels.shape[-2:])
        tokens = self.tokens(pixels)[:, self.vit.num_prefix_tokens :]
        return tokens.transpose(1, 2).reshape(len(pixels), -1, height, width)

    def tokens(self, pixels: Tensor) -> Tensor:
        """All tokens (B, prefix + h w, D) of normalised floats (B, 3, H, W)."""
        if self.facet == "features":
            return self._through(pixels)
        kept: list[Tensor] = []
        hook = self.vit.blocks[-1].attn.qkv.register_forward_hook(lambda module, inputs, output: kept.append(output))
        try:
            self._through(pixels)
        finally:
            hook.remove()
        # query, key, value, each with its heads side by side
        return kept[0].chunk(3, dim=-1)[1]

    def _through(self, pixels: Tensor) -> Tensor:
        vit = self.vit
        if self.positions == "timm":
            return vit.forward_features(pixels)
        grid = vit.patch_embed.proj(pixels)
        tokens = grid.flatten(2).transpose(1, 2)
        tokens = torch.cat([vit.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = vit.norm_pre(tokens + dino_positions(vit.pos_embed, height=grid.shape[-2], width=grid.shape[-1]))
        for block in vit.blocks:
            tokens = block(tokens)
        return vit.norm(tokens)


def check_sides(pixels: Tensor, multiple: int) -> None:
    """Refuse pictures that cannot be cut into whole patches.

    Raises:
        ModelError: they cannot.
    """
    height, width = pixels.shape[-2:]
    if height % multiple or width % multiple or not (height and width):
        raise ModelError(
            found=f"pictures of {height} x {width} pixels",
            allowed=f"sides that are multiples of {multiple}, the trunk's patch",
            fix="resize or crop them first",
        )


def dino_positions(positions: Tensor, *, height: int, width: int) -> Tensor:
    """Positions (1, 1 + s*s, D) of a square grid for a grid of height x width, as DINO's code resizes them."""
    side = round((positions.shape[1] - 1) ** 0.5)
    if (height, width) == (side, side):
        return positions
    grid = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    # A tenth of a patch more, against rounding down; the size stays, the places that are read move a little.
    scale = ((height + 0.1) / side, (width + 0.1) / side)
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


class BackboneTrunk(nn.Module):
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


Trunk = VitTrunk | BackboneTrunk | TinyTrunk


def build_vit(name: str, options: dict[str, Any]) -> nn.Module:
    """A ViT of timm, untrained, for pictures of any size.

    Raises:
        ModelError: an unknown name, or no ViT.
    """
    try:
        vit = timm.create_model(check_name(name), pretrained=False, num_classes=0, dynamic_img_size=True, **options)
    except TypeError as error:
        raise ModelError(
            found=f"the trunk {name}: {' '.join(str(error).split())[:200]}",
            allowed="a ViT of timm, such as vit_small_patch8_224.dino or vit_small_patch14_dinov2.lvd142m",
            fix="set `encode.trunk.name` to one, or `encode.trunk.source: backbone` for a CNN",
        ) from error
    if not all(hasattr(vit, part) for part in ("blocks", "patch_embed", "num_prefix_tokens")):
        raise ModelError(
            found=f"the trunk {name}, a {type(vit).__name__}",
            allowed="a ViT of timm, such as vit_small_patch8_224.dino or vit_small_patch14_dinov2.lvd142m",
            fix="set `encode.trunk.name` to one, or `encode.trunk.source: backbone` for a CNN",
        )
    return vit


def load_trunk(folder: Path) -> Trunk:
    """The trunk in a folder that the stage encode-trunk wrote, or that lies in a model folder.

    Raises:
        ModelError: there is none.
    """
    path = folder / "trunk.json"
    if not path.is_file():
        raise ModelError(
            found=f"{folder} has no trunk.json",
            allowed="a folder written by the stage encode-trunk",
            fix="set `encode.trunk.source` in params.yaml and run `dvc repro encode-trunk`",
        )
    config = read_json(path)
    trunk = build_trunk(config)
    trunk.load_state_dict(load_tensors(folder / "model.safetensors"))
    return trunk


def build_trunk(config: dict[str, Any]) -> Trunk:
    """The network that a trunk.json describes, untrained."""
    if config["source"] == "pretrain":
        return TinyTrunk(**config["model"])
    if config["source"] == "backbone":
        backbone = build_timm_backbone(config["name"], options=config["options"], readout="ignore", weights=None)
        return BackboneTrunk(FrozenFeatures(backbone, stride=config["stride"], mean=config["mean"], std=config["std"]))
    return VitTrunk(
        build_vit(config["name"], config["options"]),
        facet=config["facet"],
        positions=config["positions"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def backbone_trunk(encode: Path, *, stride: int) -> tuple[BackboneTrunk, dict[str, Any]]:
    """The backbone of an encode folder as a trunk, and what trunk.json says of it.

    Raises:
        ModelError: the backbone is the CLIP's own tower.
    """
    config, weights = read_backbone(encode)
    if config["source"] == "clip":
        raise ModelError(
            found="`encode.trunk.source: backbone` while `encode.backbone.source` is clip",
            allowed="a backbone of timm",
            fix="set `encode.backbone.source: timm`, or another source of the trunk",
        )
    backbone = build_timm_backbone(config["name"], options=config["options"], readout="ignore", weights=weights)
    features = FrozenFeatures(backbone, stride=stride, mean=config["mean"], std=config["std"])
    kept = {key: config[key] for key in ("name", "options", "mean", "std", "licence")}
    return BackboneTrunk(features), {"source": "backbone", "stride": stride, **kept}
