from __future__ import annotations

import pickle

import pytest

from lexiseg import errors


def kinds() -> list[type[errors.LexisegError]]:
    return [errors.LexisegError, *errors.LexisegError.__subclasses__()]


@pytest.mark.parametrize("kind", kinds())
def test_every_error_says_three_things_and_survives_worker_processes(kind):
    error = kind(found="a", allowed="b", fix="c")
    assert str(error) == "found: a\nallowed: b\nto do: c"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (again.found, again.allowed, again.fix) == ("a", "b", "c")
