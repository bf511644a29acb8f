from __future__ import annotations

import pytest

from lexiseg.errors import MissingVersionError, ModelError, TrackingError
from lexiseg.serving.current import Current, Served


class Registry:
    """Says which version is meant, and loads it, unless it is broken."""

    def __init__(self) -> None:
        self.number, self.broken, self.away = "1", set(), False
        self.loaded, self.said = [], []

    def find(self):
        if self.away:
            raise TrackingError(found="no MLflow at /home/me", allowed="one", fix="start it")
        number = self.number

        def load():
            self.loaded.append(number)
            if number in self.broken:
                raise ModelError(found="/home/me/model is damaged", allowed="a whole one", fix="copy it")
            return Served(name="lexiseg-lseg", number=number, app=lambda *_: None)

        return number, load


@pytest.fixture
def registry():
    return Registry()


@pytest.fixture
def current(registry):
    return Current(registry.find, say=registry.said.append)


def test_the_same_version_is_loaded_once(registry, current):
    assert current.served.label == "lexiseg-lseg/1"
    assert not current.refresh()
    assert registry.loaded == ["1"]
    assert registry.said == []


def test_a_request_keeps_the_version_it_began_with(registry, current):
    begun = current.served
    registry.number = "2"
    assert current.refresh()
    assert (begun.number, current.served.number) == ("1", "2")
    assert registry.said[0].startswith("lexiseg-lseg/1 -> lexiseg-lseg/2, loaded and tried in ")


def test_a_broken_version_is_tried_again_and_told_of_once(registry, current):
    registry.number, registry.broken = "2", {"2"}
    assert not current.refresh()
    assert not current.refresh()
    assert registry.loaded == ["1", "2", "2"]
    assert current.served.number == "1"
    assert (current.last_error["what"], current.last_error["kind"]) == ("version 2 cannot be loaded", "ModelError")
    assert "/home" not in str(current.last_error)
    (said,) = registry.said
    assert said.startswith("version 2 cannot be loaded; lexiseg-lseg/1 goes on\nfound: /home/me/model is damaged")
    registry.broken = set()
    assert current.refresh()
    assert (current.served.number, current.last_error) == ("2", None)


def test_the_way_back_ends_the_trouble(registry, current):
    registry.number, registry.broken = "2", {"2"}
    current.refresh()
    registry.number = "1"
    assert not current.refresh()
    assert current.last_error is None
    assert registry.loaded == ["1", "2"]


def test_mlflow_is_away_for_a_while(registry, current):
    registry.away = True
    current.refresh()
    assert current.last_error["what"] == "MLflow cannot be asked which version is meant"
    registry.away, registry.number = False, "2"
    assert current.refresh()
    assert current.last_error is None


def test_an_alias_that_was_taken_away(registry, current, monkeypatch):
    def find():
        raise MissingVersionError(found="no alias", allowed="one", fix="set it")

    with monkeypatch.context() as patched:
        patched.setattr(current, "_find", find)
        assert not current.refresh()
        assert current.last_error["what"] == "MLflow has no such alias or version any more"
        assert current.served.number == "1"
    current.refresh()
    assert current.last_error is None


def test_an_error_that_nobody_thought_of(registry, current):
    def find():
        raise ZeroDivisionError("oh")

    current._find = find
    assert not current.refresh()
    assert current.last_error["kind"] == "ZeroDivisionError"
    assert registry.said == [
        "MLflow cannot be asked which version is meant; lexiseg-lseg/1 goes on\nZeroDivisionError: oh"
    ]


def test_there_has_to_be_a_version_to_begin_with(registry):
    registry.broken = {"1"}
    with pytest.raises(ModelError):
        Current(registry.find)
