"""A graph of three stages over one text file: `first` -> `second` -> `third`, each in milliseconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo

import lexiseg
from lexiseg.settings import Block
from lexiseg.storage import write_text

DVC_YAML = """\
stages:
  first:
    cmd: lexiseg stage first
    deps:
      - data/${data.name}
      - src/lexiseg/code.py
    params:
      - word
    outs:
      - outputs/first
  second:
    cmd: lexiseg stage second
    deps:
      - outputs/first
      - src/lexiseg/code.py
    params:
      - second.times
    metrics:
      - outputs/second/length.txt
    outs:
      - outputs/second/parts
  third:
    cmd: lexiseg stage third
    deps:
      - outputs/first
      - outputs/second/length.txt
    outs:
      - outputs/third/text.txt
"""
PARAMS_YAML = """\
word: b
data:
  name: raw
baselines: []
second:
  times: 2
  unread: 0
"""


class SecondSettings(Block):
    """The block of the stage `second`."""

    times: int
    unread: int


class DataSettings(Block):
    """The block `data`."""

    name: str


class Settings(Block):
    """params.yaml of the small graph."""

    word: str
    data: DataSettings
    baselines: tuple[str, ...]
    second: SecondSettings


class Stages:
    """The stage functions; `ran` keeps the names of those that ran, `meanwhile` is called while one runs."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.meanwhile: Callable[[], Any] = lambda: None

    def function(self, name: str) -> Callable[[Any, Mapping[str, Path], Path], None]:
        """A stage's function by its name."""

        def run(settings: Any, inputs: Mapping[str, Path], outputs: Path) -> None:
            self.ran.append(name)
            getattr(self, name)(settings, inputs, outputs)
            self.meanwhile()

        return run

    def first(self, settings: Any, inputs: Mapping[str, Path], outputs: Path) -> None:
        """The raw text and the word of the settings."""
        write_text(outputs / "text.txt", (inputs["data"] / "raw.txt").read_text() + settings.word)

    def second(self, settings: Any, inputs: Mapping[str, Path], outputs: Path) -> None:
        """The text, repeated, and its length."""
        text = (inputs["first"] / "text.txt").read_text() * settings.second.times
        write_text(outputs / "parts" / "text.txt", text)
        write_text(outputs / "length.txt", str(len(text)))

    def third(self, settings: Any, inputs: Mapping[str, Path], outputs: Path) -> None:
        """The text and the length."""
        text = (inputs["first"] / "text.txt").read_text()
        write_text(outputs / "text.txt", f"{text} {inputs['second/length.txt'].read_text()}")


@contextmanager
def code_of(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the package be that of the tree: its module `code` can be imported."""
    package = root / "src/lexiseg"
    monkeypatch.setattr(lexiseg, "__file__", str(package / "__init__.py"))
    monkeypatch.setattr(lexiseg, "__path__", [*lexiseg.__path__, str(package)])
    sys.modules.pop("lexiseg.code", None)  # of the tree of another test
    yield
    sys.modules.pop("lexiseg.code", None)


def make_small_graph(root: Path) -> Path:
    """A working tree with the graph, under DVC but not under git."""
    root.mkdir(parents=True)
    write_text(root / "dvc.yaml", DVC_YAML)
    write_text(root / "params.yaml", PARAMS_YAML)
    write_text(root / "data/raw/raw.txt", "a")
    write_text(root / "src/lexiseg/code.py", "# code\n")
    Repo.init(str(root), no_scm=True).close()
    return root
