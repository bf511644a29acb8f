"""PAMR: lexiseg's passes over shifted views beside unfolded neighbourhoods.

    python benchmarks/pamr.py --threads 1 --out

The peer (plain.py) unfolds the 48 neighbours of every pixel in every iteration, for one mask after the other. Another
peer does so for all masks at once, as the authors' code does, which takes as many times the memory. All get the same
picture and masks, at the size of TCL's mask grid; that the refined masks agree is checked before anything is timed.
Memory is that of a fresh process that refines once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lexiseg.environment import keep_memory
from lexiseg.layers.pamr import DILATIONS
from lexiseg.layers.pamr import pamr as by_views

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import arguments_for, compare, peak_memory, table, use_threads, write_result
from benchmarks.plain import plain_pamr

ITERATIONS = 10
TOLERANCE = 1e-4  # of masks that lie in 0..1


def material(classes: int, side: int) -> tuple[Tensor, Tensor]:
    """A picture (1, 3, side, side) of smooth noise, and masks (1, classes, side, side) in 0..1."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 3, side // 8, side // 8, generator=rng)
    image = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return image + 0.1 * torch.randn(image.shape, generator=rng), torch.rand(1, classes, side, side, generator=rng)


def ours(image: Tensor, masks: Tensor) -> Tensor:
    """By lexiseg."""
    return by_views(image, masks, iterations=ITERATIONS)


def all_at_once(image: Tensor, masks: Tensor) -> Tensor:
    """By unfolding all masks together."""
    return plain_pamr(image, masks, iterations=ITERATIONS, dilations=DILATIONS)


def one_by_one(image: Tensor, masks: Tensor) -> Tensor:
    """By unfolding one mask after the other."""
    return torch.cat([all_at_once(image, mask) for mask in masks.split(1, dim=1)], dim=1)


CANDIDATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lexiseg": ours,
    "plain, one by one": one_by_one,
    "plain, all at once": all_at_once,
}


@torch.inference_mode()
def once(name: str, classes: int, side: int, threads: int | None) -> None:
    """Refine once; runs in a process of its own."""
    use_threads(threads)
    CANDIDATES[name](*material(classes, side))


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    """Check that the masks agree, then time."""
    parser = arguments_for(__doc__, repeats=7)
    parser.add_argument("--classes", type=int, nargs="+", default=[21, 59])
    parser.add_argument("--side", type=int, default=112, help="of picture and masks in pixels")
    given = parser.parse_args(argv)
    use_threads(given.threads)
    keep_memory()  # as in all of lexiseg's commands; it saves the peers more, whose arrays are larger
    rows = []
    for classes in given.classes:
        image, masks = material(classes, given.side)
        found = {name: refine(image, masks) for name, refine in CANDIDATES.items()}
        worst = max(float((value - found["lexiseg"]).abs().max()) for value in found.values())
        if worst > TOLERANCE:
            raise AssertionError(f"{classes} classes: the masks differ by {worst}")
        runs = {name: partial(refine, image, masks) for name, refine in CANDIDATES.items()}
        timed = compare(runs, repeats=given.repeats, title=f"{classes} classes")
        case = {"classes": classes, "side": given.side, "threads": given.threads}
        memory = {name: peak_memory("pamr:once", name=name, **case) for name in CANDIDATES}
        rows.append({"classes": classes, "largest_difference": worst, "memory": memory, **timed})
        print(f"{classes} classes\n{table(timed, unit='picture')}")
        print("  work in memory: " + ", ".join(f"{n} {m['work_bytes'] / 1e6:.0f} MB" for n, m in memory.items()))
    write_result("pamr", rows, given=given, precision="fp32")


if __name__ == "__main__":
    main()
