"""Content-keyed cache of text embeddings, safe under concurrent writers."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import diskcache
import numpy as np
import torch
from diskcache.core import MODE_PICKLE
from torch import Tensor

from lexiseg.workspace import find_root, private_folder

_FAILURES = (sqlite3.Error, diskcache.Timeout, OSError)
MEMORY_ROWS = 50_000  # 100 MB of vectors of 512 numbers
SIZE_LIMIT = 2**30  # bytes; the embeddings stored longest ago go first


class _NoPickles(diskcache.Disk):
    """Rows as they are. diskcache would load a pickle that somebody else put there, and so run its code."""

    def fetch(self, mode: int, filename: str, value: object, read: bool) -> object:
        return None if mode == MODE_PICKLE else super().fetch(mode, filename, value, read)


class EmbeddingCache:
    """Vectors in memory and on disk, keyed by what made them (encoder and circumstances) and of what (the text).

    Equal keys always hold equal values, so writers need no order among each other; SQLite keeps them from
    tearing each other's rows. A cache that is damaged, locked or without room is told of and done without.

    Args:
        folder: where the cache lives on disk; None keeps vectors in memory only.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._store = folder, None
        self._memory: dict[str, bytes] = {}
        if folder is not None:
            try:
                self._store = diskcache.Cache(str(folder), disk=_NoPickles, size_limit=SIZE_LIMIT, timeout=60)
            except _FAILURES as error:
                self._do_without(error)

    @classmethod
    def of_working_tree(cls) -> EmbeddingCache:
        """The cache of the working tree the process runs in; outside of one, nothing is kept on disk."""
        root = find_root()
        return cls(private_folder(root) / "cache" / "text" if root else None)

    def fetch(self, encoder: str, texts: Sequence[str], compute: Callable[[list[str]], Tensor]) -> Tensor:
        """Embeddings of `texts` in their order.

        Args:
            encoder: hash of all that the bits of a vector depend on besides the text.
            texts: what to embed.
            compute: embeds texts that are not there: list of N -> float32 (N, C).

        Returns:
            float32 (N, C).
        """
        if not texts:
            return compute([])
        found = {text: row for text in texts if (row := self._memory.get(f"{encoder}:{text}"))}
        found |= self._read(encoder, [text for text in texts if text not in found])
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        if missing:
            rows = zip(missing, compute(missing), strict=True)
            made = {text: row.numpy().astype("<f4").tobytes() for text, row in rows}
            self._write(encoder, made)
            found |= made
        if len(self._memory) + len(found) > MEMORY_ROWS:
            self._memory.clear()
        self._memory |= {f"{encoder}:{text}": row for text, row in found.items()}
        return torch.from_numpy(
            np.stack([np.frombuffer(found[text], dtype="<f4") for text in texts]).astype(np.float32)
        )

    def _read(self, encoder: str, texts: Sequence[str]) -> dict[str, bytes]:
        if self._store is None:
            return {}
        try:
            rows = {text: self._store.get(f"{encoder}:{text}") for text in dict.fromkeys(texts)}
        except _FAILURES as error:
            self._do_without(error)
            return {}
        return {text: value for text, value in rows.items() if isinstance(value, bytes)}

    def _write(self, encoder: str, rows: Mapping[str, bytes]) -> None:
        if self._store is None:
            return
        try:
            for text, value in rows.items():
                self._store.set(f"{encoder}:{text}", value)
        except _FAILURES as error:
            self._do_without(error)

    def _do_without(self, error: Exception) -> None:
        self._store = None
        print(
            f"warning: the cache of text embeddings is not used ({error}); if that stays so, delete {self._folder}",
            file=sys.stderr,
        )
