"""What `lexiseg sweep lseg` searches: spaces by name, each a list of knobs (see `lexiseg.sweeps.space`)."""

from __future__ import annotations

SPACES: dict[str, tuple[str, ...]] = {
    "training": ("lseg.train.lr", "lseg.train.backbone_lr_factor", "lseg.model.temperature"),
    # Spatial regularisation, section 3.3 of the paper.
    "blocks": (
        "lseg.model.block=bottleneck|depthwise",
        "lseg.model.block_depth",
        "lseg.model.activation=lrelu|tanh|relu",
    ),
}
