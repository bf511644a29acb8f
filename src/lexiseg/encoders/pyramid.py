"""Image backbones as pyramids: every one gives four maps, fine to coarse."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lexiseg.encoders.clip import value_path_block
from lexiseg.encoders.settings import Readout
from lexiseg.encoders.tiny_clip import TinyVision
from lexiseg.errors import ModelError

# The blocks that are tapped (0-based) by the ViT's depth, and the channels after reassembling by its width, as DPT
# and LSeg have them for ViT-L and ViT-B.
VIT_TAPS = {24: (5, 11, 17, 23), 12: (2, 5, 8, 11)}
VIT_CHANNELS = {1024: (256, 512, 1024, 1024), 768: (96, 192, 384, 768)}
TARGET_STRIDES = (4, 8, 16, 32)


class TinyBackbone(nn.Module):
    """The tiny CLIP's image tower: the stem at strides 2 and 4, then the middle and the last block at stride 8.

    Raises:
        ModelError: the image tower of another CLIP.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        if not isinstance(visual, TinyVision):
            raise ModelError(
                found=f"`encode.backbone.source: clip` with an image tower of type {type(visual).__name__}",
                allowed="the tower of the tiny CLIP, or a backbone of timm (ViT-L/16, ViT-B/16, ViT-B/32, any CNN)",
                fix="set `encode.backbone.source: timm` and a name",
            )
        self.visual = visual
        width = visual.class_embedding.shape[0]
        self.channels = (32, 64, width, width)
        self.multiple = int(visual.patch_size[0])  # type: ignore[index]

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.maps_and_embeddings(images)[0]

    def maps_and_embeddings(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The four maps, and the tower's own dense embeddings: unit vectors (B, C, h, w) in the text space.

        The embeddings are those of `dense_embeddings`; the blocks before the last one are computed once.
        """
        fine, middle, grid = self.visual.conv1.levels(images)  # type: ignore[operator]
        height, width = grid.shape[-2:]
        tokens, mask = self.visual.tokens(grid)
        blocks = self.visual.transformer.resblocks
        maps = [fine, middle]
        for index, block in enumerate(blocks):
            if index == len(blocks) - 1:
                alone = self.visual.ln_post(value_path_block(block, tokens)[:, 1:]) @ self.visual.proj
            tokens = block(tokens, attn_mask=mask)
            if index in ((len(blocks) - 1) // 2, len(blocks) - 1):
                maps.append(tokens[:, 1:].transpose(1, 2).reshape(len(images), -1, height, width))
        embedded = F.normalize(alone, dim=-1).transpose(1, 2).reshape(len(images), -1, height, width)
        return maps, embedded


class VitBackbone(nn.Module):
    """A timm ViT whose raw block outputs are reassembled into a pyramid at strides 4, 8, 16 and 32.

    Args:
        vit: a timm VisionTransformer with a class token.
        readout: what becomes of the class token, see `Reassemble`.
        taps: the four blocks, 0-based; None: those of DPT for this depth, evenly spaced for another one.
        channels: of the four maps; None: those of DPT for this width, in proportion for another one.
    """

    def __init__(
        self,
        vit: nn.Module,
        *,
        readout: Readout,
        taps: tuple[int, ...] | None = None,
        channels: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.vit: Any = vit
        depth, dim, patch = len(self.vit.blocks), self.vit.embed_dim, self.vit.patch_embed.patch_size[0]
        self.taps = taps or VIT_TAPS.get(depth, tuple(depth * (i + 1) // 4 - 1 for i in range(4)))
        self.channels = channels or VIT_CHANNELS.get(dim, (dim // 8, dim // 4, dim // 2, dim))
        self.multiple = patch
        self.reassemble = nn.ModuleList(
            Reassemble(dim=dim, channels=c, patch=patch, stride=s, readout=readout)
            for c, s in zip(self.channels, TARGET_STRIDES, strict=True)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Four maps of images (B, 3, H, W).

        Raises:
            ModelError: H or W is no multiple of the patch size; what is left over would shift the maps.
        """
        if any(side % self.multiple for side in images.shape[-2:]):
            raise ModelError(
                found=f"pictures of {images.shape[-2]} x {images.shape[-1]} pixels",
                allowed=f"sides that are multiples of {self.multiple}, the ViT's patch size",
                fix="set `lseg.train.crop` to such sides",
            )
        grid = self.vit.patch_embed.proj(images)
        height, width = grid.shape[-2:]
        tokens = grid.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.vit.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = self.vit.norm_pre(tokens + resize_positions(self.vit.pos_embed, height=height, width=width))
        maps = []
        for index, block in enumerate(self.vit.blocks):
            tokens = block(tokens)
            if index in self.taps:  # raw outputs, before the final norm
                maps.append(self.reassemble[len(maps)](tokens, height=height, width=width))
        return maps


class CnnBackbone(nn.Module):
    """Any timm CNN by name: its last four feature maps, usually at strides 4, 8, 16 and 32."""

    def __init__(self, name: str, *, options: dict[str, Any]) -> None:
        super().__init__()
        self.cnn: Any = timm.create_model(name, pretrained=False, features_only=True, **options)
        channels, strides = self.cnn.feature_info.channels(), self.cnn.feature_info.reduction()
        layout = str(getattr(self.cnn, "output_fmt", "NCHW")).removeprefix("Format.")
        if len(channels) < 4 or strides[-4] == strides[-1] or layout != "NCHW":
            raise ModelError(
                found=f"backbone {name} with feature maps at strides {', '.join(map(str, strides))} in {layout} layout",
                allowed="a CNN with at least four NCHW maps of falling resolution, or a ViT with a class token",
                fix="choose another `encode.backbone.name`",
            )
        self.channels = tuple(channels[-4:])
        self.multiple = 1

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.cnn(images)[-4:]


class Reassemble(nn.Module):
    """Tokens of one tapped block -> one map of the pyramid (DPT, Ranftl et al. 2021).

    Args:
        dim: width D of the tokens.
        channels: channels of the map.
        patch: patch size of the ViT in pixels.
        stride: stride of the map in pixels.
        readout: "project" (default of the paper): class token concatenated to each token, then linear and
            GELU; "add": added; "ignore": dropped.
    """

    def __init__(self, *, dim: int, channels: int, patch: int, stride: int, readout: Readout) -> None:
        super().__init__()
        self.readout = readout
        self.project = nn.Sequential(nn.Linear(2 * dim, dim), nn.GELU()) if readout == "project" else None
        self.reduce = nn.Conv2d(dim, channels, 1)
        if patch > stride:
            factor = patch // stride
            self.resample: nn.Module = nn.ConvTranspose2d(channels, channels, factor, stride=factor)
        elif patch < stride:
            self.resample = nn.Conv2d(channels, channels, 3, stride=stride // patch, padding=1)
        else:
            self.resample = nn.Identity()

    def forward(self, tokens: Tensor, *, height: int, width: int) -> Tensor:
        """tokens (B, 1 + h*w, D) -> (B, channels, h', w')."""
        first, rest = tokens[:, :1], tokens[:, 1:]
        if self.project is not None:
            rest = self.project(torch.cat([rest, first.expand_as(rest)], dim=-1))
        elif self.readout == "add":
            rest = rest + first
        grid = rest.transpose(1, 2).reshape(len(tokens), -1, height, width)
        return self.resample(self.reduce(grid))


def resize_positions(positions: Tensor, *, height: int, width: int) -> Tensor:
    """Positions (1, 1 + s*s, D) of a square grid for a grid of any size: bilinear, the class position untouched."""
    side = round((positions.shape[1] - 1) ** 0.5)
    grid = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(height, width), mode="bilinear", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def build_timm_backbone(
    name: str,
    *,
    options: dict[str, Any],
    readout: Readout,
    weights: dict[str, Tensor] | None,
    channels: Sequence[int] | None = None,
) -> VitBackbone | CnnBackbone:
    """A backbone by timm's name, with the ImageNet weights of the encode folder where there are any.

    Args:
        name: of timm.
        options: for timm.create_model.
        readout: of a ViT's class token.
        weights: its state dict; None leaves it untrained.
        channels: of a ViT's four maps; None: those of DPT for its width.

    Raises:
        ModelError: a backbone that gives no pyramid, or weights that lack tensors.
    """
    if name.startswith("vit_"):
        vit = timm.create_model(name, pretrained=False, num_classes=0, **options)
        if not _is_plain_vit(vit):
            raise ModelError(
                found=f"backbone {name}, not a ViT with one class token and learned positions",
                allowed="such a ViT (ViT-L/16, ViT-B/16, ViT-B/32), or a CNN",
                fix="choose another `encode.backbone.name`",
            )
        _load(vit, weights)
        return VitBackbone(vit, readout=readout, channels=tuple(channels) if channels else None)
    backbone = CnnBackbone(name, options=options)
    _load(backbone.cnn, weights)
    return backbone


def _is_plain_vit(vit: Any) -> bool:
    # What VitBackbone takes for granted: pixels -> patches by one convolution, tokens = class token + patches,
    # a learned position for each of them.
    if not isinstance(vit, VisionTransformer) or not isinstance(vit.patch_embed, PatchEmbed):
        return False
    positions = vit.pos_embed
    return (
        vit.cls_token is not None
        and vit.num_prefix_tokens == 1
        and positions is not None
        and positions.shape[1] == vit.patch_embed.num_patches + 1
    )


def _flat(key: str, own: Container[str]) -> str:
    # timm's pyramids of CNNs hold the parts of a top-level sequence beside each other: stages.0.x -> stages_0.x
    return key if key in own else key.replace(".", "_", 1)


def _load(model: nn.Module, weights: dict[str, Tensor] | None) -> None:
    if weights is None:
        return
    own = model.state_dict().keys()
    result = model.load_state_dict({_flat(key, own): value for key, value in weights.items()}, strict=False)
    lacking: Sequence[str] = result.missing_keys
    if lacking:  # unexpected ones are the classifier
        raise ModelError(
            found=f"the backbone's weights lack {len(lacking)} tensors ({', '.join(lacking[:3])})",
            allowed="the weights the encode stage wrote",
            fix="run `dvc repro encode --force`",
        )
