"""LSeg's own node of the graph: train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lexiseg.data.adapters.base import Episodes
from lexiseg.data.dataset import PreparedSplit
from lexiseg.data.episodes import OTHERS, read_episodes, resize_ids, resize_picture
from lexiseg.data.targets import seen_targets
from lexiseg.data.transforms import generator, normalise, random_colour, random_crop, random_flip, random_scale
from lexiseg.encoders.text import TextEncoder, load_text
from lexiseg.methods.lseg.build import new_model, save_model
from lexiseg.methods.lseg.model import LSeg
from lexiseg.methods.lseg.module import LSegTraining
from lexiseg.ranks import share
from lexiseg.storage import read_json, write_text
from lexiseg.training import check_labelled_batch, curve_csv, fit, shuffled_indices
from lexiseg.vocabulary import Vocabulary


class SeenBatches:
    """Batch k of LSeg's training, or a rank's part of it: augmented pictures, and targets over the classes seen.

    Pixels of classes that are not seen are ignored, so their names stay unknown to the supervised loss.
    """

    def __init__(self, split: PreparedSplit, settings: Any, *, config: Mapping[str, Any], seed: int) -> None:
        self.labels: tuple[str, ...] = split.vocabulary.seen_names
        self.size = len(split)  # samples of one epoch
        self._split, self._settings, self._seed = split, settings, seed
        self._mean, self._std = config["mean"], config["std"]

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        indices = shuffled_indices(self.size, self._settings.batch, step, seed=self._seed)
        samples = [
            self._sample(self._split[int(indices[position])], generator(self._seed, step, position))
            for position in share(len(indices))
        ]
        # Made here and not kept: a loader's worker has to be able to pickle this object.
        to_targets = seen_targets(self._split.vocabulary)
        return self._batch(samples, to_targets)

    def _batch(
        self, samples: list[dict[str, Any]], to_targets: Callable[[np.ndarray], np.ndarray]
    ) -> dict[str, torch.Tensor]:
        check_labelled_batch(samples, crop="lseg.train.crop` or `lseg.train.resize")
        images = [normalise(sample["image"], mean=self._mean, std=self._std) for sample in samples]
        targets = [torch.from_numpy(to_targets(sample["semantic"])) for sample in samples]
        return {"image": torch.stack(images), "target": torch.stack(targets)}

    def _sample(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        settings = self._settings
        if settings.resize is not None:
            picture, ids = resize_picture(sample["image"], settings.resize), sample["semantic"]
            ids = ids if ids is None else resize_ids(ids, settings.resize)
            sample = {**sample, "image": picture, "semantic": ids}
        if settings.scale is not None:
            # The official pipeline scales the long side to a multiple of one base size.
            unit = settings.base_size / max(sample["image"].shape[:2]) if settings.base_size else 1.0
            sample = random_scale(sample, rng, low=unit * settings.scale[0], high=unit * settings.scale[1])
        if settings.crop is not None:
            sample = random_crop(sample, rng, height=settings.crop[0], width=settings.crop[1])
        if settings.flip:
            sample = random_flip(sample, rng)
        if settings.photometric:
            sample = random_colour(sample, rng, strength=settings.photometric)
        return sample


class EpisodeBatches(SeenBatches):
    """Batch k of the zero-shot training: each picture is asked about one class of its own, in two labels.

    Which pictures and classes, the data set's episodes say (`lexiseg.data.episodes`). Target 0 is "others": all other
    classes, and the border of objects too, as in the official code; only evaluation leaves it out.
    """

    def __init__(
        self, split: PreparedSplit, episodes: Episodes, settings: Any, *, config: Mapping[str, Any], seed: int
    ) -> None:
        super().__init__(split, settings, config=config, seed=seed)
        self.labels, self.size = (OTHERS, *episodes.classes), len(episodes.pairs)
        rows = {id: row for row, id in enumerate(split.ids)}
        label = {name: row for row, name in enumerate(self.labels)}
        # (episodes, 2): the picture's row in the split, and the class's in `labels`.
        self._episodes = np.array([(rows[sample], label[name]) for sample, name in episodes.pairs])
        self._of_class = None
        if episodes.by_class:
            self.size = len(set(self._episodes[:, 0]))
            self._of_class = [np.flatnonzero(self._episodes[:, 1] == row) for row in np.unique(self._episodes[:, 1])]

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        asked, samples = [], []
        shuffled = shuffled_indices(self.size, self._settings.batch, step, seed=self._seed)
        for position in share(len(shuffled)):
            number, rng = shuffled[position], generator(self._seed, step, position)
            if self._of_class is not None:  # then the order of the list says nothing
                number = rng.choice(self._of_class[rng.integers(len(self._of_class))])
            row, label = self._episodes[number]
            sample = self._split[int(row)]
            if sample["semantic"] is not None:
                # Before the augmentation, whose padding stays without a label.
                id = self._split.vocabulary.index(self.labels[label])
                sample["semantic"] = (sample["semantic"] == id).astype(np.int64)
            samples.append(self._sample(sample, rng))
            asked.append((0, int(label)))
        return {**self._batch(samples, lambda ids: ids), "labels": torch.tensor(asked)}


def train(settings: Any, inputs: Mapping[str, Path], outputs: Path) -> None:
    """Stage lseg-train: prepared data and frozen encoders -> model.safetensors, model.json, curve.csv.

    Without steps there is no curve: the network is that of the model folder in `lseg.model.init`.

    Raises:
        DataError: a data set without classes.
    """
    vocabulary = Vocabulary.from_json(read_json(inputs["prepare"] / "vocabulary.json"))
    vocabulary.require_names(needed_by="LSeg", instead="set `lseg.run: false` in params.yaml")
    text = load_text(inputs["encode"])
    torch.manual_seed(settings.seed)
    model, config = new_model(inputs["encode"], settings.lseg.model, text_dim=text.dim)
    config["vocabulary"] = vocabulary.to_json()
    config["stand_ins"] = {name: text.stand_in(name) for name in vocabulary.names if text.stand_in(name)}
    if settings.lseg.train.steps != 0:
        curve = _fit(model, config, text=text, prepared=inputs["prepare"], settings=settings)
        write_text(outputs / "curve.csv", curve_csv(curve))
    save_model(outputs, model, config)


def _fit(
    model: LSeg, config: dict[str, Any], *, text: TextEncoder, prepared: Path, settings: Any
) -> list[dict[str, float]]:
    """Train the model in place; returns the curve."""
    split, recipe = PreparedSplit(prepared, "train"), settings.lseg.train
    if recipe.labels == "episode":
        episodes = read_episodes(prepared, "train")
        batches = EpisodeBatches(split, episodes, recipe, config=config, seed=settings.seed)
    else:
        batches = SeenBatches(split, recipe, config=config, seed=settings.seed)
    per_epoch = max(1, batches.size // (recipe.batch * recipe.accumulate))
    steps = recipe.steps or recipe.epochs * per_epoch
    module = LSegTraining(
        model, text=text.embed(batches.labels), settings=recipe, steps=steps, steps_per_epoch=per_epoch
    )
    return fit(
        module,
        batch=batches,
        steps=steps,
        seed=settings.seed,
        workers=recipe.workers,
        accumulate=recipe.accumulate,
        precision=recipe.precision,
        title="train LSeg",
        save=lambda folder: save_model(folder, model, config),
    )
