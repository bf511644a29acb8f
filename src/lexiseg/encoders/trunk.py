"""The frozen trunk of unsupervised methods, whatever it is: what it does, from and to its folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lexiseg.errors import ModelError
from lexiseg.storage import load_tensors, read_json, save_tensors, sha256_of_file, write_json

NOT_RUN = "not-run.json"  # what lies in the place of a trunk where there is none


class Trunk(nn.Module):
    """Dense features of pictures.

    Letters: B pictures of H x W pixels, D channels.

    Attributes:
        multiple: pixels per side of a cell; sides of pictures are multiples of it.
        channels: D.
    """

    multiple: int
    channels: int

    def forward(self, images: Tensor) -> Tensor:
        """uint8 RGB (B, 3, H, W) -> (B, D, H / multiple, W / multiple)."""
        raise NotImplementedError


def load_trunk(folder: Path) -> Trunk:
    """The trunk in a folder that the stage encode-trunk wrote, or that lies in a model folder; frozen.

    Raises:
        ModelError: there is none.
    """
    path = folder / "trunk.json"
    if not path.is_file():
        none = (folder / NOT_RUN).is_file()
        raise ModelError(
            found=f"{folder} says that there is no trunk" if none else f"{folder} has no trunk.json",
            allowed="a folder written by the stage encode-trunk, with `encode.trunk.source` other than none",
            fix="set `encode.trunk.source` in params.yaml and run `dvc repro encode-trunk`",
        )
    trunk = build_trunk(read_json(path))
    trunk.load_state_dict(load_tensors(folder / "model.safetensors"))
    return trunk.eval().requires_grad_(False)


def trunk_sha256(folder: Path) -> str:
    """Hex sha256 of the weights of the trunk in a folder, by which a head knows the one it was trained on."""
    return sha256_of_file(folder / "model.safetensors")


def save_trunk(folder: Path, trunk: Trunk, config: dict[str, Any]) -> None:
    """Write trunk.json and model.safetensors, what `load_trunk` reads."""
    save_tensors(folder / "model.safetensors", trunk.state_dict())
    write_json(folder / "trunk.json", config)


def copy_trunk(source: Path, target: Path) -> None:
    """Copy the trunk of a model folder into the output folder of the stage encode-trunk.

    Raises:
        ModelError: the model has none.
    """
    if not (source / "trunk" / "trunk.json").is_file():
        raise ModelError(
            found=f"{source} holds no trunk",
            allowed="a model folder with trunk/trunk.json, such as one of STEGO",
            fix="set `encode.trunk.weights` to such a folder, or choose another `encode.trunk.source`",
        )
    for name in ("trunk.json", "model.safetensors"):
        shutil.copyfile(source / "trunk" / name, target / name)


def build_trunk(config: dict[str, Any]) -> Trunk:
    """The network that a trunk.json describes, untrained."""
    # Each of them brings a library along that takes seconds to import, so only the one that is asked for comes.
    if config["source"] == "pretrain":
        from lexiseg.encoders.tiny_trunk import TinyTrunk

        return TinyTrunk(**config["model"])
    if config["source"] == "backbone":
        from lexiseg.encoders.backbone_trunk import BackboneTrunk
        from lexiseg.encoders.features import FrozenFeatures
        from lexiseg.encoders.pyramid import build_timm_backbone

        backbone = build_timm_backbone(config["name"], options=config["options"], readout="ignore", weights=None)
        return BackboneTrunk(FrozenFeatures(backbone, stride=config["stride"], mean=config["mean"], std=config["std"]))
    from lexiseg.encoders.vit_trunk import VitTrunk, build_vit

    return VitTrunk(
        build_vit(config["name"], config["options"]),
        facet=config["facet"],
        positions=config["positions"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
