"""What the benchmarks of LSeg run: networks of real size with random weights, as model folders; pictures; labels.

The weights are random, so nothing has to be fetched; time and memory do not depend on them.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import torch
import torch.nn.functional as F

from lexiseg.encoders.clip import save_open_clip
from lexiseg.encoders.from_timm import save_backbone
from lexiseg.encoders.settings import BackboneSettings, TextSettings
from lexiseg.encoders.text import save_text
from lexiseg.methods.lseg.build import new_model, save_model
from lexiseg.methods.lseg.model import LSeg
from lexiseg.methods.lseg.settings import ModelSettings
from lexiseg.storage import read_json, save_tensors
from lexiseg.vocabulary import Vocabulary

CLIP = "ViT-B-32-quickgelu"  # of the paper's text side
LICENCE = "random weights"
QUALITIES = "red blue green black white old new wide narrow tall low round square wet dry dark pale long short striped"
MATERIALS = "brick steel glass wooden stone plastic paper leather rubber clay wool silver copper sand straw bamboo"
THINGS = """chair road wall tower bridge bottle lamp roof fence boat cart bench door window plate rope drum kite bell
barrel ladder basket shelf gate stove mirror candle pipe bucket pillow curtain sign wheel table"""

Block = Literal["none", "bottleneck", "depthwise"]


def labels(count: int) -> list[str]:
    """Up to 10,880 different labels of three words ("red brick chair"); neighbours differ in every word."""
    qualities, materials, things = QUALITIES.split(), MATERIALS.split(), THINGS.split()
    most = len(qualities) * len(materials) * len(things)
    if count > most:
        raise ValueError(f"{count} labels; there are words for {most}")
    names = []
    for number in range(count):
        rest, quality = divmod(number, len(qualities))
        turn, material = divmod(rest, len(materials))
        first = qualities[quality]
        second = materials[(material + quality) % len(materials)]
        names.append(f"{first} {second} {things[(turn + quality + material) % len(things)]}")
    return names


def picture(*, height: int, width: int, seed: int = 0) -> np.ndarray:
    """A uint8 RGB picture (H, W, 3) of soft blobs, from large to small."""
    rng = np.random.default_rng(seed)
    total = torch.zeros(3, height, width)
    for cells in (3, 6, 12, 24, 48):
        grid = torch.from_numpy(rng.normal(size=(1, 3, cells, cells)).astype(np.float32))
        total += F.interpolate(grid, size=(height, width), mode="bicubic")[0] * cells**-0.5
    low, high = total.amin(), total.amax()
    return ((total - low) / (high - low) * 255).byte().permute(1, 2, 0).numpy()


# ---- model folders -----------------------------------------------------------------------------------------------


@contextmanager
def working_tree() -> Iterator[Path]:
    """A working tree of its own to be in, so that the cache of text embeddings is empty at first and gone at last."""
    home = os.environ.pop("LEXISEG_HOME", None)
    try:
        with tempfile.TemporaryDirectory(prefix="lexiseg-benchmark-") as name:
            folder = Path(name)
            for file in ("dvc.yaml", "params.yaml"):  # what marks a working tree
                (folder / file).touch()
            with chdir(folder):
                yield folder
    finally:
        if home is not None:
            os.environ["LEXISEG_HOME"] = home


def write_model(
    folder: Path, *, clip: str = CLIP, backbone: str = "ViT-B/16", features: int = 256, block: Block = "none"
) -> Path:
    """A model folder: LSeg of the paper with random weights, and as text side an open_clip model and the bare label."""
    torch.manual_seed(0)
    weights = folder / "weights.safetensors"
    logging.disable(logging.WARNING)  # open_clip: that the weights are random
    save_tensors(weights, open_clip.create_model(clip, pretrained=None).state_dict())
    save_open_clip(folder / "clip", name=clip, pretrained=str(weights), sha256=None, licence=LICENCE)
    logging.disable(logging.NOTSET)
    weights.unlink()
    bare = TextSettings(source="clip", path=None, sha256=None, licence=None, templates="bare", stand_ins={})
    save_text(folder, bare, Vocabulary(names=("thing",)))
    text_dim = read_json(folder / "clip" / "clip.json")["model"]["embed_dim"]
    model, config = random_network(folder, text_dim=text_dim, backbone=backbone, features=features, block=block)
    save_model(folder, model, config)
    return folder


def random_network(
    folder: Path, *, text_dim: int, backbone: str, features: int, block: Block = "none"
) -> tuple[LSeg, dict[str, Any]]:
    """LSeg of the paper with random weights, and the config that describes it; the folder is for a file in between."""
    torch.manual_seed(0)
    save_backbone(
        folder,
        BackboneSettings(
            source="random",
            name=backbone,
            weights=None,
            sha256=None,
            licence=LICENCE,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            options={},
        ),
    )
    settings = ModelSettings(
        init="random",
        features=features,
        readout="project",
        block=block,
        block_depth=2,
        activation="lrelu",
        temperature=0.07,
        clip_residual=False,
        freeze_norm=False,
    )
    model, config = new_model(folder, settings, text_dim=text_dim)
    shutil.rmtree(folder / "backbone")
    return spread(model.eval()), config


@torch.inference_mode()
def spread(model: LSeg) -> LSeg:
    """Make the pixels of a picture differ, as a trained network does.

    Untrained, all of them point nearly the same way: one label wins everywhere, and to find the same winner proves
    nothing.
    """
    side = 8 * model.backbone.multiple
    image = torch.from_numpy(picture(height=side, width=side, seed=1)).permute(2, 0, 1)[None] / 127.5 - 1
    features = model.decoder(model.backbone(image), image_size=(side, side))
    centre = model.head.weight[:, :, 0, 0] @ features.mean(dim=(0, 2, 3))
    assert model.head.bias is not None
    model.head.bias.copy_(-centre)
    return model
