"""The block `promotion` of params.yaml, which says what each value does."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lexiseg.settings import Block

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class PromotionSettings(Block):
    """What a registered version has to show before it becomes production."""

    split: str | None
    floors: dict[str, dict[str, Share]]
    class_floors: dict[str, dict[str, Share]]
    confidence: float = Field(ge=0.5, lt=1.0)
    margin: float = Field(gt=-1.0, lt=1.0)
    least_pictures: int = Field(ge=1)
    resamples: int = Field(ge=200, le=100_000)
    same_inference: bool
    latency: float = Field(gt=0.0)
    memory: float = Field(gt=0.0)
    use: Literal["commercial", "research"]
