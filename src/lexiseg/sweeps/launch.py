"""Where the workers of a sweep run: processes of this machine, or of any machine of a Ray cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

from lexiseg import cluster
from lexiseg.driver import GRACE, KILL, stop_groups
from lexiseg.errors import SettingsError

STORAGE_VARIABLE = "LEXISEG_STORAGE"
GONE = -signal.SIGKILL  # exit code of a worker whose machine was lost


class Worker(ABC):
    """A worker at work.

    Attributes:
        name: of the worker.
        log: the file that it writes its lines to, where this machine can see it.
    """

    def __init__(self, name: str, log: Path) -> None:
        self.name, self.log = name, log

    @abstractmethod
    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""

    @abstractmethod
    def stop(self) -> None:
        """End it: SIGTERM, and SIGKILL for what is left after a while."""


def start_worker(root: Path, study: str, *, name: str, log: Path, url: str, threads: int, gpus: float) -> Worker:
    """Start a worker on a study.

    Args:
        root: the working tree.
        study: its name.
        name: of the worker.
        log: file for its lines.
        url: of the storage.
        threads: cores that it takes of a cluster.
        gpus: GPUs that it takes of a cluster; a part of 1 lets several share one.
    """
    command = [sys.executable, "-m", "lexiseg", "sweep", "work", study, "--name", name]
    # What a worker starts runs where it is: a cluster's cores are its own already.
    variables = {STORAGE_VARIABLE: url, "PYTHONUNBUFFERED": "1", cluster.VARIABLE: ""}
    if cluster.address() is None:
        return _Process(name, log, command, root, variables)
    return _OnRay(name, log, command, root, variables, threads=threads, gpus=gpus)


def check_place(url: str, *, threads: int, gpus: float) -> None:
    """Refuse what workers could not run with.

    Raises:
        SettingsError: GPUs without a cluster, or a storage that the machines of a cluster cannot share.
        StageError: no cluster, or none of its machines has room for a worker.
    """
    if gpus and cluster.address() is None:
        raise SettingsError(
            found=f"--gpus {gpus:g} without a cluster",
            allowed=f"--gpus where {cluster.VARIABLE} names one; here workers share the GPUs that they see",
            fix=f"leave --gpus out, or set {cluster.VARIABLE}",
        )
    if cluster.address() is not None:
        cluster.require(cluster.connect(), count=1, cpus=threads, gpus=gpus)
    if cluster.is_wide() and url.startswith("sqlite"):
        raise SettingsError(
            found=f"{cluster.VARIABLE}={cluster.address()} with the storage {url}",
            allowed="a database that several machines can write: postgresql://…",
            fix="give one with --storage or LEXISEG_STORAGE",
        )


def _begin(command: list[str], root: str, variables: dict[str, str], log: str) -> subprocess.Popen[bytes]:
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with Path(log).open("wb") as stream:
        return subprocess.Popen(
            command,
            cwd=root,
            env=os.environ | variables,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl+C comes to the process that shows the sweep, which ends them one by one
        )


class _Process(Worker):
    def __init__(self, name: str, log: Path, command: list[str], root: Path, variables: dict[str, str]) -> None:
        super().__init__(name, log)
        self._process = _begin(command, str(root), variables, str(log))

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        stop_groups([self._process.pid])
        self._process.wait()


class _OnRay(Worker):
    """A process of its own on the machine that Ray chooses, kept by an actor."""

    def __init__(
        self,
        name: str,
        log: Path,
        command: list[str],
        root: Path,
        variables: dict[str, str],
        *,
        threads: int,
        gpus: float,
    ) -> None:
        super().__init__(name, log)
        self._ray = cluster.connect()
        options: dict[str, Any] = {"num_cpus": threads, "num_gpus": gpus, "max_concurrency": 2, "max_restarts": 0}
        self._keeper = self._ray.remote(**options)(_Keeper).remote(command, str(root), variables, str(log))
        self._code: int | None = None
        self._waiting = self._keeper.wait.remote()

    def poll(self) -> int | None:
        if self._code is None and self._ray.wait([self._waiting], timeout=0)[0]:
            try:
                self._code = self._ray.get(self._waiting)
            except self._ray.exceptions.RayError:
                self._code = GONE
            self._ray.kill(self._keeper)
        return self._code

    def stop(self) -> None:
        if self.poll() is None:
            with suppress(self._ray.exceptions.RayError):  # it never began, or its machine is gone
                self._ray.get(self._keeper.stop.remote(), timeout=GRACE + 2 * KILL)
            self._ray.kill(self._keeper)


class _Keeper:
    """Runs a command on its machine; one thread waits for it, another may stop it."""

    def __init__(self, command: list[str], root: str, variables: dict[str, str], log: str) -> None:
        # Ray gives this process GPUs by CUDA_VISIBLE_DEVICES, which is passed on.
        self._process = _begin(command, root, variables, log)

    def wait(self) -> int:
        return self._process.wait()

    def stop(self) -> None:
        stop_groups([self._process.pid])
