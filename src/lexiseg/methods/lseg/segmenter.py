"""A trained LSeg that scores pictures by words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lexiseg.device import best_device
from lexiseg.encoders.text import TextEncoder, load_text
from lexiseg.errors import ModelError
from lexiseg.evaluation.multiscale import multi_scale_scores
from lexiseg.methods.lseg.build import load_model
from lexiseg.methods.lseg.correlation import correlate
from lexiseg.methods.lseg.model import LSeg
from lexiseg.methods.lseg.settings import PredictSettings
from lexiseg.phases import phase
from lexiseg.settings import parse


class LSegSegmenter:
    """Scores pictures by any labels.

    Args:
        model: the trained network.
        text: the text side it was trained with.
        mean, std: of RGB in 0..1, per channel.
        options: `lseg.predict`; None: the defaults of `PredictSettings`.
        device: where the network computes; None: `best_device`. Text is always encoded on the CPU.
    """

    def __init__(
        self,
        model: LSeg,
        *,
        text: TextEncoder,
        mean: Sequence[float],
        std: Sequence[float],
        options: PredictSettings | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or best_device()
        self.model, self.text = model.eval().to(self.device), text
        self._mean = torch.tensor(mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, device=self.device).view(1, 3, 1, 1)
        self._black = [-m / s for m, s in zip(mean, std, strict=True)]  # normalised
        self._options = options or PredictSettings()
        window, multiple = self._options.window, model.backbone.multiple
        if window is not None and window % multiple:
            raise ModelError(
                found=f"`lseg.predict.window: {window}` with a backbone that takes patches of {multiple} pixels",
                allowed=f"a multiple of {multiple}",
                fix=f"set it to {max(1, round(window / multiple)) * multiple}",
            )

    @classmethod
    def load(
        cls, folder: Path, *, encode: Path | None = None, predict: Mapping[str, Any] | None = None
    ) -> LSegSegmenter:
        """From a model folder; the arguments are those of `lexiseg.methods.load_scorer`."""
        model, config = load_model(folder)
        text = load_text(encode or folder)
        values = config.get("predict", {}) if predict is None else dict(predict)
        options = parse(values, PredictSettings, source="lseg.predict")
        return cls(model, text=text, mean=config["mean"], std=config["std"], options=options)

    @torch.inference_mode()
    def scores(self, images: Sequence[np.ndarray], labels: Sequence[str]) -> list[np.ndarray]:
        """Logits (N, h, w) float32 per picture, at half the network's input size.

        With several scales, mirrored copies or windows: their sum, at half the picture's size.

        Args:
            images: uint8 RGB (H, W, 3); pictures of one size are computed together.
            labels: N label strings.
        """
        if len({image.shape for image in images}) > 1:
            return [self.scores([image], labels)[0] for image in images]
        with phase("text"):
            vectors = self.text.embed(labels)
        return list(self._logits(np.stack(images), vectors).float().cpu().numpy())

    def _logits(self, images: np.ndarray, vectors: Tensor) -> Tensor:
        """Logits (B, N, h, w), on the network's device, of uint8 RGB (B, H, W, 3)."""
        in_one_pass = self._options.in_one_pass
        with phase("preprocess"):
            vectors = vectors.to(self.device)
            pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 255
            pixels = ((self._sized(pixels) if in_one_pass else pixels) - self._mean) / self._std
        if not in_one_pass:
            return torch.cat([self._summed(one, vectors) for one in pixels.split(1)])
        embedded = self.model.embed(pixels)
        with phase("head"):
            return self.model.score(embedded, vectors)

    def _sized(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) at the size of the network's input."""
        height, width = self._options.resize or pixels.shape[-2:]
        shrink = min(1.0, self._options.max_side / max(height, width)) if self._options.max_side else 1.0
        multiple = self.model.backbone.multiple
        # A ViT cuts the picture into whole patches: the nearest size that allows it, at least one patch.
        size = tuple(max(multiple, round(side * shrink / multiple) * multiple) for side in (height, width))
        if size == tuple(pixels.shape[-2:]):
            return pixels
        return F.interpolate(pixels, size=size, mode="bilinear", align_corners=True)

    def _summed(self, image: Tensor, vectors: Tensor) -> Tensor:
        """Logits (1, N, ceil(H/2), ceil(W/2)) of a normalised picture (1, 3, H, W), over scales, copies and windows."""
        options, model = self._options, self.model
        # Sums of logits are logits of summed embeddings, unless a block comes after them: with more labels than
        # channels those are smaller, and their size does not grow with the labels.
        by_embedding = model.regularisation is None and len(vectors) > vectors.shape[1]

        def forward(piece: Tensor) -> Tensor:
            if not by_embedding:
                return model(piece, vectors)
            return F.interpolate(model.embed(piece), size=piece.shape[-2:], mode="bilinear", align_corners=True)

        base_size = options.base_size
        if options.max_side and max(image.shape[-2:]) > options.max_side:
            base_size = options.max_side
        summed = multi_scale_scores(
            image,
            forward,
            scales=options.scales,
            base_size=base_size,
            window=options.window,
            flip=options.flip,
            black=self._black,
            size=(-(-image.shape[-2] // 2), -(-image.shape[-1] // 2)),
            multiple=model.backbone.multiple,
        )
        return correlate(summed, vectors).mul_(model.scale) if by_embedding else summed
