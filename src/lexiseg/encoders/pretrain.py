"""Pretraining of the tiny CLIP on image-caption pairs (embedded profile)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lexiseg.data.dataset import PreparedSplit
from lexiseg.encoders.settings import PretrainSettings
from lexiseg.encoders.tiny_clip import TinyClip, TinyClipConfig
from lexiseg.encoders.tokenizer import WordTokenizer
from lexiseg.errors import DataError
from lexiseg.training import fit, shuffled_indices, step_seed, warmup_cosine


class CaptionedImages:
    """Images of one size with their captions, decoded once and kept in memory.

    Args:
        split: where they are.
        name: its name.
        size: side of the square, in pixels, that the images are resized to; None: they have one size already.

    Attributes:
        images: uint8 (N, 3, H, W).
        captions: per image, one or more texts.
    """

    def __init__(self, split: PreparedSplit, *, name: str, size: int | None = None) -> None:
        captioned = [(index, texts) for index, texts in enumerate(split.captions) if texts]
        images = [_square(split.image(index), size) for index, _ in captioned]
        sizes = {image.shape for image in images}
        if len(sizes) != 1:
            raise DataError(
                found=f"split `{name}` has {len(images)} captioned images of {len(sizes)} sizes",
                allowed="captioned images of one size (the tiny CLIP is for small uniform pictures)",
                fix="set `encode.pretrain.size`; or `encode.clip.source` to open_clip, or to none where the text is a "
                "table or none",
            )
        self.images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        self.captions: list[Sequence[str]] = [texts for _, texts in captioned]

    def batch(self, indices: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, list[str]]:
        """Images uint8 (B, 3, H, W) and one random caption each."""
        texts = [self.captions[index][rng.integers(len(self.captions[index]))] for index in indices]
        return self.images[torch.from_numpy(indices)], texts


def _square(image: np.ndarray, size: int | None) -> np.ndarray:
    if size is None or image.shape[:2] == (size, size):
        return image
    return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


class ClipPretraining(L.LightningModule):
    """Contrastive training; pairs with the same caption share the target mass."""

    def __init__(self, model: TinyClip, settings: PretrainSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        images = (batch["images"].float() / 255 - 0.5) / 0.5
        image = F.normalize(self.model.visual.embed(images, crop=batch["crop"]), dim=-1)
        text = F.normalize(self.model.encode_text(batch["tokens"]), dim=-1)
        # The scale is clamped as in CLIP, lower: small batches do not bear a sharper softmax.
        scale = self.model.logit_scale.exp().clamp(max=self.settings.max_scale)
        loss = contrastive_loss(scale * image @ text.T, batch["group"])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        optimiser = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": self.settings.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.settings.lr,
            betas=(0.9, 0.98),
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser,
            lambda step: warmup_cosine(step, steps=self.settings.steps, warmup=self.settings.warmup, floor=0.02),
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def contrastive_loss(logits: Tensor, group: Tensor) -> Tensor:
    """Symmetric InfoNCE in which rows of one group are all positives of each other.

    Args:
        logits: scaled similarities (B, B), images by texts.
        group: int64 (B,); equal numbers mark equal captions.
    """
    same = (group[:, None] == group).float()
    target = same / same.sum(dim=1, keepdim=True)
    by_image = -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
    by_text = -(target * logits.T.log_softmax(dim=1)).sum(dim=1).mean()
    return (by_image + by_text) / 2


def pretrain(
    splits: dict[str, PreparedSplit], settings: PretrainSettings, *, seed: int
) -> tuple[TinyClip, WordTokenizer, list[dict[str, float]]]:
    """Train a tiny CLIP.

    A curriculum: first only small pictures with at most one object (the split `settings.iconic`), then these
    and whole scenes (the split `settings.scenes`) in turn. A data set without iconic pictures trains on scenes
    alone.

    Returns:
        The model, its tokenizer, and the training curve.
    """
    scenes = CaptionedImages(splits[settings.scenes], name=settings.scenes, size=settings.size)
    iconic = CaptionedImages(splits[settings.iconic], name=settings.iconic) if settings.iconic in splits else None
    sources = (scenes, iconic) if iconic else (scenes,)
    texts = [text for source in sources for captions in source.captions for text in captions]
    tokenizer = WordTokenizer.from_captions(texts, context_length=settings.context_length)
    image_size = scenes.images.shape[-1]
    config = TinyClipConfig(
        vocab_size=tokenizer.vocab_size,
        image_size=image_size,
        vision_layers=settings.vision_layers,
        text_layers=settings.text_layers,
        context_length=settings.context_length,
    )
    torch.manual_seed(seed)
    model = TinyClip(config)
    only_iconic = round(settings.steps * settings.iconic_share)

    def batch(step: int) -> dict[str, Any]:
        # Each source counts its own batches: a pass over it leaves no picture out.
        turn = max(0, step - only_iconic)
        if iconic is None:
            source, size, number = scenes, settings.scene_batch, step
        elif step < only_iconic or turn % 2 == 0:
            source, size, number = iconic, settings.iconic_batch, step - turn // 2
        else:
            source, size, number = scenes, settings.scene_batch, turn // 2
        rng = np.random.default_rng(step_seed(seed, step))
        indices = shuffled_indices(len(source.captions), size, number, seed=seed)
        images, captions = source.batch(indices, rng)
        # Small pictures read their positions at a random place of the scenes' grid; larger ones have them resized.
        room = (image_size - images.shape[-1]) // config.patch_size
        crop = (int(rng.integers(room + 1)), int(rng.integers(room + 1))) if room > 0 else None
        numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
        return {
            "images": images,
            "tokens": tokenizer(captions, trim=True),
            "group": torch.tensor([numbers[caption] for caption in captions]),
            "crop": crop,
        }

    module = ClipPretraining(model, settings)
    curve = fit(module, batch=batch, steps=settings.steps, seed=seed, gradient_clip=1.0, title="pretrain CLIP")
    return model, tokenizer, curve


def retrieval_recall(
    image: Tensor, text: Tensor, captions: Sequence[str], *, ranks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Recall at k of image-text retrieval, in 0..1.

    Args:
        image: unit vectors (N, C).
        text: unit vectors (N, C); row i belongs to image i.
        captions: the N texts; several images may carry the very same one, and retrieving any of them is right.
        ranks: values of k.

    Returns:
        `{"image_to_text_r1": ..., "text_to_image_r1": ..., ...}`.
    """
    similarity = image @ text.T
    # By the words, not by the vectors: an encoder that gives all texts one vector must not count as perfect.
    same = torch.tensor([[one == other for other in captions] for one in captions])
    result = {}
    for name, scores, right in (("image_to_text", similarity, same), ("text_to_image", similarity.T, same)):
        for rank in ranks:
            top = scores.topk(min(rank, len(scores)), dim=1).indices
            result[f"{name}_r{rank}"] = float(right.gather(1, top).any(dim=1).float().mean())
    return result
