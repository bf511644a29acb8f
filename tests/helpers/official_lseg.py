"""Checkpoints with the official names, and a second, plain implementation of LSeg's network on them.

It is written from the equations and shares no code with lexiseg: what the importer and our network make of the same
tensors has to agree with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

SIZES: dict[str, Any] = {"width": 64, "heads": 1, "depth": 4, "patch": 16, "grid": 4, "hidden": 128}
CHANNELS, FEATURES, TEXT = (16, 24, 32, 48), 32, 64


def random_state(*, block: bool = False, seed: int = 0, head: bool = True) -> dict[str, Tensor]:
    """A complete state dict of a tiny ViT variant: patch 16, positions for 64 x 64 pixels."""
    rng = torch.Generator().manual_seed(seed)
    width, hidden, patch = SIZES["width"], SIZES["hidden"], SIZES["patch"]
    state: dict[str, Tensor] = {}

    def linear(name: str, out: int, *rest: int, bias: bool = True) -> None:
        fan = int(torch.tensor(rest).prod())
        state[f"{name}.weight"] = torch.randn(out, *rest, generator=rng) / fan**0.5
        if bias:
            state[f"{name}.bias"] = 0.1 * torch.randn(out, generator=rng)

    def norm(name: str, size: int, *, running: bool) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(size, generator=rng)
        state[f"{name}.bias"] = 0.1 * torch.randn(size, generator=rng)
        if running:
            state[f"{name}.running_mean"] = 0.1 * torch.randn(size, generator=rng)
            state[f"{name}.running_var"] = 1 + 0.1 * torch.rand(size, generator=rng)
            state[f"{name}.num_batches_tracked"] = torch.tensor(3)

    state["pretrained.model.cls_token"] = torch.randn(1, 1, width, generator=rng)
    state["pretrained.model.pos_embed"] = 0.1 * torch.randn(1, 1 + SIZES["grid"] ** 2, width, generator=rng)
    linear("pretrained.model.patch_embed.proj", width, 3, patch, patch)
    for index in range(SIZES["depth"]):
        start = f"pretrained.model.blocks.{index}"
        norm(f"{start}.norm1", width, running=False)
        linear(f"{start}.attn.qkv", 3 * width, width)
        linear(f"{start}.attn.proj", width, width)
        norm(f"{start}.norm2", width, running=False)
        linear(f"{start}.mlp.fc1", hidden, width)
        linear(f"{start}.mlp.fc2", width, hidden)
    norm("pretrained.model.norm", width, running=False)
    if head:
        linear("pretrained.model.head", 10, width)
    for level, channels in enumerate(CHANNELS, start=1):
        start = f"pretrained.act_postprocess{level}"
        linear(f"{start}.0.project.0", width, 2 * width)
        linear(f"{start}.3", channels, width, 1, 1)
        if level < 3:
            factor = (4, 2)[level - 1]
            state[f"{start}.4.weight"] = torch.randn(channels, channels, factor, factor, generator=rng) / channels**0.5
            state[f"{start}.4.bias"] = 0.1 * torch.randn(channels, generator=rng)
        if level == 4:
            linear(f"{start}.4", channels, channels, 3, 3)
        linear(f"scratch.layer{level}_rn", FEATURES, channels, 3, 3, bias=False)
        for unit in (1, 2):
            for one in (1, 2):
                inner = f"scratch.refinenet{level}.resConfUnit{unit}"
                linear(f"{inner}.conv{one}", FEATURES, FEATURES, 3, 3, bias=False)
                norm(f"{inner}.bn{one}", FEATURES, running=True)
        linear(f"scratch.refinenet{level}.out_conv", FEATURES, FEATURES, 1, 1)
    linear("scratch.head1", TEXT, FEATURES, 1, 1)
    if block:
        linear("scratch.head_block.depthwise.depthwise", 1, 1, 3, 3)
    return state


def clip_model() -> open_clip.CLIP:
    """A tiny CLIP in the form of OpenAI's: QuickGELU, the full tokenizer."""
    vision = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 16, "image_size": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    return open_clip.CLIP(embed_dim=TEXT, vision_cfg=vision, text_cfg=text, quick_gelu=True)  # type: ignore[arg-type]


def clip_state() -> dict[str, Tensor]:
    """Its weights, matrices in float16."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = clip_model().state_dict()
    return {name: value.half() if value.ndim > 1 else value for name, value in state.items()}


def write_checkpoint(
    path: Path, *, state: Mapping[str, Tensor] | None = None, clip: Mapping[str, Tensor] | None = None, **more: Any
) -> Path:
    """A checkpoint as Lightning 1.3 writes it, with settings in a class of another program.

    Args:
        path: the file.
        state: official names -> tensors; None: a random network with a bottleneck block.
        clip: the CLIP inside; None: `clip_state`, an empty one: none.
        more: other entries.
    """
    clip = clip_state() if clip is None else clip
    tensors = {f"net.{name}": value for name, value in (state or random_state(block=True)).items()}
    tensors |= {f"net.clip_pretrained.{name}": value for name, value in clip.items()}
    settings = argparse.Namespace(arch_option=1, block_depth=2, activation="lrelu", dataset="ade20k")
    torch.save({"state_dict": tensors, "hyper_parameters": settings, "epoch": 199, **more}, path)
    return path


def forward(
    state: Mapping[str, Tensor], images: Tensor, text: Tensor, *, arch_option: int = 0, block_depth: int = 0
) -> Tensor:
    """Logits (B, N, H, W) of images (B, 3, H, W) and raw label vectors (N, C); batch norms in evaluation mode."""

    def conv(name: str, x: Tensor, **options: Any) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def layer_norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def unit(name: str, x: Tensor) -> Tensor:
        inner = x
        for one in (1, 2):
            inner = conv(f"{name}.conv{one}", F.relu(inner), padding=1)
            mean, variance = state[f"{name}.bn{one}.running_mean"], state[f"{name}.bn{one}.running_var"]
            inner = F.batch_norm(inner, mean, variance, state[f"{name}.bn{one}.weight"], state[f"{name}.bn{one}.bias"])
        return x + inner

    heads, patch = SIZES["heads"], SIZES["patch"]
    grid = conv("pretrained.model.patch_embed.proj", images, stride=patch)
    height, width = grid.shape[-2:]
    positions = state["pretrained.model.pos_embed"]
    side = SIZES["grid"]
    spatial = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    spatial = F.interpolate(spatial, size=(height, width), mode="bilinear").flatten(2).transpose(1, 2)
    tokens = torch.cat([state["pretrained.model.cls_token"].expand(len(images), -1, -1), grid.flatten(2).mT], dim=1)
    tokens = tokens + torch.cat([positions[:, :1], spatial], dim=1)
    maps = []
    for level in range(1, 5):
        block = f"pretrained.model.blocks.{level - 1}"
        batch, count, size = tokens.shape
        qkv = linear(f"{block}.attn.qkv", layer_norm(f"{block}.norm1", tokens))
        query, key, value = qkv.reshape(batch, count, 3, heads, size // heads).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT / (size // heads) ** 0.5).softmax(dim=-1)
        tokens = tokens + linear(f"{block}.attn.proj", (weights @ value).transpose(1, 2).reshape(batch, count, size))
        inner = F.gelu(linear(f"{block}.mlp.fc1", layer_norm(f"{block}.norm2", tokens)))
        tokens = tokens + linear(f"{block}.mlp.fc2", inner)
        start = f"pretrained.act_postprocess{level}"
        readout = torch.cat([tokens[:, 1:], tokens[:, :1].expand(-1, count - 1, -1)], dim=-1)
        readout = F.gelu(linear(f"{start}.0.project.0", readout)).mT.reshape(batch, size, height, width)
        reduced = conv(f"{start}.3", readout)
        if level < 3:
            factor = (4, 2)[level - 1]
            reduced = F.conv_transpose2d(reduced, state[f"{start}.4.weight"], state[f"{start}.4.bias"], stride=factor)
        if level == 4:
            reduced = conv(f"{start}.4", reduced, stride=2, padding=1)
        maps.append(conv(f"scratch.layer{level}_rn", reduced, padding=1))
    path = maps[3]
    for level in (4, 3, 2, 1):
        name = f"scratch.refinenet{level}"
        if level < 4:
            path = path + unit(f"{name}.resConfUnit1", maps[level - 1])
        path = unit(f"{name}.resConfUnit2", path)
        path = F.interpolate(path, scale_factor=2, mode="bilinear", align_corners=True)
        path = conv(f"{name}.out_conv", path)
    embedded = F.normalize(conv("scratch.head1", path), dim=1)
    logits = torch.einsum("bchw,nc->bnhw", embedded / 0.07, F.normalize(text, dim=1))
    depth = max(1, block_depth) if arch_option else 0
    for turn in range(depth):
        pieces = [
            conv("scratch.head_block.depthwise.depthwise", logits[:, i : i + 1], padding=1) for i in range(len(text))
        ]
        result = torch.cat(pieces, dim=1)
        if arch_option == 1:
            result = result + logits.max(dim=1, keepdim=True).values
        logits = F.leaky_relu(result, 0.01) if turn < depth - 1 else result
    return F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=True)
