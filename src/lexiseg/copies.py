"""Copies of the working tree, for running the graph under other settings without touching anybody's files.

A copy is a git worktree in `.lexiseg/copies/`, with the uncommitted changes of the original. It has a params.yaml and
outputs of its own, and shares DVC's cache, the work folders and MLflow's store with the original.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ruamel.yaml import YAML

from lexiseg.errors import LexisegError, StageError
from lexiseg.pipeline import run_dvc
from lexiseg.profiles import use_profile
from lexiseg.settings import override
from lexiseg.stages.settings import parse_settings, read_values
from lexiseg.storage import write_text
from lexiseg.workspace import private_folder

FOLDER = "copies"


@contextmanager
def working_copy(
    root: Path, name: str, *, profile: str | None = None, settings: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """A copy of the working tree under other settings; removed in the end, unless the block ended in an error.

    A copy of this name that was left behind is gone on with: the same name stands for the same run.

    Args:
        root: the working tree.
        name: of the copy, such as the id of a flow run.
        profile: a profile to start from; None: params.yaml as it is.
        settings: changes by dotted key, such as {"lseg.train.lr": 0.002}.

    Raises:
        SettingsError: the settings are wrong.
        StageError: the copy cannot be made, or another process works in it.
    """
    folder = private_folder(root) / FOLDER / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{folder}.lock", timeout=0):
            if not _mark(folder).is_file():
                _remove(root, folder)
                _make(root, folder, profile=profile, settings=settings or {})
            yield folder
            _remove(root, folder)
    except Timeout as error:
        raise StageError(
            found=f"another process works in the copy {folder}",
            allowed="one process per copy",
            fix="let it end, or stop it",
        ) from error


def remove_copies(root: Path) -> int:
    """Remove the copies that nobody works in; returns their number."""
    removed = 0
    for folder in sorted(path for path in (private_folder(root) / FOLDER).glob("*") if path.is_dir()):
        try:
            with FileLock(f"{folder}.lock", timeout=0):
                _remove(root, folder)
                removed += 1
        except Timeout:
            print(f"kept the copy {folder.name}: a run is going on there", file=sys.stderr)
    return removed


def _make(root: Path, folder: Path, *, profile: str | None, settings: Mapping[str, Any]) -> None:
    _git(root, "worktree", "add", "--quiet", "--detach", str(folder), "HEAD")
    for name in _listed(root, "ls-files", "--modified", "--others", "--exclude-standard"):
        source, target = root / name, folder / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
        else:
            target.unlink(missing_ok=True)
    if profile is not None:
        use_profile(folder, profile, force=True)
    values = override(read_values(folder), settings)
    parsed = parse_settings(values, source=f"params.yaml with {dict(settings)}")
    if settings:
        stream = StringIO()
        YAML().dump(values, stream)
        write_text(folder / "params.yaml", stream.getvalue())
    cache = run_dvc(root, ["cache", "dir"], capture=True).strip()
    own = root / ".dvc" / "config.local"  # credentials of remotes, say
    write_text(folder / ".dvc" / "config.local", own.read_text(encoding="utf-8") if own.is_file() else "")
    run_dvc(folder, ["cache", "dir", "--local", cache], capture=True)
    # Data is linked where it can be: a copy of it for every run would fill the disk.
    run_dvc(folder, ["config", "--local", "cache.type", "reflink,hardlink,copy"], capture=True)
    name = parsed.data.name
    try:
        run_dvc(folder, ["checkout", "--quiet", f"data/{name}"], capture=True)
    except LexisegError as error:
        raise StageError(
            found=f"data/{name} is not in DVC's cache: {error.found}",
            allowed="data that `dvc pull` or `lexiseg data add` has put there",
            fix=f"`dvc pull data/{name}` where a remote has it, or `lexiseg data add {name} PATH --adapter …`",
        ) from error
    _mark(folder).touch()


def _mark(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.complete")  # without it, the process that made the copy was killed


def _remove(root: Path, folder: Path) -> None:
    _mark(folder).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    _git(root, "worktree", "prune")


def _listed(root: Path, *arguments: str) -> list[str]:
    return [name for name in _git(root, *arguments, "-z").split("\0") if name]


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageError(
            found=f"`git {' '.join(arguments)}` failed: {done.stderr.strip()}",
            allowed="a git working tree with at least one commit",
            fix="run it in a clone of the repository",
        )
    return done.stdout
