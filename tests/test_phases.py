from __future__ import annotations

import asyncio
import threading

import pytest

from lexiseg.phases import Phases, collect, phase, turn_to


def clock_of(*moments: float):
    return iter(moments).__next__


def test_an_inner_phase_pauses_the_outer_one():
    phases = Phases(clock_of(0.0, 1.0, 3.0, 10.0, 14.0))
    assert phases.turn_to("vision") == ""
    assert phases.turn_to("head") == "vision"
    assert phases.turn_to("vision") == "head"
    phases.turn_to("")
    assert phases.seconds == {"vision": 2.0 + 4.0, "head": 7.0}  # 13 seconds since the first began


def test_phases_are_nested_and_an_error_ends_them():
    with collect() as phases:
        with pytest.raises(ValueError, match="broken"), phase("vision"), phase("head"):
            raise ValueError("broken")
        assert phases.turn_to("") == ""
    assert set(phases.seconds) == {"vision", "head"}


def test_what_follows_belongs_to_the_phase_that_was_turned_to():
    with collect() as phases:
        with phase("decode"):
            turn_to("write")
            assert phases.turn_to("write") == "write"
        assert phases.turn_to("") == ""


def test_nobody_collects():
    with phase("vision"):
        turn_to("head")
    with collect() as phases:
        pass
    assert phases.seconds == {}


def test_every_request_has_phases_of_its_own_in_whatever_thread():
    async def request(name: str) -> set[str]:
        def work() -> None:
            with phase(name):
                ready.wait(timeout=60)  # both are at work at the same time

        with collect() as phases:
            await asyncio.to_thread(work)
        return set(phases.seconds)

    async def both() -> list[set[str]]:
        return list(await asyncio.gather(request("one"), request("two")))

    ready = threading.Barrier(2)
    assert asyncio.run(both()) == [{"one"}, {"two"}]
