"""The block `data` of params.yaml, which says what each value does."""

from __future__ import annotations

from pydantic import Field

from lexiseg.settings import Block


class DataSettings(Block):
    """Which data set, how it is read, and what validate accepts."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    adapter: str
    fold: int | None = Field(ge=0, le=3)
    unseen: tuple[str, ...]
    workers: int = Field(ge=1, le=256)
    max_pixels: int = Field(ge=1, le=150_000_000)  # Pillow itself refuses more than 179 million
    min_side: int = Field(ge=1)
    max_ignored_share: float = Field(gt=0.0, le=1.0)
    max_caption_words: int = Field(ge=1)
    required_splits: tuple[str, ...]
