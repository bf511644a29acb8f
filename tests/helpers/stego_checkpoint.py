"""Checkpoints of STEGO as the authors' code writes them: official names, settings in objects of omegaconf."""

from __future__ import annotations

import sys
import typing
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from helpers.official_stego import head_state, vit_state

SIZES: dict[str, Any] = {"embed": 64, "depth": 2, "heads": 1, "patch": 8, "img_size": 32}
DIM, CLASSES, EXTRA = 12, 5, 2

# As in the authors' train_config.yml, in part.
SETTINGS: dict[str, Any] = {
    "output_root": "/home/somebody/stego",
    "dataset_name": "directory",
    "dir_dataset_n_classes": CLASSES,
    "max_steps": 7000,
    "batch_size": 32,
    "num_neighbors": 7,
    "crop_type": "five",
    "res": 224,
    "extra_clusters": EXTRA,
    "model_type": "vit_base",
    "arch": "dino",
    "dino_feat_type": "feat",
    "projection_type": "nonlinear",
    "dino_patch_size": 8,
    "continuous": True,
    "dim": DIM,
    "dropout": True,
    "zero_clamp": True,
    "lr": 5e-4,
    "pretrained_weights": None,
    "stabalize": False,
    "pointwise": False,
    "feature_samples": 11,
    "neg_samples": 5,
    "neg_inter_weight": 0.9058762625226623,
    "pos_inter_weight": 0.577453483136995,
    "pos_intra_weight": 1,
    "neg_inter_shift": 0.31361241889448443,
    "pos_inter_shift": 0.1754346515479633,
    "pos_intra_shift": 0.45828472207,
    "crops": [1, 2],
}


def random_state(
    sizes: Mapping[str, Any] = SIZES,
    *,
    dim: int = DIM,
    classes: int = CLASSES,
    extra: int = EXTRA,
    kind: str = "nonlinear",
    seed: int = 0,
) -> dict[str, Tensor]:
    """A complete state dict; with the kind "none", codes are the features, and `dim` is that of a map nobody uses."""
    rng = torch.Generator().manual_seed(seed)
    width = sizes["embed"]
    state = {f"net.model.{name}": value for name, value in vit_state(sizes, seed=seed).items()}
    head = head_state(width, dim, seed=seed)
    state |= {f"net.{n}": v for n, v in head.items() if kind == "nonlinear" or n.startswith("cluster1.")}
    code = width if kind == "none" else dim
    for name, *shape in (
        ("train_cluster_probe.clusters", classes, code),
        ("cluster_probe.clusters", classes + extra, code),
        ("linear_probe.weight", classes, code, 1, 1),
        ("linear_probe.bias", classes),
        ("decoder.weight", width, code, 1, 1),
        ("decoder.bias", width),
    ):
        state[name] = torch.randn(shape, generator=rng)
    return state


def write_checkpoint(
    path: Path,
    *,
    state: Mapping[str, Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> Path:
    """A checkpoint as Lightning 1 writes it.

    Args:
        path: the file.
        state: official names -> tensors; None: a random network.
        settings: changes of `SETTINGS`.
        more: other entries.
    """
    classes = _Classes()
    callback = classes.of("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    values = {**SETTINGS, **(settings or {})}
    content = {
        "epoch": 4,
        "global_step": 6999,
        "pytorch-lightning_version": "1.4.9",
        "state_dict": dict(random_state() if state is None else state),
        "callbacks": {callback: {"monitor": "miou"}},
        "optimizer_states": [],
        "hyper_parameters": {"n_classes": CLASSES, "cfg": classes.config(values)},
        **more,
    }
    with patch.dict(sys.modules, classes.modules):
        torch.save(content, path)
    return path


class _Classes:
    """Classes by the names of other programs, which need not be there; pickle looks for them in their modules."""

    def __init__(self) -> None:
        self.modules: dict[str, ModuleType] = {}

    def of(self, module: str, name: str) -> Any:
        parts = module.split(".")
        for end in range(1, len(parts)):  # pickle imports the package, too
            package = ".".join(parts[:end])
            self.modules.setdefault(package, ModuleType(package))
        home = self.modules.setdefault(module, ModuleType(module))
        if not hasattr(home, name):
            setattr(home, name, type(name, (), {"__module__": module}))
        return getattr(home, name)

    def made(self, module: str, name: str, **attributes: Any) -> Any:
        instance = self.of(module, name)()
        instance.__dict__.update(attributes)
        return instance

    def config(self, values: Mapping[str, Any]) -> Any:
        """omegaconf's DictConfig: every value, list and table in an object of its own, with types beside it."""
        whole = self.made("omegaconf.dictconfig", "DictConfig", _metadata=self._metadata(None, dict), _parent=None)
        whole._content = {key: self._node(key, value, whole) for key, value in values.items()}
        return whole

    def _node(self, key: Any, value: Any, parent: Any) -> Any:
        if not isinstance(value, list):
            return self.made(
                "omegaconf.nodes", "AnyNode", _metadata=self._metadata(key, typing.Any), _parent=parent, _val=value
            )
        node = self.made("omegaconf.listconfig", "ListConfig", _metadata=self._metadata(key, list), _parent=parent)
        node._content = [self._node(number, item, node) for number, item in enumerate(value)]
        return node

    def _metadata(self, key: Any, kind: Any) -> Any:
        name = "Metadata" if kind is typing.Any else "ContainerMetadata"
        own = {"ref_type": kind, "object_type": int, "optional": True, "key": key, "flags": {"struct": False}}
        return self.made("omegaconf.base", name, **own, resolver_cache=defaultdict(dict))
