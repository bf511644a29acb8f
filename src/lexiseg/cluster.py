"""Ray, where LEXISEG_RAY asks for it: prepare, trials of sweeps and trainings in several processes run on its machines.

    LEXISEG_RAY=local               a cluster of this machine alone, for this command
    LEXISEG_RAY=auto                the cluster that this machine belongs to (`ray start`)
    LEXISEG_RAY=10.0.0.1:6379       the cluster with this head

Without the variable nothing of Ray is imported. Where a stage runs is no part of what it computes, so this is no
setting of params.yaml: with and without Ray, results have the same fingerprints, and the same hashes.

Every machine has to see the working tree, with its `.lexiseg`, at the same path (a shared file system), and to have the
same packages in its Python.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

from lexiseg.errors import StageError

VARIABLE = "LEXISEG_RAY"
LOCAL = "local"
CONNECT_SECONDS = 5.0
# What tells a process on another machine where it belongs.
_PASSED = ("LEXISEG_HOME", "LEXISEG_CHECKPOINT_SECONDS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def address() -> str | None:
    """What LEXISEG_RAY says; None where Ray is not asked for."""
    return os.environ.get(VARIABLE) or None


def is_wide() -> bool:
    """Whether there may be other machines."""
    return address() not in (None, LOCAL)


def connect() -> Any:
    """Ray, connected to the cluster that LEXISEG_RAY names.

    Returns:
        The module `ray`.

    Raises:
        StageError: it is not installed, or nothing answers there.
    """
    where = address()
    assert where is not None
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise StageError(
            found=f"{VARIABLE}={where}, and Ray is not installed ({error})",
            allowed="an installation with the extra `ray`",
            fix="pip install -c constraints.txt -e '.[ray]', or unset the variable",
        ) from error
    if ray.is_initialized():
        return ray
    _probe(where)
    how: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if where == LOCAL:
        how |= {"include_dashboard": False, "num_cpus": _cores()}
    else:
        how |= {"address": where}
    try:
        ray.init(**how, runtime_env={"env_vars": environment()})
    # AuthenticationError: the cluster asks for a token that this user does not have.
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, RayError) as error:
        raise _nothing_at(where, error) from error
    return ray


def _probe(where: str) -> None:
    """Refuse an address at which nothing listens: Ray would go on trying for many minutes."""
    host, _, port = where.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            raise _nothing_at(where, error) from error


def _nothing_at(where: str, error: Exception) -> StageError:
    return StageError(
        found=f"no Ray cluster at {where}: {' '.join(str(error).split())[:200]}",
        allowed=f"{LOCAL}, auto (after `ray start` on this machine), or HOST:PORT of a head node that runs",
        fix=f"start it (`ray start --head`), or correct or unset {VARIABLE}",
    )


def require(ray: Any, *, count: int, cpus: int, gpus: float) -> None:
    """Refuse what the cluster will never have room for: Ray would wait for it without a word.

    Args:
        ray: of `connect`.
        count: processes at once.
        cpus, gpus: of each.

    Raises:
        StageError: there is no room.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(
        int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) / gpus if gpus else node.get("CPU", 0)))
        for node in nodes
    )
    if room < count:
        kind = f"{cpus} cores" + (f" and {gpus:g} GPUs" if gpus else "")
        have = ", ".join(f"{node.get('CPU', 0):g} cores and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise StageError(
            found=f"{count} processes with {kind} each, on machines with {have}",
            allowed=f"as many as fit: {room} of them",
            fix="take fewer, lower `threads` in params.yaml, or add machines to the cluster",
        )


def environment() -> dict[str, str]:
    """Variables for processes on other machines: the package of this working tree, and what the user has set."""
    package = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(dict.fromkeys([package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))
    programs = os.pathsep.join(dict.fromkeys([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    return {
        "PYTHONPATH": path,
        "PATH": programs,
        "RAY_USAGE_STATS_ENABLED": "0",
        **{name: value for name in _PASSED if (value := os.environ.get(name))},
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
