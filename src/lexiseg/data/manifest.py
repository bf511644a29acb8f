"""The manifest: one row of facts per raw sample, readable or not; validate judges them.

Only facts: no time, no absolute path. `file` is relative to the data set's folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lexiseg.errors import DataError
from lexiseg.storage import atomic_path

SCHEMA = pa.schema(
    {
        "split": pa.string(),
        "id": pa.string(),
        "file": pa.string(),
        "readable": pa.bool_(),
        "reason": pa.string(),  # why a sample is not readable
        "width": pa.int32(),
        "height": pa.int32(),
        "mode": pa.string(),  # of the raw file, in PIL's words
        "image_sha256": pa.string(),  # of size and decoded RGB pixels
        "mask_width": pa.int32(),  # of the semantic mask; null without one
        "mask_height": pa.int32(),
        "label_values": pa.list_(pa.int32()),  # class ids in the mask
        "unknown_labels": pa.list_(pa.int32()),  # raw ids outside the vocabulary
        "ignored_share": pa.float64(),  # share of the mask's pixels without a label
        "panoptic_width": pa.int32(),
        "panoptic_height": pa.int32(),
        "segments_agree": pa.bool_(),  # the ids of the panoptic mask are those of the segment table
        "caption_count": pa.int32(),
        "caption_words_min": pa.int32(),
        "caption_words_max": pa.int32(),
        "phrase_count": pa.int32(),
        "question_count": pa.int32(),
    }
)


def write_manifest(path: Path, facts: Sequence[dict[str, Any]]) -> None:
    """Write facts as parquet, atomically; a fact that a sample lacks is null."""
    table = pa.Table.from_pylist(list(facts), schema=SCHEMA)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """The manifest's rows, in order; a fact that a sample lacks is None.

    Raises:
        DataError: there is none.
    """
    if not path.is_file():
        raise DataError(
            found=f"no manifest at {path}",
            allowed="the output of the stage prepare",
            fix="run `dvc repro prepare`",
        )
    return pq.read_table(path).to_pylist()
