"""One way to train for everything that trains: step-indexed, by Lightning.

Batch k and all randomness of step k are functions of (seed, k) and of nothing else: not of the number of
loader workers, not of what ran before. That makes every training repeatable bit by bit on one machine, and lets an
interrupted one go on at any step as if nothing had happened (`lexiseg.checkpoint`).
"""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lexiseg.checkpoint import Checkpoint, checkpoint_file, load_checkpoint, save_checkpoint
from lexiseg.errors import DataError, LexisegError, SettingsError
from lexiseg.ranks import rank, world_size

CHECKPOINT_SECONDS = 30.0  # between two checkpoints; the environment variable of that name sets another number

# Lightning prints its device summary and a product hint on every fit; its loggers are made when it is imported.
for _name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.WARNING)


def step_seed(seed: int, step: int, *, stream: int = 0) -> int:
    """A 63-bit seed for one step of one stream of randomness (0: batch, 1: model, others free)."""
    return int(np.random.SeedSequence([seed, step, stream]).generate_state(2, np.uint64)[0] >> 1)


def shuffled_indices(size: int, batch_size: int, step: int, *, seed: int) -> np.ndarray:
    """Indices of batch `step` when `size` samples are visited epoch by epoch in a fresh random order each.

    Returns:
        int64 array (batch_size,). A batch may cross the border of two epochs, so none is short.

    Raises:
        DataError: there are no samples.
    """
    if size == 0:
        raise DataError(
            found="no sample to train on",
            allowed="a training split with at least one",
            fix="add pictures to the split `train`, or check how the data set is divided",
        )
    first = step * batch_size
    position = np.arange(first, first + batch_size)
    order = {
        epoch: np.random.default_rng([seed, int(epoch)]).permutation(size) for epoch in np.unique(position // size)
    }
    return np.array([order[epoch][index] for epoch, index in zip(position // size, position % size, strict=True)])


def warmup_cosine(step: int, *, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Learning-rate factor: linear up to 1 over `warmup` steps, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def check_labelled_batch(samples: Sequence[Mapping[str, Any]], *, crop: str) -> None:
    """Refuse samples of a labelled data set that cannot be one batch.

    Args:
        samples: with `id`, `image` (H, W, 3) and `semantic` (H, W) or None.
        crop: the setting that brings pictures to one size.

    Raises:
        DataError: a sample without a label map, or pictures of different sizes.
    """
    unlabelled = [sample["id"] for sample in samples if sample["semantic"] is None]
    if unlabelled:
        raise DataError(
            found=f"training samples without a label map: {', '.join(unlabelled)}",
            allowed="a training split in which every picture is labelled",
            fix="remove the pictures from the split, or put them into one of their own",
        )
    sizes = sorted({sample["image"].shape[:2] for sample in samples})
    if len(sizes) > 1:
        raise DataError(
            found="a batch of pictures of different sizes: " + ", ".join(f"{h} x {w}" for h, w in sizes),
            allowed="pictures of one size, or crops of one",
            fix=f"set `{crop}` to [height, width]",
        )


class StepBatches(Dataset):
    """Item k is the whole batch of step `first` + k, made by `make`."""

    def __init__(self, make: Callable[[int], Any], *, first: int, steps: int) -> None:
        self.make, self.first, self.steps = make, first, steps

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, index: int) -> Any:
        try:
            return self.make(self.first + index)
        except LexisegError as error:
            # As a value: torch makes an error of a loader process anew from its text alone, without its three parts.
            return error


class StepSeed(L.Callback):
    """Seeds torch before every step, so that dropout and the like depend on (seed, step) alone.

    Raises, before the step, the error that making its batch ended in.
    """

    def __init__(self, seed: int, *, first: int) -> None:
        self.seed, self.first = seed, first

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_index: int) -> None:
        if isinstance(batch, LexisegError):
            raise batch
        torch.manual_seed(step_seed(self.seed, self.first + batch_index, stream=1))


class Curve(L.Callback):
    """Keeps what the module logs, every `every` steps, and shows it on a progress bar."""

    def __init__(self, *, steps: int, every: int, title: str, first: int, rows: Sequence[dict[str, float]]) -> None:
        self.every, self.first, self.rows = every, first, list(rows)
        interval = 1.0 if sys.stderr.isatty() else 15.0
        how: dict[str, Any] = {"mininterval": interval, "maxinterval": interval, "disable": rank() > 0}
        self.bar = tqdm(total=steps, desc=title, unit="step", initial=first, **how)
        self.steps = steps

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        self.bar.update()
        step = self.first + batch_index + 1
        if step % self.every == 0 or step == self.steps:
            values = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.rows.append({"step": step, **values})
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.bar.close()


class Checkpoints(L.Callback):
    """Writes a checkpoint now and then, after the last step, and when the training is stopped between two steps.

    SIGTERM stops it there, and so does an error in making a batch. An error inside a step leaves what is neither
    the state before it nor after: then the last checkpoint is what remains.

    Args:
        path: the file.
        first: batches that were done before this process.
        batches: batches of the whole training.
        accumulate: batches that make one optimiser step; between them there is no checkpoint.
        curve: whose rows are kept.
        found: the checkpoint to go on from.
    """

    def __init__(
        self, path: Path, *, first: int, batches: int, accumulate: int, curve: Curve, found: Checkpoint | None
    ) -> None:
        self.path, self.batches, self.accumulate, self.curve, self.found = path, batches, accumulate, curve, found
        self.done, self.saved, self.within = first, first, False
        self.pause = _pause()
        self.due = time.monotonic() + self.pause

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.found is None:
            return
        for optimiser, state in zip(trainer.optimizers, self.found.optimisers, strict=True):
            optimiser.load_state_dict(state)
        for config, state in zip(trainer.lr_scheduler_configs, self.found.schedulers, strict=True):
            config.scheduler.load_state_dict(state)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_index: int) -> None:
        self.within = True

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        self.done, self.within = self.done + 1, False
        if self.done == self.batches or time.monotonic() >= self.due:
            self._save(trainer, module)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, GivenUpError):
            self.path.unlink(missing_ok=True)  # of rank 0, which alone has an onlooker
        # Where a checkpoint could not be written, a second try would hide why.
        elif not self.within and not isinstance(exception, OSError):
            self._save(trainer, module)

    def _save(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.done == self.saved or self.done % self.accumulate or rank() > 0:
            return
        start = time.monotonic()
        save_checkpoint(
            self.path,
            Checkpoint(
                step=self.done,
                batches=self.batches,
                module=module.state_dict(),
                optimisers=[optimiser.state_dict() for optimiser in trainer.optimizers],
                schedulers=[config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
                curve=self.curve.rows,
                torch=str(torch.__version__),
            ),
        )
        self.saved, now = self.done, time.monotonic()
        # Large models: writing takes at most a twentieth of the time.
        self.due = now + max(self.pause, 20 * (now - start))


class StopTogether(L.Callback):
    """Ends a shared training after the step in which SIGTERM came to one of its processes, in all of them.

    Lightning's own handler tells the others in the middle of whatever the process is doing, which may be a step that
    waits for them: then both wait for ever.
    """

    def __init__(self) -> None:
        self.asked, self.before = False, None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # Ray runs trainings in another thread than the first, where nobody listens to signals.
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._ask)  # above that of Lightning

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        asked = torch.tensor([float(self.asked)], device=module.device)
        torch.distributed.all_reduce(asked)
        if bool(asked):
            raise SystemExit(128 + signal.SIGTERM)

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True


class GivenUpError(Exception):
    """An onlooker gives a training up: it ends, and nothing is kept of it."""


@dataclass(frozen=True)
class Onlooker:
    """Who looks at trainings from outside, as a sweep does to give up those that promise little.

    A training whose onlooker only looks ends bit by bit as one without.

    Attributes:
        at: shares of the steps (0..1) after which `look` is called.
        look: called with the share, and with a function that writes into a folder what the stage would write if its
            training ended now. May raise `GivenUpError`.
    """

    at: tuple[float, ...]
    look: Callable[[float, Callable[[Path], None]], None]


_ONLOOKER: ContextVar[Onlooker | None] = ContextVar("onlooker", default=None)


@contextmanager
def watched_by(onlooker: Onlooker) -> Iterator[None]:
    """Let `onlooker` look at all trainings in this block that say how they are saved."""
    token = _ONLOOKER.set(onlooker)
    try:
        yield
    finally:
        _ONLOOKER.reset(token)


class Looks(L.Callback):
    """Calls an onlooker, before the checkpoint of the step that it looks at: what is killed meanwhile looks again."""

    def __init__(self, onlooker: Onlooker, *, first: int, batches: int, save: Callable[[Path], None]) -> None:
        self.onlooker, self.first, self.save = onlooker, first, save
        self.at = {max(1, round(share * batches)): share for share in onlooker.at if share < 1}

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        share = self.at.get(self.first + batch_index + 1)
        if share is not None:
            # The modes of frozen parts differ from the others', so each is put back to its own.
            modes = {part: part.training for part in module.modules()}
            module.eval()
            self.onlooker.look(share, self.save)
            for part, training in modes.items():
                part.training = training


def _pause() -> float:
    value = os.environ.get("LEXISEG_CHECKPOINT_SECONDS", str(CHECKPOINT_SECONDS))
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:  # NaN is neither
        raise SettingsError(
            found=f"LEXISEG_CHECKPOINT_SECONDS={value}",
            allowed="a number of seconds, 0 or more; 0 writes a checkpoint after every step",
            fix="correct or unset the environment variable",
        )
    return seconds


def fit(
    module: L.LightningModule,
    *,
    batch: Callable[[int], Any],
    steps: int,
    seed: int,
    workers: int = 0,
    gradient_clip: float | None = None,
    accumulate: int = 1,
    precision: Any = "32-true",
    title: str = "train",
    callbacks: Sequence[L.Callback] = (),
    save: Callable[[Path], None] | None = None,
) -> list[dict[str, float]]:
    """Train `module` for `steps` steps, or for those that are left of them (`lexiseg.checkpoint`).

    Args:
        module: the Lightning module; it logs with `self.log` and configures its optimiser per step.
        batch: makes the batch of step k from k alone.
        steps: number of optimiser steps.
        seed: seeds all randomness of the steps.
        workers: loader processes; the result does not depend on it.
        gradient_clip: largest gradient norm, or None.
        accumulate: batches whose gradients make one optimiser step; `batch` is asked for steps * accumulate.
        precision: a Lightning precision, e.g. "32-true" or "bf16-mixed".
        title: words on the progress bar, and the name of the checkpoint: each training of a stage has its own.
        save: writes into a folder what the stage would write if the training ended now; None: no `Onlooker` can look.

    Raises:
        LexisegError: what `batch` raises, in a loader process too.
        SystemExit: with code 143, after the step in which SIGTERM came.
        GivenUpError: an `Onlooker` gave it up; its checkpoint is gone.

    Returns:
        The logged values as rows `{"step", name: value, ...}`, about fifty of them.
    """
    batches, path = steps * accumulate, checkpoint_file(title)
    found = load_checkpoint(path) if path else None
    first = found.step if found else 0
    if found:
        print(f"{title}: going on after step {first} of {batches}", file=sys.stderr, flush=True)
        module.load_state_dict(found.module)
        if first == batches:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as below
            module.eval()
            return found.curve
    curve = Curve(
        steps=batches, every=max(1, batches // 50), title=title, first=first, rows=found.curve if found else ()
    )
    callbacks = [StepSeed(seed, first=first), curve, *callbacks]
    onlooker = _ONLOOKER.get()
    if onlooker and save and rank() == 0:
        callbacks.append(Looks(onlooker, first=first, batches=batches, save=save))
    if path:
        callbacks.append(
            Checkpoints(path, first=first, batches=batches, accumulate=accumulate, curve=curve, found=found)
        )
    if world_size() > 1:
        callbacks.append(StopTogether())
    loader = DataLoader(
        StepBatches(batch, first=first, steps=batches), batch_size=None, shuffle=False, num_workers=workers
    )
    with warnings.catch_warnings():
        # The loader yields whole batches; Lightning's advice on worker counts does not apply.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        # Frozen parts are meant to be in evaluation mode.
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
        warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified.*")
        trainer = L.Trainer(
            max_steps=steps - first // accumulate,
            max_epochs=1,
            accelerator="gpu" if torch.cuda.is_available() else "cpu",
            precision=precision,
            gradient_clip_val=gradient_clip,
            accumulate_grad_batches=accumulate,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            deterministic=not torch.cuda.is_available(),
            log_every_n_steps=1,
            callbacks=callbacks,
            **_strategy(),
        )
        module.train()
        # Convolutions of small maps take half the time in this layout.
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        try:
            trainer.fit(module, train_dataloaders=loader)
        except SIGTERMException:
            # Lightning would end the process as if all had gone well.
            raise SystemExit(128 + signal.SIGTERM) from None
    module.eval()
    module.cpu()
    return curve.rows


def _strategy() -> dict[str, Any]:
    """What Lightning has to know of the processes that share a training; they are there already."""
    if world_size() == 1:
        return {"devices": 1}
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    return {
        # A weight of 0 leaves parameters without a gradient, for which DDP would wait.
        "strategy": DDPStrategy(find_unused_parameters=True),
        "devices": here,
        "num_nodes": world_size() // here,
        "plugins": [TorchElasticEnvironment()],
        # Where each process has a GPU, batch norms see the whole batch. On CPUs torch has no such norm: each process
        # normalises by its own part, and the running statistics are those of rank 0.
        "sync_batchnorm": torch.cuda.is_available(),
        "use_distributed_sampler": False,
    }


def curve_csv(rows: Sequence[dict[str, float]]) -> str:
    """A training curve as CSV; equal values give equal text."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: value if name == "step" else f"{value:.6g}" for name, value in row.items()})
    return stream.getvalue()
