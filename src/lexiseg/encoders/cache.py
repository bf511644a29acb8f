"""Content-keyed cache of text embeddings, safe under concurrent writers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import diskcache
import numpy as np
import torch
from diskcache.core import MODE_PICKLE
from torch import Tensor

from lexiseg.workspace import find_root, private_folder

SIZE_LIMIT = 2**30  # bytes; the least recently used embeddings go first


class _NoPickles(diskcache.Disk):
    """Rows as they are. diskcache would load a pickle that somebody else put there, and so run its code."""

    def fetch(self, mode: int, filename: str, value: object, read: bool) -> object:
        return None if mode == MODE_PICKLE else super().fetch(mode, filename, value, read)


class EmbeddingCache:
    """Vectors on disk, keyed by what made them (encoder and circumstances) and of what (the text).

    Equal keys always hold equal values, so writers need no order among each other; SQLite keeps them from
    tearing each other's rows.

    Args:
        folder: where the cache lives; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._store = (
            diskcache.Cache(str(folder), disk=_NoPickles, size_limit=SIZE_LIMIT, timeout=60) if folder else None
        )

    @classmethod
    def of_working_tree(cls) -> EmbeddingCache:
        """The cache of the working tree the process runs in; outside of one, nothing is kept."""
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
        if self._store is None:
            return compute(list(texts))
        found = {text: self._store.get(f"{encoder}:{text}") for text in dict.fromkeys(texts)}
        missing = [text for text, value in found.items() if not isinstance(value, bytes)]
        if missing:
            for text, row in zip(missing, compute(missing), strict=True):
                found[text] = row.numpy().astype("<f4").tobytes()
                self._store.set(f"{encoder}:{text}", found[text])
        rows = [np.frombuffer(found[text], dtype="<f4") for text in texts]  # type: ignore[arg-type]
        return torch.from_numpy(np.stack(rows).astype(np.float32)) if rows else compute([])
