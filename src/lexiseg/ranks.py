"""Trainings that several processes share, each with an equal part of every batch (DistributedDataParallel).

A stage that declares the parameter `devices` runs in that many processes at once, its ranks. All do the same, from
reading their inputs on; what differs is the part of a batch that each makes and learns from, and that rank 0 alone
writes: outputs, checkpoints, what is seen on the terminal. The others' outputs are thrown away.

The ranks are processes of this machine, the first one the stage's own; or, where LEXISEG_RAY names a cluster, workers
of Ray Train on its machines.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from lexiseg import cluster
from lexiseg.errors import LexisegError, StageError, error_in
from lexiseg.storage import write_json

_TOGETHER = "LEXISEG_TOGETHER"  # set in ranks alone: WORLD_SIZE may be of whoever started us
LAST_WORDS = 60.0  # seconds for the other ranks to end after the first


@dataclass(frozen=True)
class Rank:
    """What a process has to know to take part; plain values, to be sent.

    Attributes:
        stage: name in dvc.yaml.
        values: the plain values of all settings.
        declared: dotted keys that the stage may see.
        inputs: paths by the names of `Node.inputs`.
        checkpoints: folder that trainings go on from.
        outputs: where rank 0 writes.
    """

    stage: str
    values: dict[str, Any]
    declared: list[str]
    inputs: dict[str, str]
    checkpoints: str
    outputs: str


def world_size() -> int:
    """How many processes share a training here; 1 outside of one that is shared."""
    return int(os.environ["WORLD_SIZE"]) if _TOGETHER in os.environ else 1


def rank() -> int:
    """The number of this process among them."""
    return int(os.environ["RANK"]) if _TOGETHER in os.environ else 0


def share(count: int) -> range:
    """The positions of a batch of `count` that this process makes and learns from.

    Raises:
        StageError: the batch cannot be divided equally.
    """
    size = world_size()
    if count % size:
        raise StageError(
            found=f"a batch of {count} for `devices: {size}`",
            allowed="a batch that is a multiple of `devices`",
            fix="change one of them in params.yaml",
        )
    part = count // size
    return range(rank() * part, (rank() + 1) * part)


def run_together(job: Rank, count: int, *, here: Callable[[], None], threads: int) -> None:
    """Run a stage in `count` processes.

    Args:
        job: the stage.
        count: of processes.
        here: does the stage in this process.
        threads: cores that each takes of a cluster.

    Raises:
        LexisegError: the stage's own error, in whichever rank it came up; or a rank was lost.
    """
    import torch  # after the process has said how many threads it takes

    if cluster.address() is None and torch.cuda.is_available() and torch.cuda.device_count() < count:
        raise StageError(
            found=f"`devices: {count}` on a machine with {torch.cuda.device_count()} GPU(s)",
            allowed=f"a GPU for each, here or on a cluster ({cluster.VARIABLE}); CUDA_VISIBLE_DEVICES= hides them",
            fix="lower `devices` in params.yaml, or name a cluster",
        )
    if cluster.address() is not None:
        _by_ray_train(job, count, threads=threads)
    else:
        with _others(job, count):
            here()


@contextmanager
def _others(job: Rank, count: int) -> Iterator[None]:
    """Ranks 1 to `count` - 1 as processes, while this one is rank 0."""
    with tempfile.TemporaryDirectory(prefix="lexiseg-ranks-") as scratch:
        file = Path(scratch) / "rank.json"
        write_json(file, asdict(job))
        common = {
            _TOGETHER: "1",
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
        others: list[tuple[subprocess.Popen, Path]] = []
        before = {name: os.environ.get(name) for name in (*common, "RANK", "LOCAL_RANK")}
        os.environ.update(common)
        try:
            for number in range(1, count):
                log = Path(scratch) / f"rank-{number}.log"
                with log.open("wb") as stream:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "lexiseg.stages.rank", str(file)],
                        env=os.environ | {"RANK": str(number), "LOCAL_RANK": str(number)},
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                    )
                others.append((process, log))
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
            ended = threading.Event()
            watching = threading.Thread(target=_end_with, args=([process for process, _ in others], ended), daemon=True)
            watching.start()
            try:
                yield
            except Exception as error:
                _blame(others, error)
                raise
            finally:
                ended.set()
        finally:
            _leave_group()
            for process, _ in others:
                _end(process)
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _blame(others: list[tuple[subprocess.Popen, Path]], error: Exception) -> None:
    """Raise what another rank ended in, where this one only noticed that it was gone."""
    if isinstance(error, LexisegError):
        return
    for process, log in others:
        code = process.poll()
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            own = error_in(lines)
            if own is not None:
                raise own from error
            raise StageError(
                found=f"another process of the training ended with exit code {code}: "
                + (lines[-1] if lines else "it said nothing"),
                allowed="processes that all live until the training ends",
                fix="lower `devices` or the batch where memory was short; `dvc repro` goes on from the last checkpoint",
            ) from error


def _end_with(processes: list[subprocess.Popen], ended: threading.Event) -> None:
    """End the other ranks where one of them died: those that wait for it would wait for half an hour."""
    while not ended.wait(1.0):
        if any(process.poll() not in (None, 0) for process in processes):
            for process in processes:
                process.kill()
            return


def _end(process: subprocess.Popen) -> None:
    try:
        process.wait(timeout=LAST_WORDS if process.poll() is None and not sys.exc_info()[0] else 1.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _leave_group() -> None:
    if "torch" in sys.modules:
        import torch.distributed as distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def _by_ray_train(job: Rank, count: int, *, threads: int) -> None:
    ray = cluster.connect()
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    gpu = ray.cluster_resources().get("GPU", 0) >= count
    cluster.require(ray, count=count, cpus=threads, gpus=1 if gpu else 0)
    resources = {"CPU": threads} | ({"GPU": 1} if gpu else {})
    trainer = TorchTrainer(
        _ray_rank,
        train_loop_config={"job": asdict(job), "gpu": gpu},
        scaling_config=ScalingConfig(num_workers=count, use_gpu=gpu, resources_per_worker=resources),
        run_config=RunConfig(name="ray", storage_path=str(Path(job.checkpoints).parent)),
    )
    try:
        trainer.fit()
    except Exception as error:
        own = _own_error(error)
        if own is None:
            raise StageError(
                found=f"{job.stage} failed on Ray: {' '.join(str(error).split())[-500:]}",
                allowed="machines that see this working tree at this path, and keep running",
                fix="see Ray's logs; `dvc repro` goes on from the last checkpoint",
            ) from error
        raise own from error


def _own_error(error: BaseException | None) -> LexisegError | None:
    """The error of ours in what Ray made of it."""
    while error is not None:
        if isinstance(error, LexisegError):
            return error
        inside = [getattr(error, "cause", None), *(getattr(error, "worker_failures", None) or {}).values()]
        for one in inside:
            found = _own_error(one) if isinstance(one, BaseException) and one is not error else None
            if found:
                return found
        error = error.__cause__
    return None


def _ray_rank(config: Mapping[str, Any]) -> None:
    """What every worker of Ray Train runs; Ray has set RANK, WORLD_SIZE and their like, and joined the processes."""
    os.environ[_TOGETHER] = "1"
    size, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if not config["gpu"]:
        os.environ |= {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # which of a machine's cores are whose is no matter
    elif size % here:
        raise StageError(
            found=f"{size} processes of which {here} are on this machine",
            allowed="as many on every machine: Lightning knows no other way to use several GPUs of several machines",
            fix="set `devices` to a multiple of the GPUs of one machine",
        )
    # By name, as the other ranks are started by: stages are built on this module.
    import_module("lexiseg.stages.rank").run_rank(Rank(**config["job"]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
