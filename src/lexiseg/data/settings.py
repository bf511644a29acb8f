"""The block `data` of params.yaml."""

from __future__ import annotations

from pydantic import Field

from lexiseg.settings import Block


class DataSettings(Block):
    """Which data set, how it is read, and what validate accepts."""

    name: str = Field("world", pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """The data set: the folder data/<name>, an output in data.dvc."""

    adapter: str = "world"
    """How the raw files are laid out: world, camvid or folder."""

    workers: int = Field(2, ge=1, le=256)
    """Processes that read and render samples in prepare. Up: faster on more cores; the result is the same."""

    max_pixels: int = Field(50_000_000, ge=1, le=150_000_000)
    """Largest width x height of a picture or mask. A larger one is not decoded (it may be a decompression bomb)
    but reported. One pixel costs 3 bytes of memory while it is read. Pillow refuses more than 179 million."""

    min_side: int = Field(16, ge=1)
    """Shortest side of a picture in pixels that validate accepts."""

    max_ignored_share: float = Field(1.0, gt=0.0, le=1.0)
    """Share of a mask's pixels without a label has to be below this; 1 = at least one pixel is labelled."""

    max_caption_words: int = Field(200, ge=1)
    """Longest caption in words. Text encoders cut off what is beyond their context (77 tokens for CLIP)."""

    required_splits: tuple[str, ...] = ("train", "val", "test")
    """Splits that must have at least one readable sample."""
