"""Variants of LSeg that `lexiseg ablate lseg` compares: what changes against params.yaml."""

from __future__ import annotations

from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    # The settings as they are.
    "as set": {},
    # The paper's network: backbone initialised, no CLIP embedding added to its output.
    "paper's network": {"lseg.model.clip_residual": False},
    # The control: nothing pretrained on the image side. Unseen classes should collapse.
    "from scratch": {
        "lseg.model.clip_residual": False,
        "lseg.model.init": "random",
        "lseg.model.freeze_norm": False,  # untrained statistics, kept, would be no normalisation at all
        "lseg.train.backbone_lr_factor": 1.0,
    },
}
