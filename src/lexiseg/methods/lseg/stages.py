"""LSeg's own node of the graph: train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lexiseg.data.dataset import PreparedSplit
from lexiseg.data.targets import seen_targets
from lexiseg.data.transforms import generator, normalise, random_colour, random_crop, random_flip, random_scale
from lexiseg.encoders.text import load_text
from lexiseg.methods.lseg.build import new_model, save_model
from lexiseg.methods.lseg.module import LSegTraining
from lexiseg.storage import write_text
from lexiseg.training import check_labelled_batch, curve_csv, fit, shuffled_indices


class SeenBatches:
    """Batch k of LSeg's training: augmented pictures, and targets over the classes seen in training.

    Pixels of classes that are not seen are ignored, so their names stay unknown to the supervised loss.
    """

    def __init__(self, split: PreparedSplit, settings: Any, *, config: Mapping[str, Any], seed: int) -> None:
        self.labels = split.vocabulary.seen_names
        self._split, self._settings, self._seed = split, settings, seed
        self._mean, self._std = config["mean"], config["std"]

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        indices = shuffled_indices(len(self._split), self._settings.batch, step, seed=self._seed)
        samples = [self._sample(int(index), generator(self._seed, step, p)) for p, index in enumerate(indices)]
        check_labelled_batch(samples, crop="lseg.train.crop")
        images = [normalise(sample["image"], mean=self._mean, std=self._std) for sample in samples]
        # Made here and not kept: a loader's worker has to be able to pickle this object.
        to_targets = seen_targets(self._split.vocabulary)
        targets = [torch.from_numpy(to_targets(sample["semantic"])) for sample in samples]
        return {"image": torch.stack(images), "target": torch.stack(targets)}

    def _sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        settings, sample = self._settings, self._split[index]
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


def train(settings: Any, inputs: Mapping[str, Path], outputs: Path) -> None:
    """Stage lseg-train: prepared data and frozen encoders -> model.safetensors, model.json, curve.csv."""
    split = PreparedSplit(inputs["prepare"], "train")
    text = load_text(inputs["encode"])
    torch.manual_seed(settings.seed)
    model, config = new_model(inputs["encode"], settings.lseg.model, text_dim=text.dim)
    recipe = settings.lseg.train
    batches = SeenBatches(split, recipe, config=config, seed=settings.seed)
    per_epoch = max(1, len(split) // (recipe.batch * recipe.accumulate))
    steps = recipe.steps or recipe.epochs * per_epoch
    module = LSegTraining(
        model, text=text.embed(batches.labels), settings=recipe, steps=steps, steps_per_epoch=per_epoch
    )
    curve = fit(
        module,
        batch=batches,
        steps=steps,
        seed=settings.seed,
        workers=recipe.workers,
        accumulate=recipe.accumulate,
        precision=recipe.precision,
        title="train LSeg",
    )
    config["vocabulary"] = split.vocabulary.to_json()
    config["stand_ins"] = {name: text.stand_in(name) for name in split.vocabulary.names if text.stand_in(name)}
    save_model(outputs, model, config)
    write_text(outputs / "curve.csv", curve_csv(curve))
