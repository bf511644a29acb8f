"""Copies of the working tree, for running the graph under other settings without touching anybody's files.

A copy is a git worktree in `.lexiseg/copies/`, with the uncommitted changes of the original. It has a params.yaml and
outputs of its own, and shares DVC's cache, the work folders and MLflow's store with the original.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from ruamel.yaml import YAML

from lexiseg.driver import stop_groups
from lexiseg.errors import LexisegError, StageError
from lexiseg.mend import mend
from lexiseg.pipeline import changed_data, run_dvc
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

    One that was left behind under this name is made anew: what was finished in it is in DVC's cache and in the work
    folders. While another process works in it, this one waits.

    Args:
        root: the working tree.
        name: of the copy, such as the id of a flow run.
        profile: a profile to start from; None: params.yaml as it is.
        settings: changes by dotted key, such as {"lseg.train.lr": 0.002}.

    Raises:
        SettingsError: the settings are wrong.
        StageError: the copy cannot be made: the data is not as data.dvc records it, or not in DVC's cache.
    """
    folder = private_folder(root) / FOLDER / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        print(f"another process works in the copy {name}, waiting for it", file=sys.stderr, flush=True)
        held = lock.acquire()
    with held:
        # Of a flow that was killed, dvc and a training may still be at work here.
        stop_groups(sorted({os.getpgid(process.pid) for process in _working_in(folder)}))
        _remove(root, folder)
        _make(root, folder, profile=profile, settings=settings or {})
        yield folder
        _remove(root, folder)


def remove_copies(root: Path) -> int:
    """Remove the copies that nobody works in; returns their number."""
    removed = 0
    place = private_folder(root) / FOLDER
    for name in sorted({path.name.removesuffix(".lock") for path in place.glob("*")}):
        folder, lock = place / name, place / f"{name}.lock"
        try:
            with FileLock(str(lock), timeout=0):
                if _working_in(folder):
                    raise Timeout(str(lock))
                removed += folder.is_dir()
                _remove(root, folder)
                lock.unlink(missing_ok=True)
        except Timeout:
            print(f"kept the copy {folder.name}: a run is going on there", file=sys.stderr)
    return removed


def _make(root: Path, folder: Path, *, profile: str | None, settings: Mapping[str, Any]) -> None:
    # Twice forced: git may still know a worktree of this name that is gone. Hooks are for people who check out.
    _git(
        root, "-c", f"core.hooksPath={os.devnull}", "worktree", "add", "--quiet", "-ff", "--detach", str(folder), "HEAD"
    )
    changed = _listed(root, "diff", "--name-only", "--no-renames", "HEAD")
    for name in [*changed, *_listed(root, "ls-files", "--others", "--exclude-standard")]:
        source, target = root / name, folder / name
        target.unlink(missing_ok=True)
        if source.is_file() or source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # gone since git listed it
                shutil.copy2(source, target, follow_symlinks=False)
    if profile is not None:
        use_profile(folder, profile, force=True)
    values = override(read_values(folder), settings)
    data = f"data/{parse_settings(values, source=f'params.yaml with {dict(settings)}').data.name}"
    if settings:
        stream = StringIO()
        YAML().dump(values, stream)
        write_text(folder / "params.yaml", stream.getvalue())
    if changed_data(root).get(data) == "modified":
        raise StageError(
            found=f"{data} is not as data.dvc records it",
            allowed="recorded data: a run under other settings works in a copy, which takes it from DVC's cache",
            fix="`dvc commit data.dvc` records the change where it is meant, `dvc checkout data.dvc --force` undoes it",
        )
    mend(folder)  # a dvc may have been writing its lock when it was copied
    cache = run_dvc(root, ["cache", "dir"], capture=True).strip()
    # What DVC keeps about a working tree outside of it would outlive the copy.
    run_dvc(folder, ["config", "--local", "core.site_cache_dir", str(folder / ".dvc/site")], capture=True)
    run_dvc(folder, ["cache", "dir", "--local", cache], capture=True)
    # Data is linked where it can be: a copy of it for every run would fill the disk.
    run_dvc(folder, ["config", "--local", "cache.type", "reflink,hardlink,copy"], capture=True)
    try:
        run_dvc(folder, ["checkout", "--quiet", data], capture=True)
    except LexisegError as error:
        raise StageError(
            found=f"{data} is not in DVC's cache: {error.found}",
            allowed="data that `dvc pull` or `lexiseg data add` has put there",
            fix=f"`dvc pull {data}` where a remote has it, or `lexiseg data add {Path(data).name} PATH --adapter …`",
        ) from error


def _working_in(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if folder in (place := Path(process.cwd()), *place.parents) and process.pid != os.getpid():
                found.append(process)
    return found


def _remove(root: Path, folder: Path) -> None:
    if not folder.exists():
        return
    subprocess.run(
        ["git", "worktree", "remove", "--force", "--force", str(folder)], cwd=root, capture_output=True, check=False
    )
    shutil.rmtree(folder, ignore_errors=True)  # what git does not know as a worktree


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
