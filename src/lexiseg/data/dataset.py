"""A split of a prepared data set, for training and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset as Table
from datasets import load_from_disk
from torch.utils.data import Dataset

from lexiseg.data.adapters.base import IGNORE_ON_DISK
from lexiseg.data.rows import decode_ids, decode_rgb
from lexiseg.errors import DataError
from lexiseg.segmentation import IGNORE_LABEL
from lexiseg.storage import read_json
from lexiseg.vocabulary import Vocabulary


class PreparedSplit(Dataset):
    """A split written by the stage prepare: map-style, memory-mapped, cheap to send to a loader's workers.

    Args:
        prepared: output folder of prepare.
        split: name of the split.

    Attributes:
        split: name of the split.
        vocabulary: class names.
        ids: ids of the samples, in order.

    Raises:
        DataError: nothing is prepared there, or it has no such split.

    Example:
        >>> split = PreparedSplit(Path("outputs/prepare"), "val")
        >>> sample = split[0]
        >>> sample["image"].shape, sample["semantic"].min()
        ((64, 64, 3), 0)
    """

    def __init__(self, prepared: Path, split: str) -> None:
        self._prepared, self.split = Path(prepared), split
        info = self._prepared / "info.json"
        if not info.is_file():
            raise DataError(
                found=f"no prepared data set in {prepared}",
                allowed="the output folder of the stage prepare",
                fix="run `dvc repro prepare`",
            )
        splits = read_json(info)["splits"]
        if split not in splits:
            raise DataError(
                found=f"the split `{split}`",
                allowed=f"one of {', '.join(sorted(splits))}",
                fix="name one of these, or add the split to the raw data and run `dvc repro prepare`",
            )
        self.vocabulary = Vocabulary.from_json(read_json(self._prepared / "vocabulary.json"))
        self._table = self._open()
        self.ids: list[str] = self._column("id")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample number `index`.

        Returns:
            id: str.
            image: uint8 H x W x 3, RGB.
            semantic: int64 H x W, indices of `vocabulary.names`, -100 = no label; or None.
            panoptic: int64 H x W, segment ids, 0 = none; or None.
            segments, captions, phrases, questions: lists as in `RawContent`; or None.
        """
        row = self._row(index)
        row["image"] = decode_rgb(row["image"]["bytes"])
        row["semantic"] = _class_ids(row["semantic"])
        if row["panoptic"] is not None:
            row["panoptic"] = decode_ids(row["panoptic"]["bytes"])
        return row

    def image(self, index: int) -> np.ndarray:
        """The picture of a sample alone: uint8 H x W x 3, RGB."""
        return decode_rgb(self._table.data.column("image")[self._position(index)].as_py()["bytes"])

    def semantic(self, index: int) -> np.ndarray | None:
        """The class ids of a sample alone, see `__getitem__`; a third of the time where nothing else is needed."""
        return _class_ids(self._table.data.column("semantic")[self._position(index)].as_py())

    @property
    def captions(self) -> list[list[str] | None]:
        """The captions of every sample, without decoding pictures."""
        return self._column("captions")

    def _row(self, index: int) -> dict[str, Any]:
        position = self._position(index)
        return {name: self._table.data.column(name)[position].as_py() for name in self._table.column_names}

    def _position(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of the split `{self.split}`, which has {len(self)}")
        return index % len(self)

    def _column(self, name: str) -> list[Any]:
        return self._table.data.column(name).to_pylist()

    def _open(self) -> Table:
        table = load_from_disk(str(self._prepared / "dataset" / self.split))
        assert isinstance(table, Table)
        return table

    def __getstate__(self) -> dict[str, Any]:
        # A worker opens the memory map itself; rows are not sent.
        return {name: value for name, value in self.__dict__.items() if name != "_table"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._table = self._open()


def _class_ids(stored: dict[str, Any] | None) -> np.ndarray | None:
    if stored is None:
        return None
    ids = decode_ids(stored["bytes"])
    ids[ids == IGNORE_ON_DISK] = IGNORE_LABEL
    return ids
