"""The result every method gives, and the labels it was asked for.

Letters in shapes: N labels, H x W the picture's size in pixels, h x w the model's own lower resolution,
B images.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from lexiseg.device import best_device
from lexiseg.errors import LabelError

IGNORE_LABEL = -100
"""Marks pixels without a label in tensors and arrays (65535 on disk); loss and metrics leave them out."""

ImageLike: TypeAlias = np.ndarray | Image.Image | Path | str
"""A picture: H x W x 3 uint8 RGB array, PIL image, or path of an image file."""

# Values of the upsampled scores that are held at once (float32: 128 MiB).
_CHUNK_VALUES = 1 << 25


class NamedLabels(Protocol):
    """Anything that lists label names, such as a Vocabulary."""

    @property
    def names(self) -> tuple[str, ...]: ...


def check_labels(labels: Sequence[str] | NamedLabels) -> tuple[str, ...]:
    """The labels as a tuple of names, in the order given.

    Raises:
        LabelError: a single string instead of a list, no labels, an empty one, or one that occurs twice.
    """
    if isinstance(labels, str):
        raise LabelError(
            found=f"labels is one string, {labels!r}",
            allowed="a list of strings, or a Vocabulary",
            fix=f"pass {[part.strip() for part in labels.split(',')]!r}",
        )
    names = tuple(labels if isinstance(labels, Sequence) else labels.names)
    if not names:
        raise LabelError(
            found="no labels", allowed="one or more labels", fix='name what to look for, such as "grass, sky, ring"'
        )
    faulty = [name for name in names if not isinstance(name, str) or not is_visible(name)]
    if faulty:
        raise LabelError(
            found=f"an empty label or one that is no text: {', '.join(map(repr, faulty))}",
            allowed="labels with at least one visible character",
            fix="remove it; two commas in a row make an empty label",
        )
    # Text sides do not tell "Grass" from "grass": the second of them would never win a pixel.
    counts = Counter(name.strip().casefold() for name in names)
    twice = list(dict.fromkeys(name for name in names if counts[name.strip().casefold()] > 1))
    if twice:
        raise LabelError(
            found=f"labels that occur more than once: {', '.join(twice)}",
            allowed="each label once (upper and lower case are the same), since a pixel gets exactly one label",
            fix="remove the repetitions",
        )
    return names


def is_visible(text: str) -> bool:
    """Whether a text has a character that can be seen."""
    # Spaces, controls and marks without a shape of their own, such as U+200B, are categories Z and C of Unicode.
    return any(unicodedata.category(character)[0] not in "ZC" for character in text)


def upsample_argmax(scores: torch.Tensor, *, height: int, width: int, align_corners: bool = True) -> torch.Tensor:
    """Best label per pixel: scores are interpolated first and compared afterwards, which keeps edges smooth.

    Interpolation is bilinear. Labels are taken in chunks, so that thousands of them fit into memory; of equal scores
    the first label wins.

    Args:
        scores: (B, N, h, w) floating point, higher is better.
        height: H of the result.
        width: W of the result.
        align_corners: of the interpolation; True as in the evaluation of the LSeg release, False as in mmsegmentation.

    Returns:
        (B, H, W) int32, index of the label.
    """
    batch, labels = scores.shape[:2]
    chunk = max(1, _CHUNK_VALUES // max(1, batch * height * width))
    best = torch.full((batch, height, width), -torch.inf, device=scores.device)
    winner = torch.zeros((batch, height, width), dtype=torch.int32, device=scores.device)
    for start in range(0, labels, chunk):
        part = scores[:, start : start + chunk].float()
        finer = functional.interpolate(part, size=(height, width), mode="bilinear", align_corners=align_corners)
        values, indices = finer.max(dim=1)
        better = values > best
        best = torch.where(better, values, best)
        winner = torch.where(better, (indices + start).int(), winner)
    return winner


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A picture divided among labels.

    Attributes:
        labels: the N names that were asked for, in that order.
        label_map: (H, W) int32, index into `labels` per pixel.
        scores: (N, h, w) float32 at the model's resolution: logits, whose softmax over the first axis gives
            probabilities; or soft masks. Labels that overlap ("dog", "animal") are read from here.
        protocol: hash of the protocol card the picture was segmented under, or None.
        overlapping: the scores are soft masks, 0..1, each label's by itself.
    """

    labels: tuple[str, ...]
    label_map: np.ndarray
    scores: np.ndarray
    protocol: str | None = None
    overlapping: bool = False

    def __post_init__(self) -> None:
        if self.label_map.ndim != 2 or self.label_map.dtype != np.int32:
            raise ValueError(f"label_map: expected (H, W) int32, got {self.label_map.shape} {self.label_map.dtype}")
        if self.scores.ndim != 3 or self.scores.dtype != np.float32 or len(self.scores) != len(self.labels):
            raise ValueError(
                f"scores: expected ({len(self.labels)}, h, w) float32, got {self.scores.shape} {self.scores.dtype}"
            )

    @classmethod
    def from_scores(
        cls,
        *,
        labels: Sequence[str] | NamedLabels,
        scores: np.ndarray | torch.Tensor,
        height: int,
        width: int,
        protocol: str | None = None,
        overlapping: bool = False,
    ) -> Segmentation:
        """Make the label map from low-resolution scores by `upsample_argmax`.

        Args:
            labels: N names.
            scores: (N, h, w) logits, or soft masks.
            height: H, the picture's height in pixels.
            width: W, the picture's width in pixels.
            protocol: hash of a protocol card.
            overlapping: the scores are soft masks.

        Raises:
            LabelError: see `check_labels`.
        """
        tensor = torch.as_tensor(scores).detach().float()
        device = tensor.device if isinstance(scores, torch.Tensor) else best_device()
        label_map = upsample_argmax(tensor[None].to(device), height=height, width=width)[0]
        return cls(
            labels=check_labels(labels),
            label_map=label_map.cpu().numpy(),
            scores=np.ascontiguousarray(tensor.cpu().numpy()),
            protocol=protocol,
            overlapping=overlapping,
        )

    def index(self, label: str) -> int:
        """Position of a label.

        Raises:
            LabelError: the picture was not asked for this label.
        """
        if label not in self.labels:
            raise LabelError(
                found=f"the label {label!r}",
                allowed=f"one of those asked for: {', '.join(self.labels)}",
                fix="segment again with this label in the list",
            )
        return self.labels.index(label)

    def area(self, label: str) -> float:
        """Share of the picture that the label covers, 0..1."""
        return float(self._pixels[self.index(label)] / self.label_map.size)

    def mask(self, label: str) -> np.ndarray:
        """Soft mask (H, W) float32, 0..1, of a label: its probability, or with overlapping labels its own mask."""
        position, scores = self.index(label), torch.from_numpy(self.scores)
        soft = scores[position] if self.overlapping else (scores[position] - self._log_sum).exp()
        finer = functional.interpolate(soft[None, None], size=self.label_map.shape, mode="bilinear", align_corners=True)
        return finer[0, 0].numpy()

    def mean_score(self, label: str) -> float | None:
        """Mean probability (softmax over the labels, or its soft mask; 0..1) of a label over the region it covers.

        Each pixel has the probability of the score cell it falls into. None where the label covers nothing.
        """
        position = self.index(label)
        pixels = self._pixels[position]
        return float(self._probabilities[position] / pixels) if pixels else None

    # Once for all labels: with thousands of them, a pass over picture or scores for each takes minutes.

    @cached_property
    def _pixels(self) -> np.ndarray:
        return np.bincount(self.label_map.ravel(), minlength=len(self.labels))

    @cached_property
    def _probabilities(self) -> np.ndarray:
        """(N,) sum of the probability of each label over the pixels that it covers."""
        (height, width), (rows, columns) = self.label_map.shape, self.scores.shape[1:]
        row = (np.arange(height) * rows // height)[:, None]
        column = np.arange(width) * columns // width
        chosen = self.scores[self.label_map, row, column]
        probability = chosen if self.overlapping else np.exp(chosen - self._log_sum.numpy()[row, column])
        return np.bincount(self.label_map.ravel(), weights=probability.ravel(), minlength=len(self.labels))

    @cached_property
    def _log_sum(self) -> torch.Tensor:
        """(h, w) logarithm of the softmax' denominator, in chunks of labels, since `logsumexp` copies them."""
        scores = torch.from_numpy(self.scores)
        chunk = max(1, _CHUNK_VALUES // max(1, scores[0].numel()))
        return torch.stack([part.logsumexp(dim=0) for part in scores.split(chunk)]).logsumexp(dim=0)
