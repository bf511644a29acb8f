"""Which outputs on disk are what dvc.lock says, belong together, and come from which commit."""

from __future__ import annotations

import subprocess
from pathlib import Path

from lexiseg.pipeline import hash_dependencies
from lexiseg.tracking.identity import CODE, Lock, hashes, is_own, methods_in, stale

ENCODE_EVALUATE = "encode-evaluate"


class Workplace:
    """The outputs of a working tree, seen against dvc.lock."""

    def __init__(self, root: Path, lock: Lock) -> None:
        self.root, self.lock = root, lock
        methods = methods_in(lock)
        shown = [name for name in lock if name == ENCODE_EVALUATE or any(is_own(name, method) for method in methods)]
        paths = {path for name in shown for path in hashes(lock[name], "outs")}
        code = {path for stage in lock.values() for path in hashes(stage, "deps") if path.startswith(CODE)}
        # Scores are large and nothing is published of them.
        wanted = [path for path in paths if not path.endswith("/predict")]
        there = sorted(path for path in [*wanted, *code] if (root / path).exists())
        # Absolute paths: sync may be called from any folder.
        found = hash_dependencies(root, [str(root / path) for path in there]) if there else {}
        self._disk = {path: found[str(root / path)] for path in there}
        self.commit, self._changed = _git(root)

    def why_not(self, stage: str) -> str | None:
        """Why the result of a stage must not be published, or None when all is well."""
        if stage not in self.lock:
            return f"{stage} has not run"
        for path, value in hashes(self.lock[stage], "outs").items():
            if path not in self._disk:
                return f"{path} is not on disk"
            if self._disk[path] != value:
                return f"{path} is not what dvc.lock says"
        return next(iter(stale(self.lock, stage)), None)

    def code_of(self, stages: list[str]) -> str:
        """The commit that holds the code of these stages, with "-dirty" where it does not hold all of it."""
        used = {
            (path, value)
            for stage in stages
            for path, value in hashes(self.lock[stage], "deps").items()
            if path.startswith(CODE)
        }
        same = all(self._disk.get(path) == value for path, value in used)
        touched = any(_touches(change, path) for change in self._changed for path, _ in used)
        return self.commit if same and not touched else f"{self.commit}-dirty"


def _git(root: Path) -> tuple[str, list[str]]:
    """HEAD and the changed or new paths; "unknown" outside of git."""
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain=v1", "-z", "--no-renames", "--", CODE])
    try:
        head, status = (
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown", []
    return head.strip(), [line[3:] for line in status.split("\0") if line]


def _touches(change: str, path: str) -> bool:
    # git names a folder of new files once, with a slash at its end.
    return change == path or change.startswith(f"{path}/") or (change.endswith("/") and path.startswith(change))
