"""Nearest neighbours of pictures by cosine, exactly: lexiseg's blocks beside scikit-learn's brute force.

    python benchmarks/neighbours.py --out

Both get the same unit vectors. That similarities agree is checked first; neighbours that are as similar to the last
digits may change places. Memory is that of a fresh process that searches once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lexiseg.environment import keep_memory
from lexiseg.methods.stego.neighbours import nearest_neighbours

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import arguments_for, compare, peak_memory, table, use_threads, write_result

TOLERANCE = 1e-5  # of cosines


def material(pictures: int, channels: int) -> Tensor:
    """Unit vectors (pictures, channels) around a hundred directions."""
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(100, channels, generator=rng)
    chosen = torch.randint(100, (pictures,), generator=rng)
    return F.normalize(centres[chosen] + torch.randn(pictures, channels, generator=rng), dim=1)


def ours(vectors: Tensor, count: int) -> Tensor:
    """Cosines (pictures, count + 1) by lexiseg."""
    return nearest_neighbours(vectors, count=count)[1]


def scikit_learn(vectors: Tensor, count: int) -> Tensor:
    """The same by scikit-learn."""
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=count + 1, metric="cosine", algorithm="brute").fit(vectors.numpy())
    return 1 - torch.from_numpy(search.kneighbors(vectors.numpy())[0]).float()


CANDIDATES: dict[str, Callable[[Tensor, int], Tensor]] = {"lexiseg": ours, "scikit-learn": scikit_learn}


def once(name: str, pictures: int, channels: int, count: int, threads: int | None) -> None:
    """Search once; runs in a process of its own."""
    use_threads(threads)
    CANDIDATES[name](material(pictures, channels), count)


def main(argv: Sequence[str] | None = None) -> None:
    """Check that similarities agree, then time."""
    parser = arguments_for(__doc__, repeats=5)
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--count", type=int, default=30)
    given = parser.parse_args(argv)
    use_threads(given.threads)
    keep_memory()
    vectors = material(given.pictures, given.channels)
    worst = float((ours(vectors, given.count) - scikit_learn(vectors, given.count)).abs().max())
    if worst > TOLERANCE:
        raise AssertionError(f"the similarities differ by {worst}")
    runs = {name: partial(search, vectors, given.count) for name, search in CANDIDATES.items()}
    timed = compare(runs, repeats=given.repeats, title="neighbours")
    case = {name: getattr(given, name) for name in ("pictures", "channels", "count", "threads")}
    memory = {name: peak_memory("neighbours:once", name=name, **case) for name in CANDIDATES}
    print(table(timed, unit="search"))
    print("  work in memory: " + ", ".join(f"{n} {m['work_bytes'] / 1e6:.0f} MB" for n, m in memory.items()))
    rows = [{"largest_difference": worst, "memory": memory, **timed}]
    write_result("neighbours", rows, given=given, precision="fp32", peers=("scikit-learn",))


if __name__ == "__main__":
    main()
