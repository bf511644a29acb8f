"""Predictions on disk: compact low-resolution scores, written by `<method>-predict`, read by `<method>-evaluate`.

    index.json                    {split: {"labels": [...], "ids": [...], "shards": [...]}}
    <split>-00000.safetensors     one float16 tensor (N, h, w) per image, named by its position in "ids"

A method whose refinement takes K kinds of scores (TCL: the grounder's masks and the knowledge branch's) writes
(K, N, h, w), and makes one out of them in its evaluate stage.

The index is written last, so a folder without one is an interrupted prediction. Equal predictions give equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from lexiseg.errors import DataError, ModelError
from lexiseg.storage import read_json, save_tensors, write_json

_INDEX = "index.json"
_SHARD_IMAGES = 256
_SHARD_BYTES = 256 << 20


class PredictionWriter:
    """Collect predictions and write them in shards of at most 256 images and about 256 MiB.

    Used as a context manager; leaving the block without an error writes the index. Splits may be mixed.

        with PredictionWriter(folder) as writer:
            writer.add("test", labels, "scene-000001", scores)   # scores: (N, h, w) logits
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / _INDEX).unlink(missing_ok=True)
        self._index: dict[str, dict[str, list[str]]] = {}
        self._known: dict[str, set[str]] = {}
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}

    def add(self, split: str, labels: Sequence[str], id: str, scores: np.ndarray | torch.Tensor) -> None:
        """Add one image.

        Args:
            split: name of the split.
            labels: the N names; the same for every image of a split.
            id: the sample's id, once per split.
            scores: (N, h, w) or (K, N, h, w) of any float type; stored as float16.

        Raises:
            ModelError: the scores have another shape, or hold NaN or values outside float16 (+-65504).
            DataError: an id occurs twice, or the labels of a split differ between images.
        """
        entry = self._index.setdefault(split, {"labels": list(labels), "ids": [], "shards": []})
        known = self._known.setdefault(split, set())
        if entry["labels"] != list(labels):
            raise DataError(
                found=f"labels of {split}/{id} that differ from those of the split's first image",
                allowed=f"the same labels for the whole split: {', '.join(entry['labels'])}",
                fix="write predictions for other labels into another folder",
            )
        if id in known:
            raise DataError(
                found=f"a second prediction for {split}/{id}",
                allowed="one prediction per sample",
                fix="give each sample of the data set its own id",
            )
        tensor = torch.as_tensor(scores).detach().cpu().to(torch.float16)
        if tensor.ndim not in (3, 4) or tensor.shape[-3] != len(entry["labels"]):
            raise ModelError(
                found=f"scores of shape {tuple(tensor.shape)} for {split}/{id}",
                allowed=f"({len(entry['labels'])}, h, w), or several of that: one map per label",
                fix="return the scores of all labels at low resolution",
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                found=f"scores of {split}/{id} that are NaN or beyond +-65504",
                allowed="finite logits",
                fix="look at the training loss: a run that diverged needs a lower learning rate",
            )
        waiting = self._waiting.setdefault(split, {})
        waiting[_key(len(entry["ids"]))] = tensor.clone()
        entry["ids"].append(id)
        known.add(id)
        size = sum(item.numel() * item.element_size() for item in waiting.values())
        if len(waiting) >= _SHARD_IMAGES or size >= _SHARD_BYTES:
            self._flush(split)

    def close(self) -> None:
        """Write what is left, then the index."""
        for split in self._index:
            self._flush(split)
        write_json(self._folder / _INDEX, self._index)

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def _flush(self, split: str) -> None:
        waiting, shards = self._waiting.get(split), self._index[split]["shards"]
        if waiting:
            name = f"{split}-{len(shards):05d}.safetensors"
            save_tensors(self._folder / name, waiting)
            shards.append(name)
            self._waiting[split] = {}


def prediction_index(folder: Path | str) -> dict[str, dict[str, list[str]]]:
    """The index of a predictions folder: {split: {"labels", "ids", "shards"}}.

    Raises:
        DataError: there is none.
    """
    path = Path(folder) / _INDEX
    if not path.is_file():
        raise DataError(
            found=f"no {_INDEX} in {folder}",
            allowed="a folder of finished predictions",
            fix="run the predict stage of the method (`dvc repro` does it)",
        )
    return read_json(path)


def read_predictions(folder: Path | str, split: str) -> tuple[tuple[str, ...], Iterator[tuple[str, np.ndarray]]]:
    """Read one split's predictions, one image at a time.

    Returns:
        The N labels, and an iterator of (id, scores), float32 of the shape that was given, in the order of writing.

    Raises:
        DataError: the folder has no index or no such split; while iterating: a shard is missing or damaged.
    """
    index = prediction_index(folder)
    if split not in index:
        raise DataError(
            found=f"no predictions for the split {split!r} in {folder}",
            allowed=f"one of: {', '.join(sorted(index)) or 'none'}",
            fix="add the split to the method's predict settings in params.yaml, or take one of those",
        )
    entry = index[split]
    return tuple(entry["labels"]), _images(Path(folder), entry)


def _images(folder: Path, entry: dict[str, list[str]]) -> Iterator[tuple[str, np.ndarray]]:
    ids = entry["ids"]
    position = 0
    for shard in entry["shards"]:
        try:
            with safe_open(folder / shard, framework="pt") as tensors:
                for key in sorted(tensors.keys()):
                    yield ids[int(key)], tensors.get_tensor(key).float().numpy()
                    position += 1
        except (OSError, SafetensorError) as error:
            raise _damaged(folder / shard, str(error)) from error
    if position != len(ids):
        raise _damaged(folder, f"{position} images for {len(ids)} ids")


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        found=f"predictions that cannot be read: {path} ({why})",
        allowed="the files as the predict stage wrote them",
        fix="run the predict stage again: `dvc repro --force` with its name",
    )


def _key(position: int) -> str:
    return f"{position:08d}"
