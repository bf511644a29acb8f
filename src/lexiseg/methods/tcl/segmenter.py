"""A trained TCL that scores pictures by words."""

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
from lexiseg.errors import SettingsError
from lexiseg.methods.tcl.build import load_model
from lexiseg.methods.tcl.model import TCL
from lexiseg.methods.tcl.settings import PredictSettings
from lexiseg.phases import phase
from lexiseg.settings import parse


class TCLSegmenter:
    """Scores pictures by any labels: the grounder's soft masks, and those of the untrained CLIP beside them.

    Args:
        model: the trained network.
        text: the text side of its CLIP.
        mean, std: of RGB in 0..1, per channel.
        options: `tcl.predict`.
        device: where the network computes; None: `best_device`. Text is always encoded on the CPU.
    """

    def __init__(
        self,
        model: TCL,
        *,
        text: TextEncoder,
        mean: Sequence[float],
        std: Sequence[float],
        options: PredictSettings,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or best_device()
        self.model, self.text = model.eval().to(self.device), text
        self._mean = torch.tensor(mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, device=self.device).view(1, 3, 1, 1)
        self._options = options
        if options.window is not None and options.stride is not None:
            patch = model.visual.patch_size[0]
            if options.window % patch or options.stride % patch:
                raise SettingsError(
                    found=f"tcl.predict.window {options.window} and stride {options.stride} with patches of {patch}",
                    allowed=f"multiples of {patch}",
                    fix=f"set both to whole patches, such as {28 * patch} and {14 * patch}",
                )

    @classmethod
    def load(
        cls, folder: Path, *, encode: Path | None = None, predict: Mapping[str, Any] | None = None
    ) -> TCLSegmenter:
        """From a model folder; the arguments are those of `lexiseg.methods.load_scorer`."""
        model, config = load_model(folder, clip=(encode or folder) / "clip")
        values = config.get("predict", {}) if predict is None else dict(predict)
        options = parse(values, PredictSettings, source="tcl.predict")
        return cls(model, text=load_text(encode or folder), mean=config["mean"], std=config["std"], options=options)

    @torch.inference_mode()
    def scores(self, images: Sequence[np.ndarray], labels: Sequence[str]) -> list[np.ndarray]:
        """Soft masks (2, N, h, w) float32, 0..1, per picture: the grounder's, and the knowledge branch's at its size.

        Args:
            images: uint8 RGB (H, W, 3); pictures of one size are computed together.
            labels: N label strings.
        """
        if len({image.shape for image in images}) > 1:
            return [self.scores([image], labels)[0] for image in images]
        with phase("text"):
            vectors = self.text.embed(labels)
        return list(self._masks(np.stack(images), vectors).float().cpu().numpy())

    def _masks(self, images: np.ndarray, vectors: Tensor) -> Tensor:
        """(B, 2, N, h, w), on the network's device, of uint8 RGB (B, H, W, 3)."""
        with phase("preprocess"):
            vectors = vectors.to(self.device)
            pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 255
            pixels = (self._sized(pixels) - self._mean) / self._std
        window = self._options.window
        if window is None or self._options.stride is None or max(pixels.shape[-2:]) <= window:
            return self._of(pixels, vectors)
        cell = pixels.shape[-2] // self.model.grid(pixels)[0]  # pixels per cell of a mask
        total = pixels.new_zeros(len(pixels), 2, len(vectors), *self.model.grid(pixels))
        count = pixels.new_zeros(*total.shape[-2:])
        for top in starts(pixels.shape[-2], window, self._options.stride):
            for left in starts(pixels.shape[-1], window, self._options.stride):
                found = self._of(pixels[..., top : top + window, left : left + window], vectors)
                rows, columns = top // cell, left // cell
                area = (..., slice(rows, rows + found.shape[-2]), slice(columns, columns + found.shape[-1]))
                total[area] += found
                count[area[1:]] += 1
        return total / count

    def _of(self, pixels: Tensor, vectors: Tensor) -> Tensor:
        tokens, grid = self.model.tokens(pixels)
        with phase("head"):
            masks = self.model.grounder.mask_logits(self.model.grounder(tokens, grid), vectors).sigmoid()
            knowledge = self.model.knowledge(tokens, grid, vectors)
            knowledge = F.interpolate(knowledge, size=masks.shape[-2:], mode="bilinear", align_corners=False)
            return torch.stack([masks, knowledge], dim=1)

    def _sized(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) at the size of the network's input: both sides whole patches."""
        height, width = pixels.shape[-2:]
        options, scale = self._options, 1.0
        if options.short_side is not None:
            scale = options.short_side / min(height, width)
        if options.max_side is not None:
            scale = min(scale, options.max_side / max(height, width))
        size = tuple(
            max(1, round(side * scale / patch)) * patch
            for side, patch in zip((height, width), self.model.visual.patch_size, strict=True)
        )
        if size == (height, width):
            return pixels
        return F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=scale < 1)


def starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side; the last one is moved back inside."""
    count = max(side - window + stride - 1, 0) // stride + 1
    return [max(0, min(number * stride, side - window)) for number in range(count)]
