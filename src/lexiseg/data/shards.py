"""Image-text pairs from tar shards as WebDataset writes them (CC3M, CC12M), without unpacking them.

A sample is the files of one shard that share a name up to the first dot of the last part: "000012.jpg" and its text in
"000012.txt", or under "caption" in "000012.json". Only the headers are read in advance, so that any pair can be read at
any time: a training goes on in the middle of an epoch by computing where it was, where reading a stream would have to
begin again.
"""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from lexiseg.data.adapters.files import picture_pixels
from lexiseg.errors import DataError
from lexiseg.segmentation import is_visible

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
TEXTS = (".txt", ".json")
GROUP = 8  # shards that are mixed with each other; the order of pairs is at random within them
OPEN = 64  # files kept open

# A pair: its shard, and where picture and text are in it, in bytes.
_PLACE = np.dtype(
    [("shard", "u4"), ("image", "u8"), ("image_size", "u4"), ("text", "u8"), ("text_size", "u4"), ("json", "?")]
)


@dataclass(frozen=True)
class Incomplete:
    """What the headers of some shards tell of faults.

    Attributes:
        without_text: pictures that have no text.
        without_picture: texts that have no picture.
        broken: names of shards that end early or are no tar files; what comes before the break is used.
    """

    without_text: int
    without_picture: int
    broken: tuple[str, ...]


class TarPairs:
    """Pairs of many shards as one long list.

    Args:
        shards: tar files, not compressed.

    Attributes:
        incomplete: what was left out.

    Raises:
        DataError: no shards, one that is not there, or not a single pair in them.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = tuple(shards)
        if not self.shards:
            raise DataError(
                found="no shards", allowed="one or more .tar files", fix="check the pattern that names them"
            )
        places, facts = [], []
        for number, shard in enumerate(tqdm(self.shards, desc="read shards", unit="shard", delay=2, file=sys.stderr)):
            found, fact = _scan(shard, number)
            places.append(found)
            facts.append(fact)
        self._places = np.concatenate(places)
        self.incomplete = Incomplete(
            without_text=sum(fact.without_text for fact in facts),
            without_picture=sum(fact.without_picture for fact in facts),
            broken=tuple(name for fact in facts for name in fact.broken),
        )
        if not len(self._places):
            raise DataError(
                found=f"not one picture with its text in {len(self.shards)} shards, such as {self.shards[0].name}",
                allowed=f"files of one name, a picture ({', '.join(PICTURES)}) and a text ({', '.join(TEXTS)})",
                fix="write the shards as WebDataset does, not compressed",
            )
        # Pairs of a shard lie together.
        self._sizes = np.array([len(found) for found in places])
        self._files: dict[int, BinaryIO] = {}

    def __len__(self) -> int:
        return len(self._places)

    def order(self, first: int, count: int, *, seed: int) -> np.ndarray:
        """Which pairs the positions `first` to `first + count` of an endless training visit.

        Every epoch visits each pair once. The shards come in a new order, and pairs are mixed among eight shards that
        follow each other, so that few files are read at a time.

        Returns:
            int64 (count,), indices of pairs; a function of the arguments alone.
        """
        positions = np.arange(first, first + count)
        result = np.empty(count, dtype=np.int64)
        for epoch in np.unique(positions // len(self)):
            inside = positions // len(self) == epoch
            result[inside] = self._in_epoch(positions[inside] % len(self), seed=seed, epoch=int(epoch))
        return result

    def _in_epoch(self, positions: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
        shards = np.random.default_rng([seed, epoch]).permutation(len(self.shards))
        groups = [shards[start : start + GROUP] for start in range(0, len(shards), GROUP)]
        ends = np.cumsum([self._sizes[group].sum() for group in groups])
        starts = np.cumsum(self._sizes) - self._sizes
        result = np.empty(len(positions), dtype=np.int64)
        numbers = np.searchsorted(ends, positions, side="right")
        for number in np.unique(numbers):
            group = groups[number]
            pairs = np.concatenate([starts[shard] + np.arange(int(self._sizes[shard])) for shard in group])
            mixed = np.random.default_rng([seed, epoch, int(number)]).permutation(pairs)
            chosen = numbers == number
            result[chosen] = mixed[positions[chosen] - (ends[number] - len(pairs))]
        return result

    def read(self, index: int) -> tuple[np.ndarray, str]:
        """A pair: the picture, uint8 RGB (H, W, 3), upright, and its text.

        Raises:
            DataError: the picture or the text is damaged or empty.
        """
        place = self._places[index]
        name = f"{self.shards[place['shard']].name}, pair {index}"
        try:
            content = self._bytes(place["shard"], place["image"], place["image_size"])
            text = self._bytes(place["shard"], place["text"], place["text_size"]).decode("utf-8-sig")
            caption = json.loads(text)["caption"] if place["json"] else text
            if not isinstance(caption, str) or not is_visible(caption):
                raise ValueError("an empty caption")
            with Image.open(BytesIO(content)) as picture:
                return np.array(picture_pixels(picture, name=name)), " ".join(caption.split())
        except DataError:
            raise
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            RecursionError,
            Image.DecompressionBombError,
            Image.DecompressionBombWarning,
        ) as error:
            raise DataError(
                found=f"{name} cannot be read ({' '.join(str(error).split())[:200] or type(error).__name__})",
                allowed="a picture and a caption, UTF-8",
                fix="none is needed: a training passes over it",
            ) from error

    def _bytes(self, shard: int, start: int, size: int) -> bytes:
        file = self._files.get(shard)
        if file is None:
            if len(self._files) >= OPEN:
                self._files.pop(next(iter(self._files))).close()
            file = self._files[shard] = self.shards[shard].open("rb")
        file.seek(int(start))
        content = file.read(int(size))
        if len(content) != size:
            raise ValueError("the shard is shorter than it was")
        return content

    def __getstate__(self) -> dict[str, object]:
        # A worker opens the files itself.
        return {**self.__dict__, "_files": {}}


def _scan(shard: Path, number: int) -> tuple[np.ndarray, Incomplete]:
    """The pairs of a shard, and what it lacks; from the headers alone."""
    pictures: dict[str, tuple[int, int]] = {}
    texts: dict[str, tuple[int, int, bool]] = {}
    broken = False
    try:
        length = shard.stat().st_size
        # "r:" takes no compressed file: nothing could be found in the middle of one.
        with tarfile.open(shard, "r:") as archive:
            while (member := archive.next()) is not None:
                if not member.isfile() or member.offset_data + member.size > length:
                    continue
                path = PurePosixPath(member.name)
                stem, _, ending = path.name.partition(".")
                key, ending = str(path.with_name(stem or path.name)), f".{ending.lower()}"
                if ending in PICTURES:
                    pictures[key] = member.offset_data, member.size
                elif ending == ".txt" or (ending == ".json" and key not in texts):
                    texts[key] = member.offset_data, member.size, ending == ".json"
            # tarfile stops without a word at a header that is cut or damaged; a whole file ends in empty blocks, and
            # in nothing else (two files one behind the other do not).
            with shard.open("rb") as file:
                file.seek(archive.offset)
                whole = len(rest := file.read(tarfile.BLOCKSIZE)) == tarfile.BLOCKSIZE and not any(rest)
                broken = not whole or any(any(more) for more in iter(partial(file.read, 1 << 20), b""))
    except FileNotFoundError as error:
        raise DataError(found=f"no file {shard}", allowed="tar files that are there", fix="check the paths") from error
    except (tarfile.TarError, EOFError):
        broken = True
    both = [key for key in pictures if key in texts]
    places = np.array([(number, *pictures[key], *texts[key]) for key in both], dtype=_PLACE)
    return places, Incomplete(len(pictures) - len(both), len(texts) - len(both), (shard.name,) if broken else ())
