"""Samples examined by several processes, given back in order: the result does not depend on their number.

Where LEXISEG_RAY names a cluster, they are those of its machines.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

from lexiseg import cluster
from lexiseg.data.adapters import open_adapter
from lexiseg.data.adapters.base import Adapter, RawSample
from lexiseg.data.adapters.files import pixel_limit
from lexiseg.data.rows import Examined, examine
from lexiseg.errors import DataError

_CHUNK = 64
"""Samples per task: large enough to hide the cost of passing it on, small enough for memory and progress."""


@dataclass(frozen=True)
class Source:
    """Where samples come from; small enough to be sent to a process with every chunk."""

    adapter: str
    folder: Path
    split: str
    max_pixels: int
    class_count: int
    fold: int | None = None


class Pool:
    """Examines samples in `workers` processes; with one, in this process.

    Example:
        with Pool(workers=2) as pool:
            for chunk in pool.examine(source, samples):
                ...
    """

    def __init__(self, *, workers: int) -> None:
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None

    def examine(self, source: Source, samples: list[RawSample]) -> Iterator[list[Examined]]:
        """Examine the samples of a split in chunks, in order.

        Args:
            source: the split.
            samples: its samples as this process sees them; other processes list them themselves.
        """
        starts = range(0, len(samples), _CHUNK)
        if cluster.address() is not None:
            yield from _on_ray(source, starts)
            return
        if self._workers == 1 or len(starts) <= 1:
            yield from (_examine(source, samples[start : start + _CHUNK]) for start in starts)
            return
        if self._executor is None:
            # Spawned, not forked: a fork of a process with threads (torch, Arrow) can hang.
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self._workers, mp_context=context, initializer=_end_with_parent)
        waiting: deque[Future[list[Examined]]] = deque()
        try:
            for start in starts:
                waiting.append(self._executor.submit(_examine_in_worker, source, start))
                if len(waiting) > 4 * self._workers:  # bounds what is held in memory
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                found=f"a process that read the split `{source.split}` was killed, most likely for memory",
                allowed="about 10 bytes of memory per pixel of the largest picture in each process",
                fix="lower `data.workers` or `data.max_pixels`",
            ) from error

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)


def _on_ray(source: Source, starts: range) -> Iterator[list[Examined]]:
    ray = cluster.connect()
    task = ray.remote(num_cpus=1)(_examine_in_worker)
    source = replace(source, folder=source.folder.resolve())  # processes of Ray work in a folder of their own
    limit = 4 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting: deque[Any] = deque()
    try:
        for start in starts:
            waiting.append(task.remote(source, start))
            if len(waiting) > limit:  # bounds what is held in memory
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())
    except ray.exceptions.RayTaskError:
        raise  # an error of the task itself
    except ray.exceptions.RayError as error:
        raise DataError(
            found=f"a process of the cluster that read the split `{source.split}` was lost ({type(error).__name__})",
            allowed=f"machines that see {source.folder}, and about 10 bytes of memory per pixel of the largest picture",
            fix="look after the machines, or lower `data.max_pixels`; then the same command again",
        ) from error


def _examine(source: Source, samples: list[RawSample]) -> list[Examined]:
    with pixel_limit(source.max_pixels):
        return [examine(sample, split=source.split, class_count=source.class_count) for sample in samples]


def _examine_in_worker(source: Source, start: int) -> list[Examined]:
    return _examine(source, _samples(source)[start : start + _CHUNK])


# The two caches live as long as a worker, that is one run of prepare, during which raw files stay as they are.
@lru_cache(maxsize=1)
def _adapter(name: str, folder: Path, fold: int | None) -> Adapter:
    return open_adapter(name, folder, fold=fold)


@lru_cache(maxsize=1)
def _samples(source: Source) -> list[RawSample]:
    return list(_adapter(source.adapter, source.folder, source.fold).samples(source.split))


def _end_with_parent() -> None:
    # A killed parent would leave its workers waiting for ever; this thread ends them with it.
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
