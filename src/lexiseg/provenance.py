"""What a published number was measured with. Never part of a stage's output: those depend on their inputs alone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("lexiseg", "torch", "lightning", "numpy", "open_clip_torch", "timm")


def made_with(root: Path) -> dict[str, Any]:
    """Command, UTC date, commit, versions and hardware of this process.

    Args:
        root: the working tree; a commit ending in "+" had uncommitted changes of code, graph or settings.
    """
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(root),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "hardware": hardware(),
    }


def hardware() -> dict[str, Any]:
    """System, processor, logical cores this process may use, and GPU or None."""
    import torch

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _commit(root: Path) -> str | None:
    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    changed = git(
        "status",
        "--porcelain",
        "--",
        "src",
        "benchmarks/*.py",
        "dvc.yaml",
        "params.yaml",
        "pyproject.toml",
        "constraints.txt",
    )
    return f"{commit}+" if commit and changed else commit
