"""The block `evaluate` of params.yaml."""

from __future__ import annotations

from pydantic import Field

from lexiseg.settings import Block


class EvaluateSettings(Block):
    """How predictions become numbers and pictures; the same for every method."""

    protocol: str = "world"
    """The protocol card: world, camvid, or generic for any data set. Numbers under different cards are never
    compared."""

    splits: tuple[str, ...] = Field(default=("test",), min_length=1)
    """Splits to evaluate. Each needs predictions and labels."""

    pictures: int = Field(default=6, ge=0)
    """Example pictures per split, spread evenly over it. Up: more to look at, a little more disk."""

    boundary_tolerance: float = Field(default=0.0075, gt=0.0, lt=1.0)
    """How far an outline may be off in the boundary F-score, as a share of the image diagonal (0.0075 = 4.5 px at
    480 x 360), but at least one pixel. Up: more lenient, slower. Part of the protocol's hash."""
