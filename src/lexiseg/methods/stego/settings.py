"""The block `stego` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from lexiseg.evaluation.protocol import protocol_names
from lexiseg.settings import Block, Sweep

Baseline = Literal["raw", "pca", "whitened"]


def _known_card(name: str) -> str:
    if name not in protocol_names():
        raise ValueError(f"one of the cards: {', '.join(protocol_names())}")
    return name


def _start(init: str) -> str:
    if init != "random" and "/" not in init:
        raise ValueError("random, or a model folder such as models/stego")
    return init


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) != len(names):
        raise ValueError("each of them once")
    return names


class FeatureSettings(Block):
    """`stego.features`: which pictures are learned from, and in what pieces."""

    split: str
    pictures: int | None = Field(ge=1)
    crop: int | None = Field(ge=1)
    five_crop: bool
    filter: Literal["bilinear", "nearest"]


class NeighbourSettings(Block):
    """`stego.neighbours`: partners that look alike."""

    count: Annotated[int, Sweep(3, 30)] = Field(ge=1)
    backend: Literal["exact", "faiss"]


class ModelSettings(Block):
    """`stego.model`: the segmentation head."""

    init: Annotated[str, AfterValidator(_start)]
    sha256: str | None
    head: Literal["nonlinear", "linear", "none", "pca", "whitened"]
    dim: Annotated[int, Sweep(32, 100)] = Field(ge=1)
    tokens: int = Field(ge=2)
    dropout: float = Field(ge=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> ModelSettings:
        if (self.init != "random") != (self.sha256 is not None):
            raise ValueError("`sha256` goes with a model folder in `init`; `lexiseg import` with --profile sets both")
        return self


class LossSettings(Block):
    """`stego.loss`: weights, shifts and forms of the correspondence loss (paper section 3.2)."""

    self: Annotated[float, Sweep(0.1, 1)] = Field(ge=0)
    knn: Annotated[float, Sweep(0.1, 1)] = Field(ge=0)
    random: Annotated[float, Sweep(0.1, 1)] = Field(ge=0)
    shifts: Literal["otsu", "quantile", "fixed"]
    self_shift: Annotated[float | None, Sweep(0.05, 0.8)]
    knn_shift: Annotated[float | None, Sweep(0.05, 0.8)]
    random_shift: Annotated[float | None, Sweep(0.1, 1)]
    centring: Literal["paper", "code", "none"]
    clamp: bool
    stabilise: bool
    points: int = Field(ge=1)
    negatives: int = Field(ge=1)
    drop_features: bool

    @model_validator(mode="after")
    def _consistent(self) -> LossSettings:
        given = [value is not None for value in (self.self_shift, self.knn_shift, self.random_shift)]
        if given != [self.shifts == "fixed"] * 3:
            raise ValueError("`shifts: fixed` needs self_shift, knn_shift and random_shift; any other rule finds them")
        if not (self.self or self.knn or self.random):
            raise ValueError("at least one weight above 0: self, knn or random")
        return self


class TrainSettings(Block):
    """`stego.train`: recipe."""

    steps: int = Field(ge=0)
    batch: int = Field(ge=2)
    lr: Annotated[float, Sweep(1e-4, 2e-3, log=True)] = Field(gt=0)
    alarm: float = Field(gt=0, le=1)
    precision: Literal["32-true", "bf16-mixed"]


class ProbeSettings(Block):
    """`stego.probe`: what reads classes out of codes."""

    seed: int = Field(ge=0, lt=2**31)
    clusters: Annotated[int | None, Sweep(5, 60)] = Field(ge=2)
    extra: int = Field(ge=0)
    kind: Literal["kmeans", "gradient", "model"]
    tokens: int = Field(ge=2)
    restarts: int = Field(ge=1)
    iterations: int = Field(ge=1)
    alpha: float | None = Field(gt=0)
    linear: bool
    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    lr: float = Field(gt=0)


class PredictSettings(Block):
    """`stego.predict`: from a picture to codes. The defaults are those of a model folder that says nothing."""

    flip: bool = False
    crop: int | None = Field(default=None, ge=1)
    filter: Literal["bilinear", "nearest"] = "bilinear"
    max_side: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> PredictSettings:
        if self.crop is not None and self.max_side is not None:
            raise ValueError("`crop` and `max_side` both set the size of a picture: one of them is null")
        return self

    def card(self) -> dict[str, Any]:
        """The fields of a protocol card that inference decides."""
        # Without a crop the filter decides nothing.
        crop_filter = "bilinear" if self.crop is None else self.filter
        return {
            "flips": self.flip,
            "centre_crop": self.crop,
            "crop_filter": crop_filter,
            "max_side": self.max_side,
        }


class RefineSettings(Block):
    """`stego.refine`: the dense CRF. The defaults are those of the authors' evaluation."""

    crf_iterations: Annotated[int, Sweep(0, 10)] = Field(default=10, ge=0)
    gaussian_width: float = Field(default=1.0, gt=0)
    gaussian_weight: float = Field(default=3.0, ge=0)
    bilateral_width: Annotated[float, Sweep(10, 100)] = Field(default=67.0, gt=0)
    bilateral_colour: Annotated[float, Sweep(3, 15)] = Field(default=3.0, gt=0)
    bilateral_weight: Annotated[float, Sweep(1, 10)] = Field(default=4.0, ge=0)

    def card(self) -> dict[str, Any]:
        """The fields of a protocol card that refinement decides."""
        return {"refinement": self.model_dump() if self.crf_iterations else "none"}


class MatchSettings(Block):
    """`stego.match`: how clusters get the names of classes for evaluation."""

    split: str | None
    unmatched: Literal["error", "majority"]

    def card(self, *, clusters: int) -> dict[str, Any]:
        """The field of a protocol card, for a number of clusters."""
        matching = {"split": self.split or "evaluated", "unmatched": self.unmatched, "clusters": clusters}
        return {"matching": matching}


class StegoSettings(Block):
    """The block `stego`."""

    run: bool
    baselines: Annotated[tuple[Baseline, ...], AfterValidator(_each_once)]
    protocol: Annotated[str, AfterValidator(_known_card)]
    features: FeatureSettings
    neighbours: NeighbourSettings
    model: ModelSettings
    loss: LossSettings
    train: TrainSettings
    probe: ProbeSettings
    predict: PredictSettings
    refine: RefineSettings
    match: MatchSettings

    @model_validator(mode="after")
    def _consistent(self) -> StegoSettings:
        if self.probe.kind == "model" and self.model.init == "random":
            raise ValueError("`probe.kind: model` takes the probes of a model folder: name it in `model.init`")
        learns = self.model.head in ("nonlinear", "linear")
        if learns and self.model.init == "random" and not self.train.steps:
            raise ValueError("`train.steps: 0` leaves a random head: name a model folder in `model.init`, or train")
        if not learns and self.train.steps:
            raise ValueError(f"`model.head: {self.model.head}` has nothing to learn: set `train.steps: 0`")
        return self
