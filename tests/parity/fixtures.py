"""What the runners of all methods need of a fixture."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def close(actual: Tensor, expected: Tensor, tolerance: Mapping[str, float]) -> None:
    """Compare within the tolerance that the fixture names."""
    torch.testing.assert_close(actual, expected, atol=tolerance.get("atol", 0.0), rtol=tolerance.get("rtol", 0.0))


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
