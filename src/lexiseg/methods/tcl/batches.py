"""Image-text pairs for TCL's training; labels are never read."""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing

from lexiseg.data.dataset import PreparedSplit
from lexiseg.data.shards import TarPairs
from lexiseg.data.transforms import generator, normalise
from lexiseg.errors import DataError
from lexiseg.methods.tcl.settings import TrainSettings
from lexiseg.ranks import share
from lexiseg.segmentation import is_visible
from lexiseg.training import shuffled_indices
from lexiseg.vocabulary import Vocabulary

MOST_DAMAGED = 20  # pairs one after the other, before a training gives up


class PairBatches(ABC):
    """Batch k: normalised pictures (B, 3, H, W), the token ids (B, L) of a text for each, and k itself as `step`.

    Which pairs, and how the pictures are augmented, depends on the seed, k and the position in the batch alone.

    Args:
        tokenize: list of texts -> ids (B, L).
        settings: `tcl.train`.
        config: with `mean` and `std` of RGB in 0..1.
        patch_size: (height, width) of the tower's patches, of which pictures are whole numbers.
        seed: of the order and of all choices.
    """

    def __init__(
        self,
        *,
        tokenize: Callable[[list[str]], torch.Tensor],
        settings: TrainSettings,
        config: Mapping[str, Any],
        patch_size: tuple[int, int],
        seed: int,
    ) -> None:
        self._patch_size = patch_size
        self._tokenize, self._settings, self._seed = tokenize, settings, seed
        self._mean, self._std = config["mean"], config["std"]

    @abstractmethod
    def _order(self, step: int) -> np.ndarray:
        """The pairs of a batch, (B,)."""

    @abstractmethod
    def _pair(self, chosen: int, rng: np.random.Generator) -> _Pair:
        """One of them."""

    def __call__(self, step: int) -> dict[str, Any]:
        pairs, images = [], []
        order = self._order(step)
        for position in share(len(order)):
            rng = generator(self._seed, step, position)
            pairs.append(self._pair(int(order[position]), rng))
            images.append(self._picture(pairs[-1].image, rng))
        sizes = sorted({tuple(image.shape[-2:]) for image in images})
        if len(sizes) > 1:
            raise DataError(
                found="a batch of pictures of different sizes: " + ", ".join(f"{h} x {w}" for h, w in sizes),
                allowed="pictures of one size, or brought to one",
                fix="set `tcl.train.size` to [height, width]",
            )
        height, width = sizes[0]
        if height % self._patch_size[0] or width % self._patch_size[1]:
            raise DataError(
                found=f"training pictures of {height} x {width} pixels",
                allowed=f"whole patches of {self._patch_size[0]} x {self._patch_size[1]}",
                fix="set `tcl.train.size` to [height, width]",
            )
        batch = {"image": torch.stack(images), "tokens": self._tokenize([pair.text for pair in pairs]), "step": step}
        return batch | self._more(pairs)

    def _more(self, pairs: Sequence[_Pair]) -> dict[str, Any]:
        return {}

    def _picture(self, image: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        settings = self._settings
        if settings.crop_scale is not None:
            assert settings.size is not None  # the settings say so
            image = random_resized_crop(image, rng, scale=settings.crop_scale, size=settings.size)
        elif settings.size is not None:
            image = _resized(image, settings.size)
        if settings.flip and rng.random() < 0.5:
            image = np.ascontiguousarray(image[:, ::-1])
        with _seeded(int(rng.integers(2**31))):
            if settings.auto_augment is not None:
                mean = tuple(round(255 * value) for value in self._mean)
                hints = {"img_mean": mean, "interpolation": Image.Resampling.BILINEAR}
                augment = rand_augment_transform(settings.auto_augment, hints)
                image = np.array(augment(Image.fromarray(image)))
            pixels = normalise(image, mean=self._mean, std=self._std)
            if settings.erasing:
                pixels = RandomErasing(probability=settings.erasing, mode="pixel", max_count=1, device="cpu")(pixels)
        return pixels


@dataclass(frozen=True)
class _Pair:
    image: np.ndarray
    text: str
    noun: int = -1
    mentioned: tuple[int, ...] = ()
    skipped: int = 0


class CaptionBatches(PairBatches):
    """Pairs of prepared splits. The text is one of the picture's captions, as it is (paper).

    With `text: noun` it is a sentence with one of the class names that its captions mention, and there are two tensors
    more: `noun` (B,), its index in the vocabulary, and `mentioned`, bool (B, names), all names that are true of the
    picture by its captions. That is more than the paper takes from a caption, since the names to look for are known.

    Pictures without a text are passed over.

    Args:
        splits: one after the other they are one long list.
        others: see `PairBatches`.

    Raises:
        DataError: no picture has a caption, or none that mentions a class.
    """

    def __init__(self, splits: Sequence[PreparedSplit], *, settings: TrainSettings, **others: Any) -> None:
        super().__init__(settings=settings, **others)
        self._splits, self._vocabulary = list(splits), splits[0].vocabulary
        found = [
            _Captioned(number, index, texts)
            for number, split in enumerate(splits)
            for index, captions in enumerate(split.captions)
            if (texts := tuple(caption for caption in captions or () if is_visible(caption)))
        ]
        if settings.text == "noun":
            patterns = _patterns(self._vocabulary)
            found = [replace(one, nouns=_mentioned(one.captions, patterns)) for one in found]
            found = [one for one in found if one.nouns]
        if not found:
            what = "that mentions a class" if settings.text == "noun" else "at all"
            raise DataError(
                found=f"no picture with a caption {what} in {', '.join(split.split for split in splits)}",
                allowed="splits with captioned pictures",
                fix="name others in `tcl.train.splits`, or add captions to the data set",
            )
        if len(found) < settings.batch:
            raise DataError(
                found=f"{len(found)} captioned pictures for batches of {settings.batch}",
                allowed="batches without a picture twice, which would be its own negative",
                fix="lower `tcl.train.batch`, or add captioned pictures",
            )
        self._found, self.size = found, len(found)

    def _order(self, step: int) -> np.ndarray:
        return shuffled_indices(self.size, self._settings.batch, step, seed=self._seed)

    def _pair(self, chosen: int, rng: np.random.Generator) -> _Pair:
        one = self._found[chosen]
        image = self._splits[one.split].image(one.index)
        if not one.nouns:
            return _Pair(image, one.captions[rng.integers(len(one.captions))])
        noun = one.nouns[rng.integers(len(one.nouns))]
        template = self._vocabulary.templates[rng.integers(len(self._vocabulary.templates))]
        return _Pair(image, template.replace("{}", self._vocabulary.names[noun]), noun, one.nouns)

    def _more(self, pairs: Sequence[_Pair]) -> dict[str, Any]:
        if self._settings.text != "noun":
            return {}
        mentioned = torch.zeros(len(pairs), len(self._vocabulary), dtype=torch.bool)
        for row, pair in enumerate(pairs):
            mentioned[row, list(pair.mentioned)] = True
        return {"noun": torch.tensor([pair.noun for pair in pairs]), "mentioned": mentioned}


class ShardBatches(PairBatches):
    """Pairs of tar shards; `skipped` is how many of a batch could not be read, each replaced by another at random.

    Args:
        pairs: the shards.
        others: see `PairBatches`.
    """

    def __init__(self, pairs: TarPairs, **others: Any) -> None:
        super().__init__(**others)
        self._pairs, self.size = pairs, len(pairs)

    def _order(self, step: int) -> np.ndarray:
        count = self._settings.batch
        return self._pairs.order(step * count, count, seed=self._seed)

    def _pair(self, chosen: int, rng: np.random.Generator) -> _Pair:
        for skipped in range(MOST_DAMAGED):
            try:
                return _Pair(*self._pairs.read(chosen), skipped=skipped)
            except DataError as error:
                fault, chosen = error, int(rng.integers(self.size))
        raise DataError(
            found=f"{MOST_DAMAGED} damaged pairs one after the other, the last: {fault.found}",
            allowed="shards most of whose pairs can be read",
            fix="fetch the shards again",
        )

    def _more(self, pairs: Sequence[_Pair]) -> dict[str, Any]:
        return {"skipped": sum(pair.skipped for pair in pairs)}


@dataclass(frozen=True)
class _Captioned:
    split: int  # number of its split
    index: int  # row there
    captions: tuple[str, ...]
    nouns: tuple[int, ...] = ()  # class names that they mention


def _patterns(vocabulary: Vocabulary) -> list[re.Pattern[str]]:
    """For each class, what finds its words, or their plural in "s", in a sentence."""
    words = [[re.escape(word) for word in vocabulary.words(name)] for name in vocabulary.names]
    return [re.compile(rf"\b(?:{'|'.join(options)})s?\b", re.IGNORECASE) for options in words]


def _mentioned(captions: Sequence[str], patterns: Sequence[re.Pattern[str]]) -> tuple[int, ...]:
    sentences = "\n".join(captions)
    return tuple(number for number, pattern in enumerate(patterns) if pattern.search(sentences))


def random_resized_crop(
    image: np.ndarray, rng: np.random.Generator, *, scale: tuple[float, float], size: tuple[int, int]
) -> np.ndarray:
    """A rectangle of a random share of the area and of a ratio in 3/4 .. 4/3, resized bilinearly.

    Args:
        image: uint8 (H, W, 3).
        rng: draws the share, the ratio (log-uniform) and the place; ten times, until the rectangle fits.
        scale: lowest and highest share of the area.
        size: (height, width) of the result.
    """
    rows, columns = image.shape[:2]
    for _ in range(10):
        area = rows * columns * rng.uniform(*scale)
        ratio = float(np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3))))
        width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < width <= columns and 0 < height <= rows:
            top, left = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
            return _resized(image[top : top + height, left : left + width], size)
    return _resized(image, size)


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if image.shape[:2] == tuple(size):
        return image
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, size=tuple(size), mode="bilinear", antialias=True)[0]
    return np.ascontiguousarray(pixels.round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """timm draws from the generators that a whole process shares: seed them, and put them back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
