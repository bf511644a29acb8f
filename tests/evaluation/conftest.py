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
    """Write a prepared data set with one split `test` from {id: label map (-100 ignored) or None}."""

    def write(vocabulary: Vocabulary, truths: dict[str, np.ndarray | None], *, size: tuple[int, int] = (8, 8)) -> Path:
        folder = tmp_path / "prepare"
        rows = []
        for number, (id, truth) in enumerate(truths.items()):
            shape = size if truth is None else truth.shape
            row = dict.fromkeys(FEATURES)
            row["id"] = id
            row["image"] = png(np.full((*shape, 3), 40 * number % 256, dtype=np.uint8))
            if truth is not None:
                row["semantic"] = png(np.where(truth < 0, 65535, truth).astype(np.uint16))
            rows.append(row)
        with SplitWriter(folder / "dataset" / "test") as writer:
            writer.add(rows)
            writer.finish(fingerprint="0")
        write_json(folder / "vocabulary.json", vocabulary.to_json())
        write_json(folder / "info.json", {"name": "micro", "adapter": "folder", "splits": {"test": {}}})
        return folder

    return write
