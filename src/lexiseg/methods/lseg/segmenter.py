"""A trained LSeg that scores pictures by words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lexiseg.encoders.text import TextEncoder, load_text
from lexiseg.methods.lseg.build import load_model
from lexiseg.methods.lseg.model import LSeg


class LSegSegmenter:
    """Scores pictures by any labels.

    Args:
        model: the trained network.
        text: the text side it was trained with.
        mean, std: of RGB in 0..1, per channel.
        resize: (height, width) the picture is brought to before the network, or None for its own size.
        max_side: a longer side is scaled down to it before the network; None for no limit.
    """

    def __init__(
        self,
        model: LSeg,
        *,
        text: TextEncoder,
        mean: Sequence[float],
        std: Sequence[float],
        resize: tuple[int, int] | None = None,
        max_side: int | None = None,
    ) -> None:
        self.model, self.text = model.eval(), text
        self._mean = torch.tensor(mean).view(1, 3, 1, 1)
        self._std = torch.tensor(std).view(1, 3, 1, 1)
        self._resize, self._max_side = resize, max_side

    @classmethod
    def load(
        cls, folder: Path, *, encode: Path | None = None, predict: Mapping[str, Any] | None = None
    ) -> LSegSegmenter:
        """From a model folder; the arguments are those of `lexiseg.methods.load_scorer`."""
        model, config = load_model(folder)
        text = load_text(encode or folder)
        options = config.get("predict", {}) if predict is None else predict
        sizes = {name: options.get(name) for name in ("resize", "max_side")}
        return cls(model, text=text, mean=config["mean"], std=config["std"], **sizes)

    @torch.inference_mode()
    def scores(self, images: Sequence[np.ndarray], labels: Sequence[str]) -> list[np.ndarray]:
        """Logits (N, h, w) float32 per picture, at half the network's input size.

        Args:
            images: uint8 RGB (H, W, 3); pictures of one size are computed together.
            labels: N label strings.
        """
        vectors = self.text.embed(labels)
        if len({image.shape for image in images}) > 1:
            return [self.scores([image], labels)[0] for image in images]
        logits = self.model.score(self.model.embed(self._prepare(np.stack(images))), vectors)
        return list(logits.float().numpy())

    def _prepare(self, images: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        height, width = self._resize or (images.shape[1], images.shape[2])
        shrink = min(1.0, self._max_side / max(height, width)) if self._max_side else 1.0
        multiple = self.model.backbone.multiple
        # A ViT cuts the picture into whole patches: the nearest size that allows it, at least one patch.
        size = tuple(max(multiple, round(side * shrink / multiple) * multiple) for side in (height, width))
        if size != tuple(tensor.shape[-2:]):
            tensor = F.interpolate(tensor, size=size, mode="bilinear", align_corners=True)
        return (tensor - self._mean) / self._std
