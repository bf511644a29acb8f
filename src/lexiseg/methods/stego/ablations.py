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
# The linear probe is the same as beside k-means, so it is not trained again.
_PAPERS_PROBE: dict[str, Any] = {
    "stego.probe.kind": "gradient",
    "stego.probe.steps": 1500,
    "stego.probe.linear": False,
}
# Ten classes of stuff, and all things as one: what unsupervised features can tell apart on the world.
_COARSE: dict[str, Any] = {"stego.protocol": "world_clusters11"}


def _with(variants: Variants, changes: dict[str, Any], suffix: str = "") -> Variants:
    return {f"{name}{suffix}": values | changes for name, values in variants.items()}


# STEGO beside k-means on the features that it distils: by k-means with restarts and by the paper's own probe.
CONTROLS: Variants = {"STEGO (as set)": {}, **_CONTROLS}
CONTROLS |= _with(CONTROLS, _PAPERS_PROBE, ", paper's probe")

# The same by two starts of each probe per seed of the trunk.
PROBES: Variants = {
    name: values
    for variant, changes in CONTROLS.items()
    for start in (0, 1)
    for name, values in _with({variant: changes}, {"stego.probe.seed": start}, f", start {start}").items()
}

# The terms and forms of the loss (the paper's ablation). Where one kind of pair falls away, another that attracts takes
# over its weight; nothing takes over that of random pairs, which alone repel.
LOSS: Variants = {
    "STEGO (as set)": {},
    "no self": {"stego.loss.self": 0.0, "stego.loss.knn": 0.92},
    "no knn": {"stego.loss.self": 0.92, "stego.loss.knn": 0.0},
    "no random": {"stego.loss.random": 0.0},
    "no centring": {"stego.loss.centring": "none"},
    "centring as in the code": {"stego.loss.centring": "code"},
    "no clamp": {"stego.loss.clamp": False},
    "stabilised": {"stego.loss.stabilise": True},
    "shifts by quantiles": {"stego.loss.shifts": "quantile"}
    | dict.fromkeys(("stego.loss.self_shift", "stego.loss.knn_shift", "stego.loss.random_shift")),
    "121 points, 5 negatives": {"stego.loss.points": 11, "stego.loss.negatives": 5},
    "linear head": {"stego.model.head": "linear"},
    "five crops": {"stego.features.five_crop": True},
}

# Tables named `coarse` are of the embedded world.
TABLES: dict[str, Variants] = {
    "controls": CONTROLS,
    "probes": PROBES,
    "probes_coarse": _with(PROBES, _COARSE),
    "loss": LOSS,
    "loss_coarse": _with(LOSS, _COARSE),
}
