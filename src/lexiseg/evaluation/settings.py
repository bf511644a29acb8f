"""The block `evaluate` of params.yaml, which says what each value does."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from lexiseg.evaluation.protocol import protocol_names
from lexiseg.settings import Block

Side = Annotated[int, Field(ge=1)]


def _known(name: str) -> str:
    if name not in protocol_names():
        raise ValueError(f"one of the cards: {', '.join(protocol_names())}")
    return name


class EvaluateSettings(Block):
    """How predictions become numbers and pictures; the same for every method."""

    protocol: Annotated[str, AfterValidator(_known)]
    splits: tuple[str, ...] = Field(min_length=1)
    pictures: int = Field(ge=0)
    boundary_tolerance: float = Field(gt=0.0, lt=1.0)
    episodes: tuple[Side, Side] | None
