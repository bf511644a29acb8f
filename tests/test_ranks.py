from __future__ import annotations

import pytest

from lexiseg.errors import DataError, StageError
from lexiseg.ranks import _own_error, rank, share, world_size


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch):
    def set_to(number: int, size: int) -> None:
        for name, value in {"LEXISEG_TOGETHER": "1", "RANK": str(number), "WORLD_SIZE": str(size)}.items():
            monkeypatch.setenv(name, value)

    return set_to


def test_alone_a_batch_is_ones_own(monkeypatch):
    monkeypatch.delenv("LEXISEG_TOGETHER", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # of a launcher that has nothing to do with us
    monkeypatch.setenv("RANK", "3")
    assert (rank(), world_size(), list(share(3))) == (0, 1, [0, 1, 2])


def test_together_every_position_is_somebodys(ranks):
    parts = []
    for number in range(3):
        ranks(number, 3)
        assert (rank(), world_size()) == (number, 3)
        parts += share(12)
    assert parts == list(range(12))


def test_a_batch_that_cannot_be_divided(ranks):
    ranks(0, 3)
    with pytest.raises(StageError, match="a batch of 4 for `devices: 3`"):
        share(4)


def test_errors_of_ours_are_found_in_what_ray_makes_of_them():
    own = DataError(found="a", allowed="b", fix="c")

    class TaskError(Exception):
        cause = own

    group = RuntimeError("a worker failed")
    group.worker_failures = {1: TaskError()}  # type: ignore[attr-defined]
    outer = RuntimeError("training failed")
    outer.__cause__ = group
    assert _own_error(outer) is own
    assert _own_error(RuntimeError("something else")) is None
