"""Latency and memory of a model folder: `python -m lexiseg.cost MODEL PREPARED SPLIT`, a process of its own."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from lexiseg import environment  # noqa: F401  first: it sets what libraries read when they are imported

import torch  # isort: skip

from lexiseg.data.dataset import PreparedSplit
from lexiseg.history import peak_memory
from lexiseg.inference import load

WARM_UP, PICTURES = 3, 20


def measure_costs(model: Path, prepared: Path, split: str) -> dict[str, float]:
    """What segmenting pictures of a split one by one takes.

    Returns:
        latency: median of milliseconds per picture, labels and refinement included, after a warm-up. memory: MB that
        this process held at its largest, and of a GPU's.
    """
    loaded, data = load(model), PreparedSplit(prepared, split)
    # A model of clusters has names of its own.
    labels = None if loaded.own_labels else list(data.vocabulary.names)
    seconds = []
    for number in range(WARM_UP + PICTURES):
        image = data.image(number % len(data))
        start = time.perf_counter()
        loaded.segment(image, labels)
        seconds.append(time.perf_counter() - start)
    memory = peak_memory() + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
    return {"latency": round(1000 * statistics.median(seconds[WARM_UP:]), 3), "memory": round(memory / 1e6, 1)}


if __name__ == "__main__":
    print(json.dumps(measure_costs(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))
