"""The block `lseg` of params.yaml."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lexiseg.encoders.settings import Readout
from lexiseg.settings import Block


class ModelSettings(Block):
    """`lseg.model`: the network. What each key does stands beside it in params.yaml."""

    init: Literal["backbone", "random"]
    features: int = Field(ge=1)
    readout: Readout
    block: Literal["none", "bottleneck", "depthwise"]
    block_depth: int = Field(ge=0)
    activation: Literal["lrelu", "tanh", "relu"]
    temperature: float = Field(gt=0)
    clip_residual: bool
    freeze_norm: bool


class TrainSettings(Block):
    """`lseg.train`: recipe."""

    optimiser: Literal["sgd", "adamw"]
    lr: float = Field(gt=0)
    lr_batch: int | None = Field(ge=1)
    backbone_lr_factor: float = Field(ge=0)
    momentum: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    schedule: Literal["poly", "cosine"]
    schedule_unit: Literal["step", "epoch"]
    poly_power: float = Field(gt=0)
    warmup: int = Field(ge=0)
    steps: int | None = Field(ge=1)
    epochs: int | None = Field(ge=1)
    batch: int = Field(ge=1)
    accumulate: int = Field(ge=1)
    crop: tuple[int, int] | None
    scale: tuple[float, float] | None
    base_size: int | None = Field(ge=1)
    flip: bool
    photometric: float = Field(ge=0, le=1)
    workers: int = Field(ge=0)
    precision: Literal["32-true", "bf16-mixed", "16-mixed"]

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either `steps` or `epochs`, the other is null")
        if self.batch > 1 and self.crop is None and self.scale is not None:
            raise ValueError("`scale` makes pictures of different sizes; a batch of them needs `crop`")
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError("`scale` is [low, high], both above 0")
        if self.crop is not None and min(self.crop) < 1:
            raise ValueError("`crop` is [height, width] in pixels")
        return self


class PredictSettings(Block):
    """`lseg.predict`: inference."""

    resize: tuple[int, int] | None
    max_side: int | None = Field(ge=1)

    @model_validator(mode="after")
    def _positive(self) -> PredictSettings:
        if self.resize is not None and min(self.resize) < 1:
            raise ValueError("`resize` is [height, width] in pixels")
        return self


class LSegSettings(Block):
    """The block `lseg`."""

    model: ModelSettings
    train: TrainSettings
    predict: PredictSettings
