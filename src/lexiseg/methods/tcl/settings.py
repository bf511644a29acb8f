"""The block `tcl` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from lexiseg.settings import Block, Sweep

Side = Annotated[int, Field(ge=1)]


def _policy(text: str) -> str:
    # Here, since timm takes a second to import and few settings name a policy.
    from timm.data.auto_augment import rand_augment_transform

    try:
        rand_augment_transform(text, {"img_mean": (0, 0, 0)})
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise ValueError("null, or a RandAugment policy of timm such as rand-m9-mstd0.5-inc1") from error
    return text


def _start(init: str) -> str:
    if init != "clip" and "/" not in init:
        raise ValueError("clip, or a model folder such as models/tcl")
    return init


class LossSettings(Block):
    """`tcl.loss`: weights and priors of the paper's section 3.3."""

    image: Annotated[float, Sweep(0.01, 1, log=True)] = Field(ge=0)
    feature: Annotated[float, Sweep(0.01, 1, log=True)] = Field(ge=0)
    area: Annotated[float, Sweep(0.1, 1, log=True)] = Field(ge=0)
    positive_prior: Annotated[float, Sweep(0.2, 0.9)] = Field(ge=0, le=1)
    negative_prior: Annotated[float, Sweep(0, 0.2)] = Field(ge=0, le=1)
    smooth: Annotated[float, Sweep(0.1, 3, log=True)] = Field(ge=0)
    mask_temperature: float = Field(gt=0)

    @model_validator(mode="after")
    def _something(self) -> LossSettings:
        if not (self.image or self.feature or self.area or self.smooth):
            raise ValueError("at least one weight above 0: image, feature, area or smooth")
        return self


class TrainSettings(Block):
    """`tcl.train`: recipe."""

    steps: int = Field(ge=0)
    decoder_steps: int = Field(ge=0)
    lr: Annotated[float, Sweep(3e-4, 3e-3, log=True)] = Field(gt=0)
    min_lr: float = Field(ge=0)
    lr_batch: int | None = Field(ge=1)
    warmup: int = Field(ge=0)
    weight_decay: float = Field(ge=0)
    clip_gradient: float | None = Field(gt=0)
    batch: int = Field(ge=1)
    splits: tuple[str, ...]
    shards: Annotated[str, Field(min_length=1)] | None
    text: Literal["caption", "noun"]
    size: tuple[Side, Side] | None
    crop_scale: tuple[float, float] | None
    flip: bool
    auto_augment: Annotated[str, AfterValidator(_policy)] | None
    erasing: float = Field(ge=0, le=1)
    workers: int = Field(ge=0)
    precision: Literal["32-true", "bf16-mixed"]

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        if len(set(self.splits)) != len(self.splits):
            raise ValueError("each of `splits` once: a picture twice in a batch would be its own negative")
        if bool(self.splits) == (self.shards is not None):
            raise ValueError("either `splits`, with `shards: null`, or `shards`, with `splits: []`")
        if self.shards is not None and self.text == "noun":
            raise ValueError("`text: noun` needs all captions in advance: it goes with `splits`, not with `shards`")
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError("`crop_scale` is [low, high], shares of the picture's area above 0, up to 1")
        if self.crop_scale is not None and self.size is None:
            raise ValueError("`crop_scale` needs `size`, the size that crops are brought to")
        if self.min_lr > self.lr:
            raise ValueError("`min_lr` is what `lr` falls to: not above it")
        if self.steps and self.warmup >= self.steps:
            raise ValueError("`warmup` is a part of `steps`: below it")
        return self


class ModelSettings(Block):
    """`tcl.model`: the grounder. What each key does stands beside it in params.yaml."""

    init: Annotated[str, AfterValidator(_start)] = "clip"
    sha256: str | None = None
    stages: int = Field(ge=0)
    units: int = Field(ge=0)
    kernel: int = Field(ge=1)
    gate: float
    scale: float
    bias: float
    temperature: Annotated[float, Sweep(0.03, 0.2, log=True)] = Field(gt=0)
    statistics: Literal["clip", "imagenet"]

    @model_validator(mode="after")
    def _consistent(self) -> ModelSettings:
        if self.kernel % 2 == 0:
            raise ValueError("`kernel` is odd: the centre of the convolution is a pixel")
        if (self.init != "clip") != (self.sha256 is not None):
            raise ValueError("`sha256` goes with a model folder in `init`; `lexiseg import` with --profile sets both")
        return self


class PredictSettings(Block):
    """`tcl.predict`: from a picture to soft masks. The defaults are those of a model folder that says nothing."""

    short_side: int | None = Field(default=None, ge=1)
    max_side: int | None = Field(default=None, ge=1)
    window: int | None = Field(default=None, ge=1)
    stride: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> PredictSettings:
        if (self.window is None) != (self.stride is None):
            raise ValueError("`window` and `stride` go together: both numbers, or both null")
        if self.window is not None and self.stride is not None and self.stride > self.window:
            raise ValueError("`stride` is at most `window`, or pixels between windows would be seen by none")
        return self

    def card(self) -> dict[str, Any]:
        """The fields of a protocol card that inference decides."""
        return {"sliding_window": self.window, "window_stride": self.stride, "short_side": self.short_side}


class RefineSettings(Block):
    """`tcl.refine`: from soft masks to those that are compared. The defaults are those of the authors' evaluation."""

    pamr_iterations: Annotated[int, Sweep(0, 10)] = Field(default=10, ge=0)
    knowledge_weight: Annotated[float, Sweep(0, 0.6)] = Field(default=0.3, ge=0, le=1)
    background_threshold: Annotated[float | None, Sweep(0.2, 0.7)] = Field(default=None, gt=0, lt=1)

    def card(self) -> dict[str, Any]:
        """The fields of a protocol card that refinement decides."""
        done = {"pamr_iterations": self.pamr_iterations, "knowledge_weight": self.knowledge_weight}
        return {"refinement": done if any(done.values()) else "none", "background_threshold": self.background_threshold}


class TCLSettings(Block):
    """The block `tcl`."""

    run: bool
    model: ModelSettings
    loss: LossSettings
    train: TrainSettings
    predict: PredictSettings
    refine: RefineSettings
