"""The columns of a prepared data set and the writer of a split."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Image, List, Value
from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

FEATURES = Features(
    {
        "id": Value("string"),
        "image": Image(),
        "semantic": Image(),
        "panoptic": Image(),
        "segments": List({"id": Value("int32"), "class_id": Value("int32"), "thing": Value("bool")}),
        "captions": List(Value("string")),
        "phrases": List({"text": Value("string"), "segment_ids": List(Value("int32"))}),
        "questions": List({"question": Value("string"), "answer": Value("string")}),
    }
)
"""Columns of every split. `image` RGB; `semantic` 16-bit PNG, 65535 = no label; `panoptic` 16-bit PNG, 0 = no
segment; absent values are null."""

_PICTURES = ("image", "semantic", "panoptic")
_SHARD_BYTES = 512 << 20
_MAX_SHARDS = 4


class SplitWriter:
    """Write one split as `save_to_disk` lays it out: equal rows give equal bytes.

    The rows go to a throw-away file first, so a split may be larger than the memory. The cache of the
    datasets library is not used: it would answer with old rows after a raw file changed in place.

    Example:
        with SplitWriter(folder / "dataset" / "train") as writer:
            writer.add(rows)
            writer.finish(fingerprint="…")
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._scratch = folder, folder.with_name(f".{folder.name}.part")
        # What a killed run left here would become part of the output.
        for left in (self._folder, self._scratch):
            shutil.rmtree(left, ignore_errors=True)
        self._scratch.mkdir(parents=True)
        self._schema = FEATURES.arrow_schema
        self._stream = pa.RecordBatchStreamWriter(str(self._scratch / "rows.arrow"), self._schema)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows; pictures are given as bytes or None."""
        columns = [_column(name, [row[name] for row in rows], self._schema.field(name).type) for name in FEATURES]
        self._stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))

    def finish(self, *, fingerprint: str) -> None:
        """Write the split. `fingerprint` names its content and goes into state.json."""
        self._stream.close()
        source = self._scratch / "rows.arrow"
        shards = min(_MAX_SHARDS, 1 + source.stat().st_size // _SHARD_BYTES)
        loaded = Dataset.from_file(str(source))
        rows = Dataset(loaded.data, info=loaded.info, fingerprint=fingerprint)
        enabled = is_progress_bar_enabled()
        disable_progress_bar()
        try:
            rows.save_to_disk(self._folder, num_shards=max(1, min(shards, len(rows))))
        finally:
            if enabled:
                enable_progress_bar()

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        shutil.rmtree(self._scratch)


def _column(name: str, values: list[Any], kind: pa.DataType) -> pa.Array:
    if name not in _PICTURES:
        return pa.array(values, type=kind)
    missing = pa.array([value is None for value in values], type=pa.bool_())
    parts = [pa.array(values, type=pa.binary()), pa.nulls(len(values), pa.string())]
    return pa.StructArray.from_arrays(parts, fields=list(kind), mask=missing)
