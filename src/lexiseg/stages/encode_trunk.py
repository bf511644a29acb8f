"""Stage encode-trunk: the frozen trunk of unsupervised methods, whatever it came from."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lexiseg.data.dataset import PreparedSplit
from lexiseg.encoders.backbone import check_name
from lexiseg.encoders.backbone_trunk import backbone_trunk
from lexiseg.encoders.from_timm import save_backbone, statistics_of, timm_weights
from lexiseg.encoders.settings import TrunkSettings
from lexiseg.encoders.trunk import NOT_RUN, copy_trunk, save_trunk
from lexiseg.encoders.vit_trunk import VIT_OPTIONS, VitTrunk, build_vit
from lexiseg.storage import write_json, write_text
from lexiseg.training import curve_csv
from lexiseg.workspace import resolve_model


def run(settings: Any, inputs: Mapping[str, Path], outputs: Path) -> None:
    """Write trunk.json and model.safetensors, and curve.csv where it is pretrained here; or that there is none."""
    trunk = settings.encode.trunk
    if trunk.source == "none":
        print("encode-trunk: not run, since params.yaml has `encode.trunk.source: none`")
        write_json(outputs / NOT_RUN, {"trunk": "none", "run": False})
    elif trunk.source == "pretrain":
        from lexiseg.encoders.self_supervised import pretrain_trunk

        recipe = settings.encode.self_supervised
        model, curve = pretrain_trunk(PreparedSplit(inputs["prepare"], recipe.split), recipe, seed=settings.seed)
        licence = "trained here on the pictures of the data set; the licence of those pictures applies"
        save_trunk(outputs, model, {"source": "pretrain", "model": model.config, "licence": licence})
        write_text(outputs / "curve.csv", curve_csv(curve))
    elif trunk.source == "backbone":
        torch.manual_seed(settings.seed)  # of a random backbone
        # Made again from its settings: what reads the stage encode would wait for its CLIP, too.
        with tempfile.TemporaryDirectory() as scratch:
            save_backbone(Path(scratch), settings.encode.backbone)
            save_trunk(outputs, *backbone_trunk(Path(scratch) / "backbone", stride=trunk.stride))
    elif trunk.source == "model":
        folder = resolve_model(str(trunk.weights), sha256=trunk.sha256, setting="encode.trunk.sha256")
        copy_trunk(folder, outputs)
    else:
        save_trunk(outputs, *timm_trunk(trunk))


def timm_trunk(settings: TrunkSettings) -> tuple[VitTrunk, dict[str, Any]]:
    """A ViT by name with the weights of a file or the hub, and what trunk.json says of it.

    Raises:
        ModelError: no such ViT, or weights that cannot be read or do not fit.
    """
    name = check_name(str(settings.name))
    mean, std = statistics_of(name)
    config: dict[str, Any] = {
        "source": "timm",
        "name": name,
        "options": settings.options,
        "facet": settings.facet,
        "positions": settings.positions,
        "mean": list(settings.mean or mean),
        "std": list(settings.std or std),
        "licence": settings.licence,
    }
    # The checks of the network come first: the weights may have to be fetched.
    trunk = VitTrunk(
        build_vit(name, settings.options),
        facet=settings.facet,
        positions=settings.positions,
        mean=config["mean"],
        std=config["std"],
    )
    weights = timm_weights(
        name,
        weights=str(settings.weights),
        sha256=settings.sha256,
        options={**VIT_OPTIONS, **settings.options},
        block="encode.trunk",
    )
    trunk.vit.load_state_dict(weights)
    return trunk, config
