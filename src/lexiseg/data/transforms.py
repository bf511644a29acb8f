"""Training augmentation and resizing: pure functions of a sample and a random generator.

A sample is a dict as `PreparedSplit` gives it. Each function returns a new dict in which `image`, `semantic` and
`panoptic` are changed alike and everything else is passed on; words about a place ("left of") are not rewritten,
so `random_flip` is not for training on captions or phrases.

Every function draws the same number of random values whatever the sample is, so that the generator
of sample i in step k (`generator(seed, k, i)`) gives the same augmentation after a resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from lexiseg.data.adapters.base import NO_SEGMENT
from lexiseg.segmentation import IGNORE_LABEL

Sample = dict[str, Any]

_MASK_FILL = {"semantic": IGNORE_LABEL, "panoptic": NO_SEGMENT}


def generator(*key: int) -> np.random.Generator:
    """A generator that depends on these numbers only, such as (seed, step, position in the batch)."""
    return np.random.default_rng(key)


def random_flip(sample: Mapping[str, Any], rng: np.random.Generator, *, chance: float = 0.5) -> Sample:
    """Mirror left and right with probability `chance`."""
    if rng.random() >= chance:
        return dict(sample)
    return _each(sample, lambda array, name: np.ascontiguousarray(array[:, ::-1]))


def random_scale(sample: Mapping[str, Any], rng: np.random.Generator, *, low: float, high: float) -> Sample:
    """Scale both sides by one factor, uniform in [low, high]; no side becomes shorter than one pixel."""
    factor = rng.uniform(low, high)
    height, width = sample["image"].shape[:2]
    return resize(sample, height=max(1, round(height * factor)), width=max(1, round(width * factor)))


def random_crop(
    sample: Mapping[str, Any], rng: np.random.Generator, *, height: int, width: int, fill: int = 0
) -> Sample:
    """Cut out height x width pixels at a random place.

    A smaller sample is padded at the bottom and the right: the picture with `fill`, `semantic` with -100 (such
    pixels do not count), `panoptic` with 0.
    """
    rows, columns = sample["image"].shape[:2]
    top = _position(rng, rows - height)
    left = _position(rng, columns - width)

    def cut(array: np.ndarray, name: str) -> np.ndarray:
        piece = array[top : top + height, left : left + width]
        margins = [(0, height - piece.shape[0]), (0, width - piece.shape[1])] + [(0, 0)] * (array.ndim - 2)
        return np.pad(piece, margins, constant_values=_MASK_FILL.get(name, fill))

    return _each(sample, cut)


def random_colour(sample: Mapping[str, Any], rng: np.random.Generator, *, strength: float) -> Sample:
    """Change brightness, contrast and saturation of the picture, each by a factor uniform in [1 - s, 1 + s]."""
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, size=3).astype(np.float32)
    pixels = sample["image"].astype(np.float32) * brightness
    pixels = (pixels - pixels.mean()) * contrast + pixels.mean()
    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    pixels = (pixels - grey[..., None]) * saturation + grey[..., None]
    return {**sample, "image": np.clip(np.rint(pixels), 0, 255).astype(np.uint8)}


def resize(sample: Mapping[str, Any], *, height: int, width: int) -> Sample:
    """Resize picture (bilinear) and masks (nearest) to height x width."""

    def to_size(array: np.ndarray, name: str) -> np.ndarray:
        if name in _MASK_FILL:
            return resize_mask(torch.from_numpy(array), height=height, width=width).numpy()
        pixels = torch.from_numpy(array).permute(2, 0, 1).float()
        pixels = resize_image(pixels, height=height, width=width).round_().clamp_(0, 255)
        return np.ascontiguousarray(pixels.to(torch.uint8).permute(1, 2, 0).numpy())

    return _each(sample, to_size)


def resize_image(pixels: torch.Tensor, *, height: int, width: int) -> torch.Tensor:
    """Bilinear with align_corners=True, as the official LSeg code resizes.

    Args:
        pixels: float, C x h x w or B x C x h x w.

    Returns:
        The same with height x width.
    """
    batch = pixels if pixels.ndim == 4 else pixels[None]
    if batch.shape[-2:] == (height, width):
        return pixels
    resized = functional.interpolate(batch, size=(height, width), mode="bilinear", align_corners=True)
    return resized if pixels.ndim == 4 else resized[0]


def resize_mask(mask: torch.Tensor, *, height: int, width: int) -> torch.Tensor:
    """Nearest neighbour (cell centres), so that no id is invented.

    Args:
        mask: integers, h x w or B x h x w.

    Returns:
        The same type with height x width.
    """
    rows = _nearest(mask.shape[-2], height)
    columns = _nearest(mask.shape[-1], width)
    return mask[..., rows[:, None], columns[None, :]]


def normalise(image: np.ndarray, *, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 H x W x 3 (RGB, 0..255) to float32 3 x H x W: (x / 255 - mean) / std per channel."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float().div_(255)
    shape = (3, 1, 1)
    return pixels.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape)).contiguous()


def _each(sample: Mapping[str, Any], change: Any) -> Sample:
    changed = {name: change(sample[name], name) for name in ("image", *_MASK_FILL) if sample.get(name) is not None}
    return {**sample, **changed}


def _position(rng: np.random.Generator, room: int) -> int:
    return int(rng.random() * (max(room, 0) + 1))


def _nearest(source: int, target: int) -> torch.Tensor:
    return ((torch.arange(target) + 0.5) * (source / target)).long().clamp_(max=source - 1)
