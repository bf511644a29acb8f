"""The block `lseg` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from lexiseg.encoders.settings import Readout
from lexiseg.settings import Block, Sweep


def _start(init: str) -> str:
    if init not in ("backbone", "random") and "/" not in init:
        raise ValueError("one of backbone, random, or a model folder such as models/demo_e200")
    return init


class ModelSettings(Block):
    """`lseg.model`: the network. What each key does stands beside it in params.yaml."""

    init: Annotated[str, AfterValidator(_start)]
    sha256: str | None = None
    features: int = Field(ge=1)
    readout: Readout
    block: Literal["none", "bottleneck", "depthwise"]
    block_depth: Annotated[int, Sweep(1, 4)] = Field(ge=0)
    activation: Literal["lrelu", "tanh", "relu"]
    temperature: Annotated[float, Sweep(0.03, 0.2, log=True)] = Field(gt=0)
    clip_residual: bool
    freeze_norm: bool

    @property
    def folder(self) -> str | None:
        """The model folder to start from, where it is one."""
        return None if self.init in ("backbone", "random") else self.init


class TrainSettings(Block):
    """`lseg.train`: recipe."""

    labels: Literal["dataset", "episode"]
    optimiser: Literal["sgd", "adamw"]
    lr: Annotated[float, Sweep(3e-4, 3e-3, log=True)] = Field(gt=0)
    lr_batch: int | None = Field(ge=1)
    backbone_lr_factor: Annotated[float, Sweep(0.01, 1, log=True)] = Field(ge=0)
    momentum: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    schedule: Literal["poly", "cosine"]
    schedule_unit: Literal["step", "epoch"]
    poly_power: float = Field(gt=0)
    warmup: int = Field(ge=0)
    steps: int | None = Field(ge=0)
    epochs: int | None = Field(ge=1)
    batch: int = Field(ge=1)
    accumulate: int = Field(ge=1)
    resize: tuple[int, int] | None
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
        for name in ("crop", "resize"):
            if min(getattr(self, name) or (1,)) < 1:
                raise ValueError(f"`{name}` is [height, width] in pixels")
        return self


class PredictSettings(Block):
    """`lseg.predict`: inference. The defaults are those of a model folder that says nothing."""

    resize: tuple[int, int] | None = None
    max_side: int | None = Field(default=None, ge=1)
    scales: tuple[float, ...] = Field(default=(1.0,), min_length=1)
    base_size: int | None = Field(default=None, ge=1)
    flip: bool = False
    window: int | None = Field(default=None, ge=32)

    @property
    def in_one_pass(self) -> bool:
        """Whether the network sees each picture once, and whole."""
        return self.scales == (1.0,) and not self.flip and self.window is None and self.base_size is None

    def card(self) -> dict[str, Any]:
        """The fields of a protocol card that inference decides."""
        sizes = {"scales": self.scales, "base_size": self.base_size}
        return {**sizes, "flips": self.flip, "sliding_window": self.window}

    @model_validator(mode="after")
    def _consistent(self) -> PredictSettings:
        if self.resize is not None and min(self.resize) < 1:
            raise ValueError("`resize` is [height, width] in pixels")
        if min(self.scales) <= 0:
            raise ValueError("`scales` must be above 0")
        if not self.in_one_pass and self.resize:
            raise ValueError("`resize` is for one pass; `scales`, `base_size`, `flip` and `window` need it to be null")
        if self.base_size and self.max_side:
            raise ValueError("give `base_size` or `max_side`, the other is null")
        return self


class LSegSettings(Block):
    """The block `lseg`."""

    run: bool
    model: ModelSettings
    train: TrainSettings
    predict: PredictSettings

    @model_validator(mode="after")
    def _starts_from_something(self) -> LSegSettings:
        if self.model.folder is not None and not self.model.sha256:
            raise ValueError(
                "`model.init` with a model folder needs `model.sha256`; `lexiseg import` with --profile sets them"
            )
        if self.model.folder is None and self.train.steps == 0:
            raise ValueError("`train.steps: 0` trains nothing: it needs a model folder in `model.init`")
        return self
