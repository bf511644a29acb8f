"""Files written whole or not at all, and weights read without executing code."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lexiseg.errors import ModelError, StorageError

_FULL = (
    "enough free space; nothing is half-written",
    "make room (`lexiseg clean` and `dvc gc -w` help), then run it again",
)
_CLOSED = (
    "a place that this user may read and may write to",
    "change its permissions or choose another place, then run it again",
)
_REFUSED = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EACCES: _CLOSED,
    errno.EPERM: _CLOSED,
    errno.EROFS: _CLOSED,
    errno.EEXIST: _CLOSED,
    errno.ENOTDIR: _CLOSED,
}


@contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """Give a temporary path beside `target`; rename it to `target` when the block ends without an error.

    The temporary path may be written as a file or made a folder. After an error (a full disk, say) it is
    removed and `target` is as it was.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        temporary, old = folder / target.name, folder / f"{target.name}.old"
        yield temporary
        if temporary.is_dir() or target.is_dir():  # a folder is not replaced in one step, as a file is
            if target.exists():
                target.rename(old)
            try:
                temporary.rename(target)
            except OSError:
                if old.exists():
                    old.rename(target)
                raise
        else:
            os.replace(temporary, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def refused_write(error: OSError) -> StorageError | None:
    """The error a user can act on behind one of the system's; None for what is no matter of space or permission."""
    if error.errno not in _REFUSED:
        return None
    written = error.filename2 or error.filename  # of a copy, the goal
    place = f": {written}" if written else ""
    allowed, fix = _REFUSED[error.errno]
    return StorageError(found=f"{os.strerror(error.errno)}{place}", allowed=allowed, fix=fix)


def link_file(source: Path, target: Path) -> None:
    """Give a file a second name; a copy, where the file system has no hard links or the target is on another one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_text(target: Path | str, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: Path | str, value: Any) -> None:
    """Write `value` as sorted, indented JSON, atomically: equal values give equal bytes."""
    write_text(target, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def sha256_of_file(path: Path | str, *more: Path | str) -> str:
    """Hex sha256 of a file's bytes, or of several files one after the other (`cat a b | sha256sum`)."""
    digest = hashlib.sha256()
    for one in (path, *more):
        with open(one, "rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hex sha256 of a JSON value in its canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_tree(root: Path | str, *, pattern: str = "*") -> dict[str, str]:
    """sha256 of every file below `root`, keyed by its path relative to `root` (posix, sorted)."""
    root = Path(root)
    files = sorted(path for path in root.rglob(pattern) if path.is_file())
    return {path.relative_to(root).as_posix(): sha256_of_file(path) for path in files}


def save_tensors(target: Path | str, tensors: dict) -> None:
    """Write tensors as safetensors, atomically and without metadata (more than one key is not reproducible)."""
    from safetensors.torch import save

    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)  # save_file would make it readable for this user alone


def check_sha256(path: Path | str, sha256: str) -> None:
    """Refuse a weight file that is not the expected one.

    Raises:
        ModelError: it is missing or has another hash.
    """
    _require_file(Path(path))
    if (actual := sha256_of_file(path)) != sha256:
        raise ModelError(
            found=f"{path} has sha256 {actual}",
            allowed=f"sha256 {sha256}, as the settings say",
            fix="fetch the file again, or put the new hash into params.yaml if the change is meant",
        )


def load_tensors(path: Path | str, *, sha256: str | None = None) -> dict:
    """Read the tensors of a weight file without executing code.

    Args:
        path: a `.safetensors` file, or a pickle made by `torch.save` that holds tensors (or a
            `state_dict` entry with them); anything in a pickle that is not plain data is refused.
        sha256: expected hash; checked before the file is opened.

    Raises:
        ModelError: the file is missing, has another hash, is damaged, or would execute code.
    """
    path = Path(path)
    _require_file(path)
    if sha256:
        check_sha256(path, sha256)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ModelError(
                found=f"{path} is not a readable safetensors file ({error})",
                allowed="a complete .safetensors file",
                fix="fetch or export the file again",
            ) from error
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle ends in nearly any kind of error
        # torch's own text recommends to read such a file with its code.
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {named[1]}" if named else type(error).__name__
        raise ModelError(
            found=f"{path} is damaged or holds more than tensors and plain data ({reason})",
            allowed="a checkpoint that torch.load(weights_only=True) reads; code in a weight file is never executed",
            fix="export the weights as safetensors where you trust the file, then use that",
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(
            found=f"{path} holds no table of tensors",
            allowed="a state_dict, or a checkpoint with the key `state_dict`",
            fix="save `model.state_dict()` and use that file",
        )
    return state


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ModelError(
            found=f"no weight file at {path}",
            allowed="a .safetensors file or a PyTorch checkpoint",
            fix="check the path; `lexiseg weights add FILE` copies a file into weights/",
        )
