"""Batches of STEGO's trainings, each a function of its step alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lexiseg.errors import DataError
from lexiseg.evaluation.coarse import ClassSet
from lexiseg.methods.stego.features import FeatureStore, Pieces
from lexiseg.training import shuffled_indices


class PairBatches:
    """Batch k: features of pictures, and of one of each picture's neighbours.

    Args:
        store: features.
        neighbours: int64 (N, k), from the stage neighbours.
        size: pictures per batch.
        seed: of the choice.
    """

    def __init__(self, store: FeatureStore, neighbours: Tensor, *, size: int, seed: int) -> None:
        if len(store) < 2:
            raise DataError(
                found="one picture to learn from",
                allowed="at least two: STEGO tells a picture apart from others",
                fix="add pictures, or set `stego.features.five_crop: true`, which makes five of each",
            )
        self._store, self._neighbours = store, neighbours
        self._size, self._seed = min(size, len(store)), seed

    def __call__(self, step: int) -> dict[str, Tensor]:
        """`features` and `neighbours`, each float32 (B, D, h, w)."""
        # No picture twice in a batch, or it could be its own random partner: the rest of an epoch is left out.
        epoch, place = divmod(step, len(self._store) // self._size)
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._store))
        chosen = order[place * self._size : (place + 1) * self._size]
        ranks = np.random.default_rng([self._seed, step, 1]).integers(self._neighbours.shape[1], size=self._size)
        near = self._neighbours[torch.from_numpy(chosen), torch.from_numpy(ranks)]
        return {"features": self._store.maps(torch.from_numpy(chosen)), "neighbours": self._store.maps(near)}


class ProbeBatches:
    """Batch k: features of pictures, and their labels where the linear probe learns.

    Args:
        store: features.
        pieces: the pieces that they were computed from.
        chosen: numbers of the pieces to learn from: all, or those with labels.
        classes: what the linear probe tells apart; None: no labels are read.
        size: pieces per batch.
        seed: of the choice.
    """

    def __init__(
        self,
        store: FeatureStore,
        pieces: Pieces,
        chosen: list[int],
        *,
        classes: ClassSet | None,
        size: int,
        seed: int,
    ) -> None:
        self._store, self._pieces, self._chosen = store, pieces, np.array(chosen)
        self._classes, self._size, self._seed = classes, min(size, len(chosen)), seed

    def __call__(self, step: int) -> dict[str, Tensor]:
        """`features` float32 (B, D, h, w); with classes `labels` int64 (B, H, W), -100 = not evaluated."""
        places = shuffled_indices(len(self._chosen), self._size, step, seed=self._seed)
        numbers = self._chosen[places]
        batch = {"features": self._store.maps(torch.from_numpy(numbers))}
        if self._classes is not None:
            maps = [self._pieces.labels(int(number)) for number in numbers]
            assert all(one is not None for one in maps)  # `chosen` are those with labels
            batch["labels"] = torch.from_numpy(self._classes.of(np.stack(maps)))  # type: ignore[arg-type]
        return batch
