"""A ViT of timm as a frozen trunk: DINO, DINOv2, DINOv3 and others."""

from __future__ import annotations

from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lexiseg.encoders.backbone import check_name
from lexiseg.encoders.tiny_trunk import check_sides
from lexiseg.encoders.trunk import Trunk
from lexiseg.errors import ModelError

VIT_OPTIONS = {"num_classes": 0, "dynamic_img_size": True}  # without classifier, for pictures of any size

Facet = Literal["features", "keys"]
Positions = Literal["timm", "dino"]


class VitTrunk(Trunk):
    """A ViT of timm, read out densely: DINO, DINOv2, DINOv3 and others.

    Letters: B pictures of H x W pixels, h x w patches, D channels.

    Args:
        vit: the ViT.
        facet: "features": tokens after the last norm; "keys": those of the last block's attention, heads side by side,
            as its projection gives them, with its bias: before a norm of keys, and before they are turned by their
            position (DINOv3).
        positions: how positions are resized for other grids than the trained one: "timm", or "dino" as in DINO's code,
            bicubically by a scale that is 0.1 of a patch too large.
        mean, std: of RGB in 0..1, per channel.

    Raises:
        ModelError: patches that one convolution does not cut out, or that are no squares side by side; or a facet or
            positions that this ViT does not have.
    """

    def __init__(
        self, vit: nn.Module, *, facet: Facet, positions: Positions, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.vit: Any = vit
        self.facet, self.positions = facet, positions
        self.multiple = _patch_side(vit)
        self.channels = int(self.vit.embed_dim)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        if facet == "keys":
            self.channels = len(key_projection(self.vit.blocks[-1])[0])
        if positions == "dino" and not _has_plain_positions(vit):
            raise ModelError(
                found=f"`encode.trunk.positions: dino` with {type(vit).__name__}",
                allowed="a ViT with one class token and a square of learned positions, as vit_small_patch8_224.dino",
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
        last, kept = self.vit.blocks[-1], list[Tensor]()
        hook = last.attn.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
        try:
            self._through(pixels)
        finally:
            hook.remove()
        return F.linear(kept[0], *key_projection(last))

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


def _patch_side(vit: Any) -> int:
    # Hybrids call the side within their CNN's map a patch, so the stride in pixels cannot be read from it.
    embed = vit.patch_embed
    sides = set(embed.patch_size) if isinstance(embed, PatchEmbed) else set()
    if len(sides) != 1 or set(getattr(embed.proj, "stride", ())) != sides:
        raise ModelError(
            found=f"a trunk whose patches are cut by {type(embed).__name__}"
            + (f", {' x '.join(map(str, embed.patch_size))} pixels" if isinstance(embed, PatchEmbed) else ""),
            allowed="a plain ViT: square patches side by side, cut by one convolution",
            fix="choose another `encode.trunk.name`, such as vit_small_patch8_224.dino; no hybrid of CNN and ViT",
        )
    return int(sides.pop())


def key_projection(block: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (D', D) and bias (D',) or None of what makes the keys in a block's attention.

    timm's attention has one matrix for query, key and value, or (Eva, DINOv3) one for each; the biases of the joint one
    may stand beside it, Eva's of the key being constantly 0.

    Raises:
        ModelError: the attention has neither.
    """
    attention = getattr(block, "attn", None)
    if isinstance(getattr(attention, "k_proj", None), nn.Linear):
        return attention.k_proj.weight, attention.k_proj.bias  # type: ignore[union-attr]
    if not isinstance(getattr(attention, "qkv", None), nn.Linear):
        raise ModelError(
            found=f"`encode.trunk.facet: keys` with blocks of the kind {type(block).__name__}, without keys to be read",
            allowed="keys of a ViT of timm with qkv or k_proj in its attention, or `facet: features`",
            fix="set `encode.trunk.facet: features`",
        )
    weight, bias = attention.qkv.weight, attention.qkv.bias  # type: ignore[union-attr]
    beside = getattr(attention, "k_bias", None)
    return weight.chunk(3)[1], beside if bias is None else bias.chunk(3)[1]


def _has_plain_positions(vit: Any) -> bool:
    if not isinstance(vit, VisionTransformer) or vit.num_prefix_tokens != 1 or vit.cls_token is None:
        return False
    rows, columns = vit.patch_embed.grid_size
    return rows == columns and vit.pos_embed is not None and vit.pos_embed.shape[1] == 1 + rows * columns


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


def build_vit(name: str, options: dict[str, Any]) -> nn.Module:
    """A ViT of timm, untrained, for pictures of any size.

    Raises:
        ModelError: an unknown name, or no ViT.
    """
    try:
        vit = timm.create_model(check_name(name), pretrained=False, **VIT_OPTIONS, **options)
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
