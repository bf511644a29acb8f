import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lexiseg.data.features import FEATURES, SplitWriter
from lexiseg.storage import write_json
from lexiseg.vocabulary import Vocabulary

WritePrepared = Callable[..., Path]


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture
def write_prepared(tmp_path) -> WritePrepared:
    """Write a prepared data set from {id: label map (-100 ignored) or None}: the split `test`, and others by name."""

    def write(
        vocabulary: Vocabulary,
        truths: dict[str, np.ndarray | None],
        *,
        size: tuple[int, int] = (8, 8),
        **others: dict[str, np.ndarray | None],
    ) -> Path:
        folder = tmp_path / "prepare"
        splits = {"test": truths, **others}
        for name, content in splits.items():
            rows = []
            for number, (id, truth) in enumerate(content.items()):
                shape = size if truth is None else truth.shape
                row = dict.fromkeys(FEATURES)
                row["id"] = id
                row["image"] = png(np.full((*shape, 3), 40 * number % 256, dtype=np.uint8))
                if truth is not None:
                    row["semantic"] = png(np.where(truth < 0, 65535, truth).astype(np.uint16))
                rows.append(row)
            with SplitWriter(folder / "dataset" / name) as writer:
                writer.add(rows)
                writer.finish(fingerprint="0")
        write_json(folder / "vocabulary.json", vocabulary.to_json())
        info = {"name": "micro", "adapter": "folder", "splits": {split: {} for split in splits}}
        write_json(folder / "info.json", info)
        return folder

    return write
