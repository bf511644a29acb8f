"""The version that is served, and how another one takes its place without a request noticing."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from lexiseg.errors import LexisegError, MissingVersionError

# An ASGI application: the scoring server of MLflow with one model.
App = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Served:
    """A version of a registered model, loaded and tried.

    Attributes:
        name: of the registered model, "lexiseg-lseg".
        number: of the version, "3".
        app: what answers with it.
        loaded_at: UTC.
    """

    name: str
    number: str
    app: App
    loaded_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def label(self) -> str:
        """ "lexiseg-lseg/3"."""
        return f"{self.name}/{self.number}"


class Current:
    """Holds the version that is served. A request asks for it once and keeps it to its end.

    Args:
        find: asks MLflow which version is meant now: (its number, what loads it as a `Served`).
        say: told of what happens, a line each.

    Raises:
        LexisegError: there is no version to begin with, or it cannot be loaded.
    """

    def __init__(
        self,
        find: Callable[[], tuple[str, Callable[[], Served]]],
        *,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        self._find, self._say = find, say
        self._one_at_a_time = threading.Lock()
        self._error: dict[str, str] | None = None
        _, load = find()
        self._served = load()

    @property
    def served(self) -> Served:
        """The version that the next request gets."""
        return self._served

    @property
    def last_error(self) -> dict[str, str] | None:
        """Why the version is not the one it should be: {"what", "kind", "at"}; None where it is. Holds no paths."""
        return self._error

    def refresh(self) -> bool:
        """Ask MLflow again, and serve what is meant now; returns whether that is another version than before.

        The new version is loaded and tried while the old one answers. Where that fails, the old one stays, and
        `last_error` says so until it works. The reason is said in full, here only: it may hold paths.
        """
        with self._one_at_a_time:
            what = "MLflow cannot be asked which version is meant"
            try:
                number, load = self._find()
                if number == self._served.number:
                    self._error = None
                    return False
                what = f"version {number} cannot be loaded"
                started = time.monotonic()
                served = load()
            except MissingVersionError as error:
                self._note("MLflow has no such alias or version any more", error)
                return False
            except Exception as error:  # whatever is wrong with it, the old version is there
                self._note(what, error)
                return False
            before, self._served, self._error = self._served, served, None
            self._say(f"{before.label} -> {served.label}, loaded and tried in {time.monotonic() - started:.1f} s")
            return True

    def _note(self, what: str, error: Exception) -> None:
        before, kind = self._error or {}, type(error).__name__
        self._error = {"what": what, "kind": kind, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        if (before.get("what"), before.get("kind")) != (what, kind):  # it is tried again and again
            reason = str(error) if isinstance(error, LexisegError) else f"{kind}: {error}"
            self._say(f"{what}; {self._served.label} goes on\n{reason}")
