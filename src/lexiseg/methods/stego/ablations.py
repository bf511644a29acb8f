"""What `lexiseg ablate stego` compares: tables of variants, each with what changes against params.yaml."""

from __future__ import annotations

from typing import Any

Variants = dict[str, dict[str, Any]]

# Codes that need no training, in the place of STEGO's.
_CONTROLS: Variants = {
    "k-means, raw": {"stego.model.head": "none", "stego.train.steps": 0},
    "k-means, PCA": {"stego.model.head": "pca", "stego.train.steps": 0},
    "k-means, whitened": {"stego.model.head": "whitened", "stego.train.steps": 0},
}
_PAPERS_PROBE: dict[str, Any] = {"stego.probe.kind": "gradient", "stego.probe.steps": 1500}
# Ten classes of stuff, and all things as one class: what unsupervised features can tell apart on the world.
_COARSE: dict[str, Any] = {"stego.protocol": "world_clusters11"}


def _with(variants: Variants, changes: dict[str, Any], suffix: str) -> Variants:
    return {f"{name}{suffix}": values | changes for name, values in variants.items()}


_BOTH: Variants = {"STEGO (as set)": {}, **_CONTROLS}

# STEGO beside k-means on the features that it distils: by k-means with restarts and by the paper's own probe.
CONTROLS: Variants = {**_BOTH, **_with(_BOTH, _PAPERS_PROBE, ", paper's probe")}

# Two starts of the probe per seed of the trunk, at both numbers of clusters.
PROBES: Variants = {
    f"{name}, {clusters}, probe {seed}": values | more | {"stego.probe.seed": seed}
    for name, values in _BOTH.items()
    for clusters, more in (("20 clusters", {}), ("11 clusters", _COARSE))
    for seed in (0, 1)
}

# The terms and forms of the loss (the paper's ablation). Weights that fall away are given to the others.
LOSS: Variants = {
    "STEGO (as set)": {},
    "no self": {"stego.loss.self": 0.0, "stego.loss.knn": 0.92},
    "no knn": {"stego.loss.self": 0.92, "stego.loss.knn": 0.0},
    "no random": {"stego.loss.random": 0.0},
    "no centring": {"stego.loss.centring": "none"},
    "centring as in the code": {"stego.loss.centring": "code"},
    "no clamp": {"stego.loss.clamp": False},
    "stabilised": {"stego.loss.stabilise": True},
    "shifts by quantiles": {"stego.loss.shifts": "quantile"},
    "linear head": {"stego.model.head": "linear"},
    "five crops": {"stego.features.five_crop": True},
    "dense CRF": {"stego.refine.crf_iterations": 10},
}
LOSS |= _with(LOSS, _COARSE, ", 11 clusters")

TABLES: dict[str, Variants] = {"controls": CONTROLS, "probes": PROBES, "loss": LOSS}
