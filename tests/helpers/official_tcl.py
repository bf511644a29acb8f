"""Checkpoints with TCL's official names, and a second, plain implementation of its network and losses on them.

Written from the equations, without lexiseg's code: what the importer and our network make of the same tensors has to
agree with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The sizes of the fixtures of this family.
CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "image_resolution": 64,
    "vision_layers": 3,
    "vision_width": 128,
    "vision_patch_size": 16,
    "context_length": 16,
    "vocab_size": 96,
    "transformer_width": 64,
    "transformer_heads": 2,
    "transformer_layers": 2,
    "vision_heads": 2,
}
LOSSES = {"tcl_w": 0.1, "area_w": 0.4, "tv_w": 1.0}


def random_state(*, seed: int = 0, clip: bool = True) -> dict[str, Tensor]:
    """A complete state dict, or what the released file has of one: without the frozen CLIP and the temperatures."""
    rng = torch.Generator().manual_seed(seed)
    width, channels, words = CLIP["vision_width"], CLIP["embed_dim"], CLIP["transformer_width"]
    state: dict[str, Tensor] = {}

    def put(name: str, *shape: int, scale: float = 1.0, mean: float = 0.0) -> None:
        state[name] = mean + scale * torch.randn(shape, generator=rng)

    def norm(name: str, size: int) -> None:
        put(f"{name}.weight", size, scale=0.1, mean=1.0)
        put(f"{name}.bias", size, scale=0.1)

    def block(name: str, size: int) -> None:
        for part, out, rows in (
            ("mlp.c_fc", 4 * size, size),
            ("mlp.c_proj", size, 4 * size),
            ("attn.out_proj", size, size),
        ):
            put(f"{name}.{part}.weight", out, rows, scale=rows**-0.5)
            put(f"{name}.{part}.bias", out, scale=0.1)
        put(f"{name}.attn.in_proj_weight", 3 * size, size, scale=size**-0.5)
        put(f"{name}.attn.in_proj_bias", 3 * size, scale=0.1)
        norm(f"{name}.ln_1", size)
        norm(f"{name}.ln_2", size)

    grounder = "masker.image_encoder"
    block(f"{grounder}.backbone.transformer.resblocks.{CLIP['vision_layers'] - 1}", width)
    for stage in range(2):
        for unit in ("conv", "conv2"):
            start = f"{grounder}.decoder.decoder.net.{stage}.{unit}"
            norm(f"{start}.norm", width)
            put(f"{start}.conv.weight", width, width, 3, 3, scale=(9 * width) ** -0.5)
            put(f"{start}.conv.bias", width, scale=0.1)
            put(f"{start}.gate.gate", scale=0.3)
    norm(f"{grounder}.decoder.image_proj.ln", width)
    put(f"{grounder}.decoder.image_proj.proj", width, channels, scale=width**-0.5)
    state["masker.sim2mask.w"], state["masker.sim2mask.b"] = torch.tensor(8.0), torch.tensor(-0.5)
    if not clip:
        return state
    state["tcli_loss.logit_scale"], state["tclf_loss.logit_scale"] = torch.tensor(2.5), torch.tensor(2.7)
    visual = "clip_image_encoder.clip_visual"
    side = CLIP["image_resolution"] // CLIP["vision_patch_size"]
    put(f"{visual}.class_embedding", width, scale=width**-0.5)
    put(f"{visual}.positional_embedding", 1 + side**2, width, scale=width**-0.5)
    put(f"{visual}.conv1.weight", width, 3, 16, 16, scale=768**-0.5)
    norm(f"{visual}.ln_pre", width)
    for layer in range(CLIP["vision_layers"]):
        block(f"{visual}.transformer.resblocks.{layer}", width)
    norm("clip_image_encoder.clip_proj.ln", width)
    put("clip_image_encoder.clip_proj.proj", width, channels, scale=width**-0.5)
    text = "clip_text_encoder"
    put(f"{text}.token_embedding.weight", CLIP["vocab_size"], words, scale=0.5)
    put(f"{text}.positional_embedding", CLIP["context_length"], words, scale=0.1)
    put(f"{text}.text_projection", words, channels, scale=words**-0.5)
    for layer in range(CLIP["transformer_layers"]):
        block(f"{text}.transformer.resblocks.{layer}", words)
    norm(f"{text}.ln_final", words)
    return state


class Official:
    """The network on a complete state dict.

    Letters: B images and B texts, L tokens of width D, C channels, (h, w) the grid of patches.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def block(self, name: str, x: Tensor, *, heads: int, mask: Tensor | None) -> Tensor:
        """A residual attention block on (B, L, D) with an additive mask (L, L)."""
        state, (batch, length, width) = self.state, x.shape
        qkv = F.linear(
            self.norm(f"{name}.ln_1", x), state[f"{name}.attn.in_proj_weight"], state[f"{name}.attn.in_proj_bias"]
        )
        q, k, v = (part.reshape(batch, length, heads, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        scores = q @ k.transpose(-1, -2) / (width // heads) ** 0.5
        attended = ((scores if mask is None else scores + mask).softmax(dim=-1) @ v).transpose(1, 2).reshape(x.shape)
        x = x + F.linear(attended, state[f"{name}.attn.out_proj.weight"], state[f"{name}.attn.out_proj.bias"])
        inner = F.linear(self.norm(f"{name}.ln_2", x), state[f"{name}.mlp.c_fc.weight"], state[f"{name}.mlp.c_fc.bias"])
        inner = inner * (1.702 * inner).sigmoid()
        return x + F.linear(inner, state[f"{name}.mlp.c_proj.weight"], state[f"{name}.mlp.c_proj.bias"])

    def tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens before the last block."""
        visual, state = "clip_image_encoder.clip_visual", self.state
        grid = F.conv2d(images, state[f"{visual}.conv1.weight"], stride=CLIP["vision_patch_size"])
        height, width = grid.shape[-2:]
        side = CLIP["image_resolution"] // CLIP["vision_patch_size"]
        positions = state[f"{visual}.positional_embedding"]
        if (height, width) != (side, side):
            patches = positions[1:].T.reshape(1, -1, side, side)
            patches = F.interpolate(patches, size=(height, width), mode="bicubic", align_corners=False)
            positions = torch.cat([positions[:1], patches[0].flatten(1).T])
        first = state[f"{visual}.class_embedding"].expand(len(images), 1, -1)
        x = self.norm(f"{visual}.ln_pre", torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1) + positions)
        for layer in range(CLIP["vision_layers"] - 1):
            x = self.block(f"{visual}.transformer.resblocks.{layer}", x, heads=CLIP["vision_heads"], mask=None)
        return x, (height, width)

    def head(self, x: Tensor, ln: str, proj: str) -> Tensor:
        return self.norm(ln, x) @ self.state[proj]

    def image(self, images: Tensor) -> Tensor:
        """CLIP's embedding (B, C)."""
        x, _ = self.tokens(images)
        last = f"clip_image_encoder.clip_visual.transformer.resblocks.{CLIP['vision_layers'] - 1}"
        x = self.block(last, x, heads=CLIP["vision_heads"], mask=None)[:, 0]
        return self.head(x, "clip_image_encoder.clip_proj.ln", "clip_image_encoder.clip_proj.proj")

    def text(self, ids: Tensor) -> Tensor:
        """CLIP's text embedding (B, C) of token ids (B, L)."""
        name, state = "clip_text_encoder", self.state
        x = state[f"{name}.token_embedding.weight"][ids] + state[f"{name}.positional_embedding"]
        causal = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
        for layer in range(CLIP["transformer_layers"]):
            x = self.block(f"{name}.transformer.resblocks.{layer}", x, heads=CLIP["transformer_heads"], mask=causal)
        x = self.norm(f"{name}.ln_final", x)
        return x[torch.arange(len(ids)), ids.argmax(dim=1)] @ state[f"{name}.text_projection"]

    def dense(self, images: Tensor, last: str) -> Tensor:
        """(B, D, h, w) behind a last block in which every token sees only itself."""
        x, (height, width) = self.tokens(images)
        alone = torch.full((x.shape[1], x.shape[1]), -torch.inf).fill_diagonal_(0)
        x = self.block(last, x, heads=CLIP["vision_heads"], mask=alone)[:, 1:]
        return x.transpose(1, 2).reshape(len(images), -1, height, width)

    def embedding(self, images: Tensor) -> Tensor:
        """The grounder's dense embeddings (B, C, 4h, 4w)."""
        start, state = "masker.image_encoder", self.state
        x = self.dense(images, f"{start}.backbone.transformer.resblocks.{CLIP['vision_layers'] - 1}")
        for stage in range(2):
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            for unit in ("conv", "conv2"):
                name = f"{start}.decoder.decoder.net.{stage}.{unit}"
                inner = F.gelu(self.norm(f"{name}.norm", x.movedim(1, -1))).movedim(-1, 1)
                inner = F.conv2d(inner, state[f"{name}.conv.weight"], state[f"{name}.conv.bias"], padding=1)
                x = x + state[f"{name}.gate.gate"].tanh() * inner
        x = self.head(x.movedim(1, -1), f"{start}.decoder.image_proj.ln", f"{start}.decoder.image_proj.proj")
        return x.movedim(-1, 1)

    def cosines(self, embedding: Tensor, text: Tensor) -> Tensor:
        return torch.einsum(
            "bchw,nc->bnhw", F.normalize(embedding, dim=1, eps=1e-6), F.normalize(text, dim=1, eps=1e-6)
        )

    def losses(self, images: Tensor, ids: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The weighted losses by their official names, and the soft masks (B, B, 4h, 4w)."""
        count, text, embedding = len(images), self.text(ids), self.embedding(images)
        logits = self.state["masker.sim2mask.w"] * self.cosines(embedding, text) + self.state["masker.sim2mask.b"]
        soft, own = logits.sigmoid(), torch.eye(count, dtype=torch.bool)
        noisy = (logits + noise.log() - (1 - noise).log()).sigmoid()
        hard = (noisy > 0.5).float() + noisy - noisy.detach()
        mask = F.interpolate(hard[own][:, None], size=images.shape[-2:], mode="nearest")

        def info_nce(similarity: Tensor, name: str) -> Tensor:
            scaled, target = similarity * self.state[name].exp().clamp(max=100), torch.arange(count)
            return LOSSES["tcl_w"] * (F.cross_entropy(scaled, target) + F.cross_entropy(scaled.T, target)) / 2

        def cosine(a: Tensor, b: Tensor) -> Tensor:
            return (F.normalize(a, dim=-1, eps=1e-6) * F.normalize(b, dim=-1, eps=1e-6)).sum(-1)

        def variation(x: Tensor) -> Tensor:
            return LOSSES["tv_w"] * ((x.diff(dim=-1)).abs().mean() + x.diff(dim=-2).abs().mean())

        pooled = torch.einsum("bnhw,bchw->bnc", soft, embedding) / (soft.sum(dim=(2, 3))[..., None] + 1e-6)
        return {
            "tcli_loss": info_nce(cosine(self.image(images * mask)[:, None], text[None]), "tcli_loss.logit_scale"),
            "tclf_loss": info_nce(cosine(pooled, text[None]), "tclf_loss.logit_scale"),
            "area_loss": LOSSES["area_w"] * (soft[own].mean() - 0.4).abs(),
            "neg_area_loss": LOSSES["area_w"] * soft[~own].mean().abs(),
            "tv_img_loss": variation(embedding),
            "tv_mask_loss": variation(soft),
            "soft": soft,
        }


def officially_named(tensors: Mapping[str, Tensor], *, block: int = 2) -> dict[str, Tensor]:
    """The grounder of a model folder under the names of the released file, which leaves the temperatures out."""
    encoder = "masker.image_encoder"
    starts = {
        "grounder.block.": f"{encoder}.backbone.transformer.resblocks.{block}.",
        "grounder.ln_post.": f"{encoder}.decoder.image_proj.ln.",
    }
    names = {
        "grounder.proj": f"{encoder}.decoder.image_proj.proj",
        "grounder.sim_to_mask.scale": "masker.sim2mask.w",
        "grounder.sim_to_mask.bias": "masker.sim2mask.b",
    }
    named = {}
    for name, value in tensors.items():
        start = next((start for start in starts if name.startswith(start)), None)
        if start is not None:
            named[starts[start] + name.removeprefix(start)] = value
        elif name.startswith("grounder.decoder.stages."):
            stage, unit, rest = name.removeprefix("grounder.decoder.stages.").split(".", 2)
            rest = "gate.gate" if rest == "gate" else rest
            named[f"{encoder}.decoder.decoder.net.{stage}.{('conv', 'conv2')[int(unit)]}.{rest}"] = value
        elif name in names:
            named[names[name]] = value
    return named
