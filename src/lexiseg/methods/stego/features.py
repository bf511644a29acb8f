"""Dense features of a frozen trunk on disk: computed once, read by all that follows.

    index.json                  {"ids", "channels", "height", "width", "shards": [names]}
    features-00000.safetensors  "features": float16 (n, h, w, D), memory-mapped by the reader

Letters: D channels, h x w cells, n pieces of a shard. A piece is a picture, or one of its five crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from lexiseg.checkpoint import checkpoint_file
from lexiseg.data.crops import centre_square, five_crops
from lexiseg.data.dataset import PreparedSplit
from lexiseg.device import best_device
from lexiseg.encoders.trunk import NOT_RUN
from lexiseg.errors import DataError
from lexiseg.methods.stego.settings import FeatureSettings
from lexiseg.storage import link_file, read_json, save_tensors, write_json

_SHARD_BYTES = 128 << 20
BATCH_PIXELS = 32 * 64 * 64  # computed together: 32 pictures of the world, one photograph
_INDEX = "index.json"


class Pieces(Dataset):
    """What the trunk sees of a split: whole pictures, or crops.

    Args:
        split: prepared pictures.
        settings: `stego.features`.

    Raises:
        DataError: the split has no picture.
    """

    def __init__(self, split: PreparedSplit, settings: FeatureSettings) -> None:
        self._split, self._settings = split, settings
        self._last: tuple[int, np.ndarray] | None = None  # five crops in turn are of one picture
        self._each = 5 if settings.five_crop else 1
        self.pictures = min(len(split), settings.pictures or len(split))
        if not self.pictures:
            raise DataError(
                found=f"no picture in the split `{split.split}`",
                allowed="at least one",
                fix="name another split in `stego.features.split`, or add pictures",
            )

    def __len__(self) -> int:
        return self.pictures * self._each

    @property
    def ids(self) -> list[str]:
        """The id of every piece; crops are numbered."""
        names = self._split.ids[: self.pictures]
        return names if self._each == 1 else [f"{name} {number}" for name in names for number in range(5)]

    @property
    def split(self) -> str:
        """Name of the split."""
        return self._split.split

    def picture_of(self, piece: int) -> int:
        """The number of the picture that a piece is from."""
        return piece // self._each

    def picture_id(self, piece: int) -> str:
        """The id of that picture."""
        return self._split.ids[self.picture_of(piece)]

    def image(self, piece: int) -> np.ndarray:
        """uint8 RGB (H, W, 3)."""
        picture = self.picture_of(piece)
        if self._last is None or self._last[0] != picture:
            self._last = picture, self._split.image(picture)
        return self._cut(self._last[1], piece, nearest=self._settings.filter == "nearest")

    def labels(self, piece: int) -> np.ndarray | None:
        """int64 (H, W) class ids, -100 = none; or None where the picture has no labels."""
        labels = self._split.semantic(self.picture_of(piece))
        return None if labels is None else self._cut(labels, piece, nearest=True)

    def _cut(self, array: np.ndarray, piece: int, *, nearest: bool) -> np.ndarray:
        if self._settings.five_crop:
            array = five_crops(array)[piece % 5]
        return array if self._settings.crop is None else centre_square(array, self._settings.crop, nearest=nearest)


class FeatureStore:
    """Reads what `write_features` wrote; features stay on disk until they are asked for.

    Args:
        folder: with index.json.

    Attributes:
        ids: of the pieces.
        channels: D.
        grid: h, w.

    Raises:
        DataError: there is no finished store.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / _INDEX).is_file():
            raise not_there(folder, _INDEX, what="features")
        index = read_json(folder / _INDEX)
        self.ids: list[str] = index["ids"]
        self.channels: int = index["channels"]
        self.grid: tuple[int, int] = (index["height"], index["width"])
        self._shards = [folder / name for name in index["shards"]]
        self._open: list[Tensor] | None = None
        self._starts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getstate__(self) -> dict[str, Any]:
        # A loader's worker maps the files itself.
        return {**self.__dict__, "_open": None}

    @property
    def cells(self) -> int:
        """Number of feature vectors: pieces x h x w."""
        return len(self) * self.grid[0] * self.grid[1]

    def maps(self, pieces: Sequence[int] | Tensor) -> Tensor:
        """float32 (B, D, h, w), channels last in memory, of the pieces with these numbers."""
        return self._rows(torch.as_tensor(pieces), size=1).permute(0, 3, 1, 2)

    def tokens(self, cells: Tensor) -> Tensor:
        """float32 (T, D) of the cells with these numbers, counted through all pieces, row by row."""
        return self._rows(cells, size=self.grid[0] * self.grid[1])

    def sample(self, count: int, *, generator: torch.Generator) -> Tensor:
        """`count` tokens (T, D), drawn without putting back; all where there are fewer."""
        if count >= self.cells:
            return self.tokens(torch.arange(self.cells))
        # numpy's choice: a permutation of all cells of a large data set would take gigabytes.
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        return self.tokens(torch.from_numpy(np.sort(rng.choice(self.cells, count, replace=False, shuffle=False))))

    def _rows(self, numbers: Tensor, *, size: int) -> Tensor:
        """Pieces (size 1: (n, h, w, D)) or cells (size h w: (n, D)) with these numbers, float32; only they are read."""
        if self._open is None:
            self._open = [_mapped(path) for path in self._shards]
            self._starts = torch.tensor([0, *(len(shard) for shard in self._open)]).cumsum(0)
        assert self._starts is not None
        shards = self._open if size == 1 else [shard.flatten(0, 2) for shard in self._open]
        number = torch.searchsorted(self._starts * size, numbers, right=True) - 1
        found = torch.empty(len(numbers), *shards[0].shape[1:])
        for shard in number.unique().tolist():
            here = (number == shard).nonzero()[:, 0]
            found[here] = shards[shard][numbers[here] - self._starts[shard] * size].float()
        return found


def not_there(folder: Path, file: str, *, what: Literal["features", "neighbours"]) -> DataError:
    """The error of a stage's output that is missing, or that says that the stage did not run."""
    if (folder / NOT_RUN).is_file():
        return DataError(
            found=f"{folder}, which says that its stage did not run",
            allowed=f"finished {what}",
            fix="set `stego.run: true` in params.yaml, or use a profile that has it, and run `dvc repro`",
        )
    return DataError(found=f"no {file} in {folder}", allowed=f"finished {what}", fix=f"run `dvc repro stego-{what}`")


def _mapped(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("features")


@torch.no_grad()
def write_features(pieces: Pieces, trunk: Any, folder: Path) -> None:
    """Compute the features of all pieces. What an interrupted run has finished is kept and not computed again.

    Args:
        pieces: what the trunk sees.
        trunk: frozen, see `lexiseg.encoders.trunk`.
        folder: to write to.

    Raises:
        DataError: pieces of different sizes, or smaller than a patch of the trunk.
    """
    first = torch.from_numpy(pieces.image(0))
    size, channels = grid_size(first.shape[0], first.shape[1], trunk.multiple), trunk.channels
    height, width = size[0] // trunk.multiple, size[1] // trunk.multiple
    per_shard = max(1, _SHARD_BYTES // (2 * channels * height * width))
    starts = range(0, len(pieces), per_shard)
    names = [f"features-{number:05d}.safetensors" for number in range(len(starts))]
    kept = checkpoint_file("features") or folder  # a folder of finished shards, found by the next run
    kept.mkdir(parents=True, exist_ok=True)
    device = best_device()
    trunk.to(device)
    pixels = BATCH_PIXELS if device.type == "cpu" else 32 * BATCH_PIXELS  # a GPU is idle with a few small crops
    ids = pieces.ids  # a list made anew each time it is asked for
    bar = tqdm(total=len(pieces), desc="features", unit="picture", mininterval=1, delay=1)
    for start, name in zip(starts, names, strict=True):
        stop = min(start + per_shard, len(pieces))
        # Outside of a stage nothing says that what lies there is of these pieces and this trunk.
        if kept == folder or not (kept / name).is_file():
            shard = torch.empty(stop - start, height, width, channels, dtype=torch.float16)
            step = max(1, pixels // (size[0] * size[1]))
            for low in range(start, stop, step):
                numbers = range(low, min(low + step, stop))
                images = _batch([pieces.image(number) for number in numbers], first.shape, size, ids[low])
                found = trunk(images.to(device)).permute(0, 2, 3, 1)
                shard[low - start : low - start + len(numbers)] = found.half().cpu()
                bar.update(len(numbers))
            if not bool(shard.isfinite().all()):
                raise DataError(
                    found=f"features beyond +-65504 or not finite, in pictures {ids[start]} and after",
                    allowed="finite features that half precision can hold",
                    fix="check the trunk's weights and its `mean` and `std` in `encode.trunk`",
                )
            save_tensors(kept / name, {"features": shard})
        else:
            bar.update(stop - start)
        if kept != folder:
            link_file(kept / name, folder / name)
    bar.close()
    trunk.cpu()
    index = {"ids": ids, "channels": channels, "height": height, "width": width, "shards": names}
    write_json(folder / _INDEX, index)


def grid_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """The nearest sides in pixels that can be cut into whole patches.

    Raises:
        DataError: a side is shorter than a patch.
    """
    if min(height, width) < multiple:
        raise DataError(
            found=f"a picture of {height} x {width} pixels",
            allowed=f"sides of at least {multiple} pixels, a patch of the trunk",
            fix="leave such pictures out (`data.min_side` makes validate refuse them), or scale them up",
        )
    return (round(height / multiple) * multiple, round(width / multiple) * multiple)


def _batch(images: list[np.ndarray], shape: Sequence[int], size: tuple[int, int], id: str) -> Tensor:
    if any(image.shape != tuple(shape) for image in images):
        found = sorted({image.shape[:2] for image in images} | {tuple(shape[:2])})
        raise DataError(
            found="pictures of different sizes: " + ", ".join(f"{h} x {w}" for h, w in found[:4]) + f" (near {id})",
            allowed="pictures of one size, or crops of one",
            fix="set `stego.features.crop` to a side in pixels, such as 224",
        )
    return to_grid(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), size)


def to_grid(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (B, 3, H, W) at a size that can be cut into whole patches, bilinearly, where it is another one."""
    if tuple(images.shape[-2:]) == size:
        return images
    resized = torch.nn.functional.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)
