"""TCL's own node of the graph: train."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lexiseg.data.dataset import PreparedSplit
from lexiseg.data.shards import TarPairs
from lexiseg.errors import DataError
from lexiseg.methods.tcl.batches import CaptionBatches, ShardBatches
from lexiseg.methods.tcl.build import new_model, save_model
from lexiseg.methods.tcl.module import TCLTraining
from lexiseg.storage import read_json, write_text
from lexiseg.training import curve_csv, fit
from lexiseg.vocabulary import Vocabulary


def train(settings: Any, inputs: Mapping[str, Path], outputs: Path) -> None:
    """Stage tcl-train: captioned pictures and a frozen CLIP -> model.safetensors, model.json, curve.csv.

    Without steps there is no curve, and the grounder is the untrained one.

    Raises:
        DataError: a data set without classes, whose pictures could not be evaluated.
    """
    vocabulary = Vocabulary.from_json(read_json(inputs["prepare"] / "vocabulary.json"))
    vocabulary.require_names(needed_by="TCL", instead="set `tcl.run: false` in params.yaml")
    recipe = settings.tcl.train
    torch.manual_seed(settings.seed)
    model, clip, config = new_model(inputs["encode"], settings.tcl.model)
    config |= {"vocabulary": vocabulary.to_json(), "stand_ins": {}}
    if recipe.steps:
        how: dict[str, Any] = {"tokenize": clip.tokenize, "settings": recipe, "config": config, "seed": settings.seed}
        how["patch_size"] = model.visual.patch_size
        if recipe.shards is not None:
            batches = ShardBatches(_shards(inputs["data"], recipe.shards), **how)
        else:
            batches = CaptionBatches([PreparedSplit(inputs["prepare"], name) for name in recipe.splits], **how)
        module = TCLTraining(model, text=TextTower(clip.model), train=recipe, loss=settings.tcl.loss)
        curve = fit(
            module,
            batch=batches,
            steps=recipe.steps,
            seed=settings.seed,
            workers=recipe.workers,
            gradient_clip=recipe.clip_gradient,
            precision=recipe.precision,
            title="train TCL",
            save=lambda folder: save_model(folder, model, config),
        )
        write_text(outputs / "curve.csv", curve_csv(curve))
        if recipe.shards is not None:
            print(f"{int(module.skipped)} damaged pairs passed over")
    save_model(outputs, model, config)


def _shards(folder: Path, pattern: str) -> TarPairs:
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise DataError(
            found=f"`tcl.train.shards: {pattern}`",
            allowed="a pattern below the folder of the data set, such as pairs/*.tar",
            fix="move or link the shards into it, so that their version is recorded with the data",
        )
    found = sorted(path for path in folder.glob(pattern) if path.is_file())
    if not found:
        raise DataError(
            found=f"no file {pattern} in {folder}",
            allowed="WebDataset shards, .tar",
            fix="correct `tcl.train.shards`, or put the shards there and record them: `dvc commit data.dvc`",
        )
    pairs = TarPairs(found)
    lacks = pairs.incomplete
    print(
        f"{len(pairs)} pairs in {len(found)} shards; left out: {lacks.without_text} pictures without a text, "
        f"{lacks.without_picture} texts without a picture; shards that end early: {', '.join(lacks.broken) or 'none'}"
    )
    return pairs


class TextTower(torch.nn.Module):
    """The text side of a CLIP: token ids (B, L) -> embeddings (B, C), not normalised."""

    def __init__(self, clip: torch.nn.Module) -> None:
        super().__init__()
        # Without the image tower, which is the trained model's: it would be in every checkpoint twice.
        self.clip = copy.copy(clip)
        self.clip._modules = {name: part for name, part in clip._modules.items() if name != "visual"}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.clip.encode_text(ids)  # type: ignore[operator]
