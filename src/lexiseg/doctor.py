"""`lexiseg doctor`: is everything here that the commands need?"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import lexiseg
from lexiseg.environment import TELEMETRY
from lexiseg.errors import LexisegError
from lexiseg.workspace import private_folder

PACKAGES = (
    "torch",
    "torchvision",
    "lightning",
    "open_clip_torch",
    "timm",
    "dvc",
    "mlflow",
    "great_expectations",
    "datasets",
    "prefect",
)
FREE_GB = 2.0


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    what: str
    good: bool
    fix: str = ""


def examine(root: Path) -> list[Finding]:
    """Look at Python, packages, device, working tree, data, settings, graph, tools on PATH and disk."""
    findings = [
        Finding(f"Python {sys.version.split()[0]}", sys.version_info >= (3, 11), "install Python 3.11 or newer"),
        *map(_package, PACKAGES),
        _own_package(root),
        _tools(),
        _device(),
        _settings(root),
        _dvc_files(root),
        _data(root),
        _disk(root),
    ]
    loud = sorted(name for name, quiet in TELEMETRY.items() if _switched(os.environ.get(name)) != _switched(quiet))
    findings.append(
        Finding(
            f"telemetry may be on: {', '.join(loud)}" if loud else "telemetry of the libraries is off",
            not loud,
            "unset these variables",
        )
    )
    return findings


def _switched(value: str | None) -> bool:
    """True for on: the libraries take several words for it."""
    return (value or "").strip().lower() in {"1", "true", "yes", "on"}


def _package(name: str) -> Finding:
    try:
        return Finding(f"{name} {version(name)}", True)
    except PackageNotFoundError:
        return Finding(f"{name} is missing", False, "pip install -c constraints.txt -e .")


def _own_package(root: Path) -> Finding:
    package = Path(lexiseg.__file__).resolve().parent
    own = package == (root / "src" / "lexiseg").resolve()
    return Finding(
        f"lexiseg {lexiseg.__version__} " + ("of this working tree" if own else f"from {package}"),
        own,
        "pip install -e . in this working tree",
    )


def _tools() -> Finding:
    lacking = [name for name in ("git", "dvc", "lexiseg") if shutil.which(name) is None]
    return Finding(
        f"not on PATH: {', '.join(lacking)}" if lacking else "git, dvc and lexiseg are on PATH",
        not lacking,
        "activate the environment: source .venv/bin/activate",
    )


def _device() -> Finding:
    import torch

    trains = (
        f"training on {torch.cuda.get_device_name()}, the rest on " if torch.cuda.is_available() else "computing on "
    )
    return Finding(f"{trains}the CPU, {os.cpu_count()} cores", True)


def _settings(root: Path) -> Finding:
    from lexiseg.pipeline import read_graph
    from lexiseg.profiles import unsaved_edits
    from lexiseg.stages.settings import parse_settings, read_values

    try:
        values = read_values(root)
        parse_settings(values)
        stages = len(read_graph(root))
        edits = unsaved_edits(root)
    except LexisegError as error:
        return Finding(error.found, False, error.fix)
    changed = f", changed in {', '.join(edits)}" if edits else ""
    return Finding(f"params.yaml: profile {values['profile']}{changed}; dvc.yaml: {stages} stages", True)


def _data(root: Path) -> Finding:
    from lexiseg.stages.settings import read_values

    try:
        name = read_values(root)["data"]["name"]
    except (LexisegError, KeyError, TypeError):
        return Finding("no data set is named in params.yaml", False, "set data.name")
    folder = root / "data" / name
    return Finding(
        f"data/{name} " + ("is there" if folder.is_dir() else "is missing"),
        folder.is_dir(),
        f"`dvc pull data/{name}`, or `lexiseg data add {name} PATH --adapter …`",
    )


def _dvc_files(root: Path) -> Finding:
    from lexiseg.mend import damaged

    names = [path.relative_to(root).as_posix() for path in damaged(root)]
    return Finding(
        f"half-written by a killed dvc: {', '.join(names)}" if names else "DVC's own files are whole",
        not names,
        "`lexiseg mend`",
    )


def _disk(root: Path) -> Finding:
    free = shutil.disk_usage(root).free / 1e9
    private = private_folder(root)
    used = sum(map(_size, private.rglob("*"))) / 1e9 if private.is_dir() else 0.0
    return Finding(f"{free:.0f} GB free; .lexiseg holds {used:.1f} GB", free > FREE_GB, "`lexiseg clean`, `dvc gc -w`")


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:  # a running stage has taken it away
        return 0
