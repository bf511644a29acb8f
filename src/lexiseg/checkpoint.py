"""Checkpoints of a training: written whole, read without executing code, kept in the work folder of the stage.

A stage runs in a work folder under its fingerprint (`lexiseg.stage`), so a checkpoint is only ever found by the
same work: same settings, data and code. Which folder that is stands in a context variable, so that stage functions
need not carry it; outside of a stage nothing is kept.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lexiseg.storage import atomic_path

_FOLDER: ContextVar[Path | None] = ContextVar("checkpoint folder", default=None)


@dataclass(frozen=True)
class Checkpoint:
    """All that a training needs to go on as if it had never stopped; randomness and batches follow from the step.

    Attributes:
        step: number of batches that are done.
        batches: number of batches of the whole training.
        module: the module's state_dict.
        optimisers: the state_dict of each optimiser.
        schedulers: the state_dict of each scheduler.
        curve: rows logged so far.
        torch: version of torch that wrote it.
    """

    step: int
    batches: int
    module: dict[str, Any]
    optimisers: list[dict[str, Any]]
    schedulers: list[dict[str, Any]]
    curve: list[dict[str, float]]
    torch: str


@contextmanager
def checkpoints_in(folder: Path) -> Iterator[None]:
    """Keep the checkpoints of all trainings in this block in `folder`, and go on from those that are there."""
    for part in folder.glob(".*.part"):  # of a process that was killed while it wrote
        shutil.rmtree(part, ignore_errors=True)
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


def checkpoint_file(title: str) -> Path | None:
    """Where the checkpoint of a training lies; None outside of `checkpoints_in`."""
    folder = _FOLDER.get()
    return folder / (re.sub(r"\W+", "-", title).strip("-").lower() + ".ckpt") if folder else None


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write it beside its place, down to the disk, and then rename it: a kill or a full disk leaves the one before."""
    import torch

    content = io.BytesIO()  # torch tells of a full disk in words of its own when it writes the file itself
    torch.save(asdict(checkpoint), content)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.write(content.getbuffer())
        stream.flush()
        os.fsync(stream.fileno())


def load_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint, or None where there is none that can be used; the reason is said."""
    import torch

    if not path.is_file():
        return None
    try:
        checkpoint = Checkpoint(**torch.load(path, map_location="cpu", weights_only=True))
    except OSError:
        raise
    except Exception as error:  # a damaged file ends in nearly any kind of error
        print(f"warning: {path} cannot be read ({type(error).__name__}), training starts anew", file=sys.stderr)
        return None
    if checkpoint.torch != torch.__version__:
        print(f"warning: {path} is of torch {checkpoint.torch}, training starts anew", file=sys.stderr)
        return None
    return checkpoint
