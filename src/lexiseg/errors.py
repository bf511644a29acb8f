"""One form for every error a user can meet: what was found, what is allowed, what to do now."""

from __future__ import annotations

from collections.abc import Sequence


class LexisegError(Exception):
    """An error that a user can act on.

    Args:
        found: what was found (value, file, line or key).
        allowed: what would have been right.
        fix: what to do now, with a command where there is one.
    """

    def __init__(self, *, found: str, allowed: str, fix: str) -> None:
        self.found, self.allowed, self.fix = found, allowed, fix
        super().__init__(f"found: {found}\nallowed: {allowed}\nto do: {fix}")

    def __reduce__(self):
        # Keyword-only arguments do not survive the default pickling, which worker processes rely on.
        return _rebuild, (type(self), self.found, self.allowed, self.fix)


def _rebuild(kind: type[LexisegError], found: str, allowed: str, fix: str) -> LexisegError:
    return kind(found=found, allowed=allowed, fix=fix)


class SettingsError(LexisegError):
    """params.yaml (or an override) holds unknown keys or wrong values; all of them are named at once."""


class DataError(LexisegError):
    """Raw or prepared data cannot be used."""


class ModelError(LexisegError):
    """A model folder, weight file or encoder cannot be used."""


class LabelError(LexisegError):
    """The labels asked for cannot be used: none, empty, twice the same, or outside the text table."""


class StageError(LexisegError):
    """A stage cannot start or must not publish its result."""


class ChangedError(StageError):
    """Data, code or settings changed under a stage or under trials that rest on them."""


class StorageError(LexisegError):
    """Files cannot be written: the disk is full, or the user may not write there."""


class TrackingError(LexisegError):
    """MLflow cannot be reached or written."""


class MissingVersionError(TrackingError):
    """MLflow answers, and has no such model, alias or version."""


class PromotionError(LexisegError):
    """There is nothing to decide on: no such version, one that is production already, or nothing to go back to."""


class ServingError(LexisegError):
    """A server cannot start."""


def error_in(lines: Sequence[str]) -> LexisegError | None:
    """The last error in three parts that a command of lexiseg ended in, made anew from what it printed."""
    text = "\n".join(lines)
    _, mark, body = text.rpartition("error (")
    kind = globals().get(body.partition(")")[0]) if mark else None
    if not isinstance(kind, type) or not issubclass(kind, LexisegError):
        return None
    parts: dict[str, str] = {}
    key = ""
    for line in body.splitlines()[1:]:
        start = next((part for part in ("found", "allowed", "to do") if line.startswith(f"{part}: ")), None)
        key = start or key
        if key:
            parts[key] = line.removeprefix(f"{start}: ") if start else f"{parts[key]}\n{line}"
        if key == "to do":  # what follows is of others: a bar that was left open, dvc
            break
    if len(parts) != 3:
        return None
    return kind(found=parts["found"], allowed=parts["allowed"], fix=parts["to do"])
