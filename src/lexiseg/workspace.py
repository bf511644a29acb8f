"""Where things are: the working tree, and the main checkout that owns caches, work folders and MLflow's store."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from lexiseg.errors import StageError


def find_root(start: Path | None = None) -> Path | None:
    """The nearest folder upwards that holds dvc.yaml and params.yaml, or None."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "dvc.yaml").is_file() and (folder / "params.yaml").is_file():
            return folder
    return None


def require_root() -> Path:
    """The working tree the command was started in.

    Raises:
        StageError: not inside one.
    """
    root = find_root()
    if root is None:
        raise StageError(
            found=f"no dvc.yaml and params.yaml in {Path.cwd()} or above",
            allowed="a command started inside a lexiseg working tree",
            fix="change into the cloned repository",
        )
    return root


@cache
def main_checkout(root: Path) -> Path:
    """The checkout that owns `.lexiseg` when `root` is a copy of it.

    Experiments of DVC run in `.dvc/tmp/exps/<name>` below the main checkout, git worktrees point back to
    theirs; a store addressed from inside the copy would be thrown away with it.
    """
    for folder in root.parents:
        if folder.name == "exps" and folder.parent.name == "tmp" and folder.parent.parent.name == ".dvc":
            return main_checkout(folder.parent.parent.parent)
    pointer = root / ".git"
    if pointer.is_file():
        git_folder = (root / pointer.read_text(encoding="utf-8").removeprefix("gitdir:").strip()).resolve()
        if git_folder.parent.name == "worktrees" and git_folder.parent.parent.name == ".git":
            return git_folder.parent.parent.parent
    return root


def private_folder(root: Path) -> Path:
    """`.lexiseg` of the main checkout: work folders, caches, MLflow's store.

    `LEXISEG_HOME` moves it; a relative path counts from the main checkout, wherever the command is started.
    """
    return main_checkout(root) / (os.environ.get("LEXISEG_HOME") or ".lexiseg")


def resolve_weights(path: str) -> Path:
    """A weight file named in the settings; relative paths count from the main checkout (`weights/` lives there)."""
    root = find_root()
    return Path(path) if Path(path).is_absolute() or root is None else main_checkout(root) / path
