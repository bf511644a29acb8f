"""Where things are: the working tree, and the main checkout that owns caches, work folders and MLflow's store."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from lexiseg.errors import ModelError, StageError
from lexiseg.storage import hash_tree, sha256_of_json


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


def setting_path(path: Path) -> str:
    """How the settings name a file or folder: what `resolve_weights` finds again."""
    root = find_root()
    owner = None if root is None else main_checkout(root)
    path = Path(os.path.abspath(path))  # not resolved: models/ may be a link to a larger disk
    if owner is None or not path.is_relative_to(owner):
        return str(path)
    inside = str(path.relative_to(owner))
    return inside if "/" in inside else f"./{inside}"  # by its slash, the settings tell a path from a word


def resolve_model(path: str, *, sha256: str | None, setting: str) -> Path:
    """A model folder named in the settings, where it is the one that is meant; relative paths as in `resolve_weights`.

    Args:
        path: the folder, such as "models/demo_e200".
        sha256: its expected `model_identity`.
        setting: the key in params.yaml that holds the hash, for the error's text.

    Raises:
        ModelError: no model folder, or another one.
    """
    folder = resolve_weights(path)
    if not (folder / "model.json").is_file():
        raise ModelError(
            found=f"{folder} has no model.json",
            allowed="a model folder, as `lexiseg import` writes it",
            fix="check the path; it counts from the main checkout",
        )
    if (actual := model_identity(folder)) != sha256:
        raise ModelError(
            found=f"{folder} has the hash {actual}",
            allowed=f"{sha256}, as `{setting}` says",
            fix="import the checkpoint again, or put the new hash into params.yaml if the change is meant",
        )
    return folder


def model_identity(folder: Path) -> str:
    """One sha256 over what a model folder computes with: config, weights, trunk and text side, but not its card."""
    hashes = hash_tree(folder)
    parts = ("model.json", "model.safetensors", "clip/", "text/", "trunk/", "regions.safetensors")
    return sha256_of_json({name: value for name, value in hashes.items() if name.startswith(parts)})
