"""Small WebDataset shards."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int) -> bytes:
    """A PNG file of one grey."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), number, np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def shard(path: Path, files: Sequence[tuple[str, bytes]]) -> Path:
    """Write a tar file; returns its path."""
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def pair(number: int, *, caption: str | None = None) -> list[tuple[str, bytes]]:
    """A picture and its text, \"picture <number>\" by default."""
    return [
        (f"{number:05d}.png", picture(number)),
        (f"{number:05d}.txt", (f"picture {number}" if caption is None else caption).encode()),
    ]
