"""The block `tcl` of params.yaml."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lexiseg.settings import Block


class LossSettings(Block):
    """`tcl.loss`: weights and priors of the paper's section 3.3."""

    image: float = Field(ge=0)
    feature: float = Field(ge=0)
    area: float = Field(ge=0)
    positive_prior: float = Field(ge=0, le=1)
    negative_prior: float = Field(ge=0, le=1)
    smooth: float = Field(ge=0)
    mask_temperature: float = Field(gt=0)

    @model_validator(mode="after")
    def _something(self) -> LossSettings:
        if not (self.image or self.feature or self.area or self.smooth):
            raise ValueError("at least one weight above 0: image, feature, area or smooth")
        return self


class TrainSettings(Block):
    """`tcl.train`: recipe."""

    steps: int = Field(ge=1)
    decoder_steps: int = Field(ge=0)
    lr: float = Field(gt=0)
    min_lr: float = Field(ge=0)
    lr_batch: int | None = Field(ge=1)
    warmup: int = Field(ge=0)
    weight_decay: float = Field(ge=0)
    clip_gradient: float | None = Field(gt=0)
    batch: int = Field(ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        if self.min_lr > self.lr:
            raise ValueError("`min_lr` is what `lr` falls to: not above it")
        if self.warmup >= self.steps:
            raise ValueError("`warmup` is a part of `steps`: below it")
        return self


class ModelSettings(Block):
    """`tcl.model`: the grounder. What each key does stands beside it in params.yaml."""

    stages: int = Field(ge=0)
    units: int = Field(ge=0)
    kernel: int = Field(ge=1)
    gate: float
    scale: float
    bias: float
    temperature: float = Field(gt=0)
    statistics: Literal["clip", "imagenet"]

    @model_validator(mode="after")
    def _consistent(self) -> ModelSettings:
        if self.kernel % 2 == 0:
            raise ValueError("`kernel` is odd: the centre of the convolution is a pixel")
        return self
