"""Where the time of a prediction goes. Without `collect` around it, `phase` costs a microsecond."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_collecting: ContextVar[Phases | None] = ContextVar("lexiseg phases", default=None)


class Phases:
    """Seconds by phase. Every moment belongs to one phase, so that the sum is the time since the first began.

    One request after another: a phase may begin in another thread than the one before, but not beside it.

    Attributes:
        seconds: name -> seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._clock, self._name, self._since = clock, "", clock()

    def turn_to(self, name: str) -> str:
        """From now on time counts as this phase's; returns the one that ends. "": as nobody's."""
        now, before = self._clock(), self._name
        if before:
            self.seconds[before] = self.seconds.get(before, 0.0) + now - self._since
        self._name, self._since = name, now
        return before


@contextmanager
def collect() -> Iterator[Phases]:
    """Collect the phases of what runs inside, also where it goes on in threads that take over its context."""
    phases = Phases()
    token = _collecting.set(phases)
    try:
        yield phases
    finally:
        _collecting.reset(token)
        phases.turn_to("")


def turn_to(name: str) -> None:
    """What follows counts as this phase's, until the phase around it ends or another begins."""
    phases = _collecting.get()
    if phases is not None:
        phases.turn_to(name)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the time inside as this phase's. It pauses the phase around it, which goes on afterwards.

    On a GPU work is queued: its time counts where its result is waited for.

    Example:
        >>> with collect() as phases, phase("vision"):
        ...     model(image)
        >>> phases.seconds["vision"]
    """
    phases = _collecting.get()
    if phases is None:
        yield
        return
    before = phases.turn_to(name)
    try:
        yield
    finally:
        phases.turn_to(before)
