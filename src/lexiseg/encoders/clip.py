"""A frozen CLIP as a folder: towers, tokenizer and preprocessing, whatever it came from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import default_bpe
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from lexiseg.encoders.tiny_clip import TinyClip, TinyClipConfig, TinyVision
from lexiseg.encoders.tokenizer import WordTokenizer
from lexiseg.errors import ModelError
from lexiseg.settings import parse
from lexiseg.storage import load_tensors, read_json, save_tensors, write_json, write_text

# Rows of a text batch: fixed, so that a text's embedding does not depend on what else is encoded with it.
TEXT_BATCH = 32
# Tokens that are computed of a text, start and end included; a label of a word or two has 3 to 5 of CLIP's 77.
TEXT_LENGTHS = (8, 16, 32)
BYTE_PAIRS = "bpe_simple_vocab_16e6.txt.gz"  # the merges of CLIP's tokenizer, in the folder of an open_clip model


@dataclass
class FrozenClip:
    """A CLIP whose weights never change.

    Attributes:
        model: has `visual` and `encode_text`.
        tokenize: list of texts -> ids (N, L) int64.
        mean, std: per channel, of RGB in 0..1.
        dim: size C of the common embedding space.
        kind: "tiny" or "open_clip".
        licence: of the weights.
    """

    model: nn.Module
    tokenize: Callable[[list[str]], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dim: int
    kind: str
    licence: str

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)

    @property
    def is_dense(self) -> bool:
        """Whether the image tower is a ViT, which `embed_patches` needs."""
        return isinstance(self.model.visual, VisionTransformer)

    @property
    def patch_size(self) -> int:
        """Pixels per side of a patch. Raises ModelError where the image tower is not a ViT of open_clip."""
        return int(_require_vit(self.model.visual).patch_size[0])

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 RGB (B, 3, H, W) -> the floats the image tower was trained on."""
        mean = torch.tensor(self.mean, device=images.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, 3, 1, 1)
        return (images.float() / 255 - mean) / std

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], *, normalise: bool = True) -> Tensor:
        """Vectors (N, C) float32, of length 1 if `normalise`."""
        vectors = torch.zeros(len(texts), self.dim)
        if not texts:
            return vectors
        tokens = self.tokenize(list(texts))
        by_length = _lengths(self.model, tokens)
        bar = tqdm(total=len(texts), desc="encode labels", unit="label", delay=2, disable=len(texts) < TEXT_BATCH)
        for length in by_length.unique().tolist():
            rows = (by_length == length).nonzero()[:, 0]
            for batch in rows.split(TEXT_BATCH):
                # Filled up with copies of the first: the last bits depend on the number of rows.
                filled = torch.cat([batch, batch[:1].expand(TEXT_BATCH - len(batch))])
                embedded = _encode_text(self.model, tokens[filled, :length])
                embedded = F.normalize(embedded.float(), dim=-1) if normalise else embedded.float()
                vectors[batch] = embedded[: len(batch)]
                bar.update(len(batch))
        bar.close()
        return vectors

    @torch.inference_mode()
    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, C) of uint8 RGB images (B, 3, H, W)."""
        return F.normalize(self.model.encode_image(self.normalise(images)).float(), dim=-1)  # type: ignore[operator]

    @torch.inference_mode()
    def embed_patches(self, images: Tensor) -> Tensor:
        """MaskCLIP-style dense embeddings: unit vectors (B, C, h, w) of uint8 RGB images (B, 3, H, W)."""
        return dense_embeddings(self.model.visual, self.normalise(images))  # type: ignore[arg-type]

    def unknown_words(self, text: str) -> list[str]:
        """Words the encoder has certainly never seen; empty where that cannot be known (byte-pair tokenizers)."""
        return self.tokenize.unknown_words(text) if isinstance(self.tokenize, WordTokenizer) else []


def _lengths(model: nn.Module, tokens: Tensor) -> Tensor:
    """(N,) how many of the tokens (N, L) to compute: a length of `TEXT_LENGTHS` that holds the text, or all.

    A text alone decides its length, so that its vector does not depend on what else is encoded with it.
    """
    # Behind a causal mask the end token, which is read out, sees nothing of the padding after it.
    context = tokens.shape[1]
    if not (
        isinstance(model, open_clip.CLIP)
        and model.attn_mask is not None
        and model.text_pool_type == "argmax"
        and isinstance(model.text_projection, nn.Parameter)
    ):
        return torch.full((len(tokens),), context)
    allowed = torch.tensor([*(length for length in TEXT_LENGTHS if length < context), context])
    return allowed[torch.searchsorted(allowed, tokens.argmax(dim=1) + 1)]


def _encode_text(model: Any, tokens: Tensor) -> Tensor:
    """Text embeddings (B, C) of token ids (B, L), L up to the context length; not normalised."""
    length = tokens.shape[1]
    # A shorter one comes from `_lengths`, so the model is a plain CLIP.
    if not isinstance(model, open_clip.CLIP) or length == model.context_length:
        return model.encode_text(tokens)
    parts: Any = model
    hidden = parts.token_embedding(tokens) + parts.positional_embedding[:length]
    hidden = parts.ln_final(parts.transformer(hidden, attn_mask=parts.attn_mask[:length, :length]))
    return hidden[torch.arange(len(tokens)), tokens.argmax(dim=1)] @ parts.text_projection


def dense_embeddings(visual: nn.Module, images: Tensor) -> Tensor:
    """The value path of MaskCLIP (Zhou et al. 2022) with residual and MLP kept.

    In the last block each patch attends to itself only, that is, attention is replaced by the value and
    output projections; ln_post and the projection into the text space follow for every patch.

    Args:
        visual: a VisionTransformer of open_clip (or TinyVision).
        images: normalised floats (B, 3, H, W); sides are multiples of the patch size.

    Returns:
        Unit vectors (B, C, h, w).

    Raises:
        ModelError: the image tower is not a ViT of open_clip.
    """
    vit = _require_vit(visual)
    tokens, mask, (height, width) = vit_tokens(vit, images)
    *blocks, last = vit.transformer.resblocks
    for block in blocks:
        tokens = block(tokens, attn_mask=mask)
    embedded = vit.ln_post(value_path_block(last, tokens)[:, 1:]) @ vit.proj
    return F.normalize(embedded, dim=-1).transpose(1, 2).reshape(len(images), -1, height, width)


def vit_tokens(
    visual: VisionTransformer, images: Tensor, *, antialias: bool = True
) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
    """Tokens before the first block for any image size, the attention mask if there is one, and the grid.

    Where the grid is not the trained one, the positions of a ViT are resized bicubically. With `antialias` torch takes
    another cubic (a = -0.5 instead of -0.75), also where the grid becomes larger.
    """
    grid = visual.conv1(images)
    height, width = grid.shape[-2:]
    if isinstance(visual, TinyVision):
        tokens, mask = visual.tokens(grid)
        return tokens, mask, (height, width)
    positions = visual.positional_embedding
    if (height, width) != visual.grid_size:
        rest = positions[1:].view(*visual.grid_size, -1).permute(2, 0, 1)[None]
        rest = F.interpolate(rest, size=(height, width), mode="bicubic", antialias=antialias)[0]
        positions = torch.cat([positions[:1], rest.flatten(1).T])
    tokens = grid.flatten(2).transpose(1, 2)
    classes = visual.class_embedding.expand(len(tokens), 1, -1).to(tokens)
    return visual.ln_pre(torch.cat([classes, tokens], dim=1) + positions.to(tokens)), None, (height, width)


def value_path_block(block: Any, tokens: Tensor) -> Tensor:
    """A residual attention block in which every token attends to itself only: (B, L, D) -> (B, L, D)."""
    attention = block.attn
    normal = block.ln_1(tokens)
    width = normal.shape[-1]
    value = F.linear(normal, attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :])
    tokens = tokens + block.ls_1(attention.out_proj(value))
    return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))


def save_tiny_clip(model: TinyClip, tokenizer: WordTokenizer, folder: Path) -> None:
    """Write a pretrained tiny CLIP as a folder that `load_clip` reads."""
    save_tensors(folder / "model.safetensors", model.state_dict())
    write_text(folder / "tokenizer.json", tokenizer.to_json())
    config = {
        "kind": "tiny",
        "model": model.config.model_dump(),
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "licence": "trained here on the captions of the data set; the licence of those captions applies",
    }
    write_json(folder / "clip.json", config)


def save_open_clip(folder: Path, *, name: str, pretrained: str, sha256: str | None, licence: str) -> None:
    """Write an open_clip model as a folder that `load_clip` reads.

    Args:
        folder: where to write.
        name: an architecture of open_clip ("ViT-B-16", …).
        pretrained: a weight file, or a tag of open_clip (fetched from a hub, so it needs a network).
        sha256: expected hash of the weight file.
        licence: of the weights, as the model folder will state it.

    Raises:
        ModelError: unknown architecture, unknown tag, or weights that do not fit.
    """
    usable = sorted(model for model in open_clip.list_models() if _has_own_tokenizer(model))
    if name not in usable:
        raise ModelError(
            found=f"`encode.clip.model: {name}`",
            allowed=f"an architecture of open_clip that comes with its tokenizer: {', '.join(usable)}",
            fix="choose one of them",
        )
    is_file = Path(pretrained).is_file()
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not is_file and pretrained not in tags:
        raise ModelError(
            found=f"`{pretrained}` is neither a file nor a tag of {name}",
            allowed=f"a weight file, or one of {', '.join(tags) or 'no tags'}",
            fix="copy a weight file with `lexiseg weights add FILE` and name it in `encode.clip.weights`",
        )
    architecture = open_clip.get_model_config(name)
    assert architecture is not None
    quick = bool(architecture.get("quick_gelu"))
    if not is_file and bool(open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu")) != quick:
        raise ModelError(
            found=f"{name} with the weights `{pretrained}`, which were trained with another activation (QuickGELU): "
            "every embedding would be wrong without a sign of it",
            allowed="weights and architecture with the same activation",
            fix=f"set `encode.clip.model: {name.removesuffix('-quickgelu') if quick else f'{name}-quickgelu'}`",
        )
    try:
        if is_file:
            model = open_clip.create_model(name, pretrained=None)
            model.load_state_dict(load_tensors(pretrained, sha256=sha256))
        else:
            model = open_clip.create_model(name, pretrained=pretrained)
    except (RuntimeError, OSError) as error:
        raise ModelError(
            found=f"weights `{pretrained}` do not load into {name}: {' '.join(str(error).split())[:300]}",
            allowed=f"a complete state_dict of {name}, or a tag while the network is there",
            fix="check `encode.clip.model` and `encode.clip.weights`; downloads have to be allowed: "
            "HF_HUB_OFFLINE=0 dvc repro encode",
        ) from error
    preprocess = open_clip.get_model_preprocess_cfg(model)
    config = {
        "kind": "open_clip",
        "model": architecture,
        "mean": list(preprocess["mean"]),
        "std": list(preprocess["std"]),
        "licence": licence,
    }
    save_tensors(folder / "model.safetensors", model.state_dict())
    shutil.copyfile(default_bpe(), folder / BYTE_PAIRS)
    write_json(folder / "clip.json", config)


def copy_clip(source: Path, target: Path) -> None:
    """Copy the CLIP of a model folder into an encode folder.

    Raises:
        ModelError: the model's text side is no CLIP.
    """
    if not (source / "clip" / "clip.json").is_file():
        raise ModelError(
            found=f"{source} holds no CLIP: its text side is of another kind",
            allowed="a model folder with clip/clip.json",
            fix="set `encode.text` to that text side, and `encode.clip.source: none`",
        )
    shutil.copytree(source / "clip", target / "clip")


def build_clip(config: dict[str, Any], *, source: str) -> nn.Module:
    """The architecture that a clip.json describes, with random weights."""
    if config["kind"] == "tiny":
        return TinyClip(parse(config["model"], TinyClipConfig, source=source))
    arguments = {key: config["model"][key] for key in ("embed_dim", "vision_cfg", "text_cfg")}
    if "quick_gelu" in config["model"]:
        arguments["quick_gelu"] = config["model"]["quick_gelu"]
    kind = open_clip.CustomTextCLIP if config["model"].get("custom_text") else open_clip.CLIP
    return kind(**arguments)


def load_clip(folder: Path, *, visual: bool = True) -> FrozenClip:
    """Read a CLIP folder.

    Args:
        folder: written by the encode stage.
        visual: keep the image tower; without it the result embeds texts only, in half the memory.

    Raises:
        ModelError: the folder is not one.
    """
    if not (folder / "clip.json").is_file():
        raise ModelError(
            found=f"{folder} has no clip.json",
            allowed="a CLIP folder written by the encode stage",
            fix="run `dvc repro encode`; or remove what needs a CLIP image tower (the baseline `maskclip`)",
        )
    config = read_json(folder / "clip.json")
    model = build_clip(config, source=str(folder / "clip.json"))
    model.load_state_dict(load_tensors(folder / "model.safetensors"))
    if not visual:
        model.visual = nn.Identity()
    if isinstance(model, TinyClip):
        context = model.config.context_length
        tokenize: Any = WordTokenizer.load(folder / "tokenizer.json", context_length=context)
    else:
        context = config["model"]["text_cfg"].get("context_length", 77)
        tokenize = open_clip.SimpleTokenizer(str(folder / BYTE_PAIRS), context_length=context)
    return FrozenClip(
        model=model,
        tokenize=tokenize,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        dim=config["model"]["embed_dim"],
        kind=config["kind"],
        licence=config["licence"],
    )


def _require_vit(visual: Any) -> Any:
    if not isinstance(visual, VisionTransformer):
        raise ModelError(
            found=f"an image tower of type {type(visual).__name__}",
            allowed="a ViT of open_clip (ViT-B-32, ViT-B-16, ViT-L-14, …)",
            fix="choose a ViT in `encode.clip.model`, or leave `maskclip` out of `baselines`",
        )
    return visual


def _has_own_tokenizer(name: str) -> bool:
    # The others take a tokenizer from a hub, which the folder cannot carry, or are no plain pair of towers.
    config: Any = open_clip.get_model_config(name)
    return "hf_tokenizer_name" not in config["text_cfg"] and "multimodal_cfg" not in config
