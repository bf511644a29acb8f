"""The block `encode` of params.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lexiseg.settings import Block, Sweep

Readout = Literal["project", "add", "ignore"]
"""What becomes of a ViT's class token, see `lexiseg.encoders.pyramid.Reassemble`."""


class PretrainSettings(Block):
    """Pretraining of the tiny CLIP on captions."""

    steps: int = Field(ge=1)
    lr: Annotated[float, Sweep(5e-4, 2e-3, log=True)] = Field(gt=0)
    warmup: int = Field(ge=0)
    weight_decay: float = Field(ge=0)
    max_scale: float = Field(gt=0)
    scenes: str
    iconic: str
    size: int | None = Field(ge=8)
    iconic_share: float = Field(ge=0, le=1)
    iconic_batch: int = Field(ge=1)
    scene_batch: int = Field(ge=1)
    vision_layers: int = Field(ge=2)
    text_layers: int = Field(ge=1)
    context_length: int = Field(ge=3)


class ClipSettings(Block):
    """Where the image-text pair comes from."""

    source: Literal["pretrain", "open_clip", "model", "none"]
    model: str | None
    weights: str | None
    sha256: str | None
    licence: str | None

    @model_validator(mode="after")
    def _complete(self) -> ClipSettings:
        if self.source == "open_clip" and not (self.model and self.weights and self.licence):
            raise ValueError("source open_clip needs `model`, `weights` (a file or a tag) and `licence`")
        if self.source == "open_clip" and Path(str(self.weights)).suffix and not self.sha256:
            raise ValueError("a weight file needs its `sha256`; `lexiseg weights add` prints it")
        if self.source == "model" and not (self.weights and self.sha256):
            raise ValueError(
                "source model needs `weights`, a model folder, and its `sha256` (`lexiseg import --profile` sets both)"
            )
        return self


class TextSettings(Block):
    """What turns labels into vectors."""

    source: Literal["clip", "table", "sentence_transformers", "none"]
    path: str | None
    sha256: str | None
    licence: str | None
    templates: Literal["vocabulary", "bare"]
    stand_ins: dict[str, str]

    @model_validator(mode="after")
    def _complete(self) -> TextSettings:
        if self.source in ("table", "sentence_transformers") and not (self.path and self.licence):
            raise ValueError(f"source {self.source} needs `path` and `licence`")
        if self.source == "table" and not self.sha256:
            raise ValueError("a table needs its `sha256`; `lexiseg weights add` prints it")
        return self


class BackboneSettings(Block):
    """Which image backbone a method may start from."""

    source: Literal["clip", "timm", "random", "none"]
    name: str | None
    weights: str | None
    sha256: str | None
    licence: str | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    options: dict[str, str | int | float | bool]

    @model_validator(mode="after")
    def _complete(self) -> BackboneSettings:
        if self.source == "timm" and not (self.name and self.weights and self.licence):
            raise ValueError("source timm needs `name`, `weights` (a file, or `hub`) and `licence`")
        if self.source == "timm" and self.weights != "hub" and not self.sha256:
            raise ValueError("a weight file needs its `sha256`; `lexiseg weights add` prints it")
        if self.source == "random" and not self.name:
            raise ValueError("source random needs `name`")
        return self


class TrunkSettings(Block):
    """The frozen trunk of unsupervised methods."""

    source: Literal["pretrain", "timm", "backbone", "model", "none"]
    name: str | None
    weights: str | None
    sha256: str | None
    licence: str | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    options: dict[str, str | int | float | bool]
    facet: Literal["features", "keys"]
    positions: Literal["timm", "dino"]
    stride: int = Field(ge=1)

    @model_validator(mode="after")
    def _complete(self) -> TrunkSettings:
        if self.source == "timm" and not (self.name and self.weights and self.licence):
            raise ValueError("source timm needs `name`, `weights` (a file, or `hub`) and `licence`")
        if self.source == "timm" and self.weights != "hub" and not self.sha256:
            raise ValueError("a weight file needs its `sha256`; `lexiseg weights add` prints it")
        if self.source == "model" and not (self.weights and self.sha256):
            raise ValueError(
                "source model needs `weights`, a model folder, and its `sha256` (`lexiseg import --profile` sets both)"
            )
        return self


class SelfSupervisedSettings(Block):
    """Pretraining of the tiny trunk on pictures alone."""

    split: str
    pictures: int = Field(ge=2)
    size: int | None = Field(ge=16)
    crop: int = Field(ge=16, multiple_of=8)
    steps: int = Field(ge=1)
    batch: int = Field(ge=2)
    lr: Annotated[float, Sweep(3e-4, 3e-3, log=True)] = Field(gt=0)
    warmup: int = Field(ge=0)
    weight_decay: float = Field(ge=0)
    layers: int = Field(ge=1)
    prototypes: Annotated[int, Sweep(64, 1024, log=True)] = Field(ge=2)
    picture_weight: Annotated[float, Sweep(0, 1)] = Field(ge=0)
    student_temperature: Annotated[float, Sweep(0.05, 0.2, log=True)] = Field(gt=0)
    teacher_temperature: Annotated[float, Sweep(0.03, 0.1, log=True)] = Field(gt=0)
    momentum: float = Field(ge=0, lt=1)
    masked: Annotated[float, Sweep(0.1, 0.5)] = Field(ge=0, lt=1)
    gain: Annotated[float, Sweep(0, 0.4)] = Field(ge=0, lt=1)
    shift: Annotated[float, Sweep(0, 0.15)] = Field(ge=0, lt=1)
    noise: float = Field(ge=0, lt=1)

    @model_validator(mode="after")
    def _fits(self) -> SelfSupervisedSettings:
        if self.size is not None and self.size < self.crop:
            raise ValueError(f"`crop` ({self.crop}) is at most `size` ({self.size})")
        return self


class EncodeSettings(Block):
    """The block `encode`."""

    clip: ClipSettings
    text: TextSettings
    backbone: BackboneSettings
    pretrain: PretrainSettings
    trunk: TrunkSettings
    self_supervised: SelfSupervisedSettings

    @model_validator(mode="after")
    def _fits_together(self) -> EncodeSettings:
        if self.trunk.source == "backbone" and self.backbone.source in ("clip", "none"):
            raise ValueError("trunk.source backbone needs backbone.source timm or random")
        return self
