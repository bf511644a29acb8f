"""A closed-set linear head on the frozen backbone: what labels alone give, without any words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexiseg.data.dataset import PreparedSplit
from lexiseg.data.targets import seen_targets
from lexiseg.data.transforms import generator, random_crop
from lexiseg.encoders.features import FrozenFeatures, load_features
from lexiseg.errors import LabelError
from lexiseg.segmentation import IGNORE_LABEL
from lexiseg.training import check_labelled_batch, fit, shuffled_indices, warmup_cosine
from lexiseg.vocabulary import Vocabulary

NEVER = -1e4  # logit of a class the head has no output for: it never wins (and fits into float16)


class LinearTraining(L.LightningModule):
    """Cross entropy of a 1x1 convolution on frozen features."""

    def __init__(self, features: FrozenFeatures, *, classes: int, settings: Any) -> None:
        super().__init__()
        self.features, self.settings = features, settings
        self.head = nn.Conv2d(features.channels, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        self.features.eval()
        logits = self(batch["image"])
        logits = F.interpolate(logits, size=batch["target"].shape[-2:], mode="bilinear", align_corners=True)
        labelled = bool((batch["target"] != IGNORE_LABEL).any())
        # The mean over no pixel is NaN, and would stay in the weights.
        loss = F.cross_entropy(logits, batch["target"], ignore_index=IGNORE_LABEL) if labelled else logits.sum() * 0.0
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimiser = torch.optim.AdamW(
            self.head.parameters(), lr=self.settings.lr, weight_decay=self.settings.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: warmup_cosine(step, steps=self.settings.steps, warmup=1)
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class LinearHead:
    """Scores pictures by the classes it was fitted on; any other class never wins."""

    def __init__(self, model: LinearTraining, vocabulary: Vocabulary) -> None:
        self.model, self.vocabulary = model.eval(), vocabulary

    @torch.inference_mode()
    def scores(self, images: Sequence[np.ndarray], labels: Sequence[str]) -> list[np.ndarray]:
        """Logits (N, h, w) float32 per uint8 RGB picture (H, W, 3).

        Raises:
            LabelError: a label that is no class of the data set; a closed-set head knows no others.
        """
        foreign = [label for label in labels if label not in self.vocabulary.names]
        if foreign:
            raise LabelError(
                found=f"the labels {', '.join(foreign)} for a closed-set linear head",
                allowed=", ".join(self.vocabulary.names),
                fix="use one of the classes it was fitted on",
            )
        if len({image.shape for image in images}) > 1:
            return [self.scores([image], labels)[0] for image in images]
        logits = self.model(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
        result = torch.full((len(images), len(labels), *logits.shape[-2:]), NEVER)
        for row, label in enumerate(labels):
            if label in self.vocabulary.seen_names:
                result[:, row] = logits[:, self.vocabulary.seen_names.index(label)]
        return list(result.numpy())


def predictor(settings: Any, inputs: Mapping[str, Path]) -> LinearHead:
    """Fit the head on the training split's seen classes."""
    split = PreparedSplit(inputs["prepare"], "train")
    recipe, seed = settings.baseline.linear, settings.seed
    torch.manual_seed(seed)
    features = load_features(inputs["encode"], stride=recipe.stride)
    vocabulary = split.vocabulary
    targets = seen_targets(vocabulary)
    module = LinearTraining(features, classes=len(vocabulary.seen_names), settings=recipe)

    def batch(step: int) -> dict[str, Tensor]:
        indices = shuffled_indices(len(split), recipe.batch, step, seed=seed)
        samples = [split[int(index)] for index in indices]
        if recipe.crop is not None:
            height, width = recipe.crop
            samples = [
                random_crop(sample, generator(seed, step, position), height=height, width=width)
                for position, sample in enumerate(samples)
            ]
        check_labelled_batch(samples, crop="baseline.linear.crop")
        images = torch.from_numpy(np.stack([sample["image"] for sample in samples])).permute(0, 3, 1, 2)
        return {"image": images, "target": torch.from_numpy(targets(np.stack([s["semantic"] for s in samples])))}

    fit(module, batch=batch, steps=recipe.steps, seed=seed, title="fit linear head")
    return LinearHead(module, vocabulary)
