"""The block `baseline` of params.yaml."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lexiseg.settings import Block, Sweep


class LinearSettings(Block):
    """`baseline.linear`: a closed-set linear head on the frozen backbone."""

    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    lr: Annotated[float, Sweep(1e-3, 3e-2, log=True)] = Field(gt=0)
    weight_decay: float = Field(ge=0)
    stride: int = Field(ge=1)
    crop: tuple[int, int] | None


class BaselineSettings(Block):
    """The block `baseline`."""

    linear: LinearSettings
