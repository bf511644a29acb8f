"""What `lexiseg ablate lseg` compares: tables of variants, each with what changes against params.yaml."""

from __future__ import annotations

from typing import Any

Variants = dict[str, dict[str, Any]]

CONTROLS: Variants = {
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

# Block type and depth of the spatial regularisation (the paper's Table 4); "as set" is depth 0.
BLOCKS: Variants = {
    "as set": {},
    **{
        f"{block} {depth}": {"lseg.model.block": block, "lseg.model.block_depth": depth}
        for block in ("bottleneck", "depthwise")
        for depth in (1, 2, 4)
    },
}

# Text encoders of other sizes beside one image architecture (the paper's Table 5), and the bare label of the paper.
# With a CLIP that is pretrained here, both of its towers are trained anew.
TEXT_ENCODERS: Variants = {
    "as set": {},
    "1 text block": {"encode.pretrain.text_layers": 1},
    "4 text blocks": {"encode.pretrain.text_layers": 4},
    "bare labels": {"encode.text.templates": "bare"},
}

TABLES: dict[str, Variants] = {"controls": CONTROLS, "blocks": BLOCKS, "text-encoder": TEXT_ENCODERS}
