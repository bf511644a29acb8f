"""STEGO's correspondence loss and its gradient: one product for all kinds of pairs beside the equations as they read.

    python benchmarks/stego_loss.py --threads 1 --out

The peer (plain.py) samples maps by `grid_sample`, and correlates and centres every kind of pairs by itself, as the
authors' code does. Loss and gradients are compared before anything is timed. Maps lie in memory as a ViT's tokens do,
channels last; `--layout planes` takes the other order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lexiseg.environment import keep_memory
from lexiseg.methods.stego.loss import correspondence_terms, random_points, super_permutation

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import arguments_for, compare, table, use_threads, write_result
from benchmarks.plain import plain_correspondence_loss

SHIFTS, WEIGHTS = (0.18, 0.12, 0.46), (0.67, 0.25, 0.63)
NEGATIVES = 5
TOLERANCE = 1e-4  # of the largest value


def material(*, batch: int, channels: int, side: int, dim: int, points: int, layout: str) -> dict[str, Any]:
    """Random maps, points and partners."""
    rng = torch.Generator().manual_seed(0)
    memory = torch.channels_last if layout == "tokens" else torch.contiguous_format

    def maps(depth: int) -> Tensor:
        return torch.randn(batch, depth, side, side, generator=rng).to(memory_format=memory)

    partners = [super_permutation(torch.randperm(batch, generator=rng)) for _ in range(NEGATIVES)]
    return {
        "features": maps(channels),
        "codes": maps(dim).requires_grad_(),
        "neighbour_features": maps(channels),
        "neighbour_codes": maps(dim).requires_grad_(),
        "points": random_points(batch, points, generator=rng),
        "partner_points": random_points(batch, points, generator=rng),
        "partners": torch.stack(partners),
    }


def ours(given: dict[str, Any]) -> Tensor:
    """By lexiseg."""
    terms = correspondence_terms(**given, shifts=SHIFTS)
    return WEIGHTS[0] * terms.self_ + WEIGHTS[1] * terms.knn + WEIGHTS[2] * terms.random


def plain(given: dict[str, Any]) -> Tensor:
    """By the equations as they read."""
    return plain_correspondence_loss(**given, shifts=SHIFTS, weights=WEIGHTS)


def step(loss: Callable[[dict[str, Any]], Tensor], given: dict[str, Any]) -> list[Tensor]:
    """Loss and gradients of both codes."""
    leaves = given["codes"], given["neighbour_codes"]
    value = loss(given)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def main(argv: Sequence[str] | None = None) -> None:
    """Check that losses and gradients agree, then time."""
    parser = arguments_for(__doc__, repeats=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--side", type=int, default=28, help="cells per side of the maps")
    parser.add_argument("--dim", type=int, default=70, help="channels of the codes")
    parser.add_argument("--points", type=int, default=121)
    parser.add_argument("--layout", choices=["tokens", "planes"], default="tokens")
    given = parser.parse_args(argv)
    use_threads(given.threads)
    keep_memory()
    names = ("batch", "channels", "side", "dim", "points", "layout")
    made = material(**{name: getattr(given, name) for name in names})
    pairs = zip(step(ours, made), step(plain, made), strict=True)
    worst = max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)
    if worst > TOLERANCE:
        raise AssertionError(f"loss or gradients differ by {worst} of the largest")
    runs = {"lexiseg": lambda: step(ours, made), "plain": lambda: step(plain, made)}
    timed = compare(runs, repeats=given.repeats, title="loss")
    print(table(timed, unit="step"))
    write_result("stego_loss", [{"largest_difference": worst, **timed}], given=given, precision="fp32")


if __name__ == "__main__":
    main()
