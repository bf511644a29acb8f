"""What a server takes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for, and how many may wait.

    Attributes:
        pixels: of all pictures of a request together.
        labels: of a request.
        label_characters: of one label.
        body_bytes: of a request's body.
        pictures: of a request.
        queue: requests that may wait while others are computed.
        calls: requests that are computed at once.
        body_seconds: for a request's body to arrive.
    """

    pixels: int = 16_000_000
    labels: int = 1_000
    label_characters: int = 300
    body_bytes: int = 32_000_000
    pictures: int = 16
    queue: int = 64
    # While one is at its network, the other decodes or writes.
    calls: int = 2
    body_seconds: float = 60.0


LIMITS = Limits()
