"""What a killed dvc leaves behind: it writes its own files in place, not whole or not at all."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexiseg.storage import atomic_path, write_json

# File -> the lock under which dvc writes it.
_LOCKED_BY = {"dvc.lock": "lock", ".dvc/tmp/rwlock": "rwlock.lock"}


def damaged(root: Path) -> list[Path]:
    """Files of DVC that a killed dvc left half-written; it writes them in place, not whole or not at all."""
    return [root / name for name in _LOCKED_BY if not _is_whole(root / name)]


def mend(root: Path) -> list[str]:
    """Put right what a killed dvc left behind.

    A half-written dvc.lock goes back to the committed one (no result is lost: DVC's cache and the work folders know
    them), a half-written table of path locks is removed, and from a whole one the locks of processes that are gone:
    another process may get their number. What a living dvc is writing is left alone.

    Returns:
        What was done, in words; empty where all is well.
    """
    from dvc.lock import LockError, make_lock

    done = []
    folder = root / ".dvc" / "tmp"
    folder.mkdir(parents=True, exist_ok=True)  # a fresh clone has none
    for path in damaged(root):
        name = path.relative_to(root).as_posix()
        try:
            with make_lock(str(folder / _LOCKED_BY[name]), tmp_dir=str(folder)):
                if not _is_whole(path):
                    done.append(f"{name} was half-written; {_restore(root, name)}")
        except LockError:
            continue  # whoever holds it for seconds is at work
    table = folder / "rwlock"
    if table.is_file():
        try:
            with make_lock(str(folder / "rwlock.lock"), tmp_dir=str(folder)):
                count = _drop_dead_locks(table) if _is_whole(table) else 0
        except LockError:
            count = 0
        if count:
            done.append(f".dvc/tmp/rwlock held {count} locks of processes that are gone; they are removed")
    return done


def _drop_dead_locks(table: Path) -> int:
    """Remove from dvc's table what belongs to no living dvc; returns the number of entries removed."""
    import psutil

    def lives(info: Mapping[str, Any]) -> bool:
        # The program's own name differs: a file for `python -m dvc`, whose command line says -m.
        arguments = info["cmd"].partition(" ")[2]
        try:
            return " ".join(psutil.Process(info["pid"]).cmdline()).endswith(arguments)
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return True

    locks = json.loads(table.read_text(encoding="utf-8"))
    read = {path: [info for info in infos if lives(info)] for path, infos in locks.get("read", {}).items()}
    write = {path: info for path, info in locks.get("write", {}).items() if info and lives(info)}
    kept = {"read": {path: infos for path, infos in read.items() if infos}, "write": write}
    before = sum(map(len, locks.get("read", {}).values())) + len(locks.get("write", {}))
    after = sum(map(len, kept["read"].values())) + len(write)
    if after < before:
        write_json(table, kept)
    return before - after


def _restore(root: Path, name: str) -> str:
    committed = subprocess.run(["git", "show", f"HEAD:./{name}"], cwd=root, capture_output=True, check=False)
    if committed.returncode:
        (root / name).unlink()
        return "it is removed"
    with atomic_path(root / name) as temporary:
        temporary.write_bytes(committed.stdout)
    return "it is the committed one again"


def _is_whole(path: Path) -> bool:
    if not path.is_file():
        return True
    if path.name == "dvc.lock":
        return _is_whole_lock(path)
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _is_whole_lock(path: Path) -> bool:
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError
    from voluptuous import Invalid

    try:
        COMPILED_LOCKFILE_SCHEMA(YAML(typ="safe").load(path.read_text(encoding="utf-8")) or {})
    except (YAMLError, UnicodeDecodeError, Invalid):
        return False
    return path.stat().st_size > 0
