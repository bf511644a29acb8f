"""A graph of three stages of shell commands, which dvc runs in milliseconds: `first` -> `second` -> `third`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from dvc.repo import Repo

from lexiseg.storage import write_text

DVC_YAML = """\
stages:
  first:
    cmd: mkdir -p outputs/first && cat data/raw/raw.txt params.yaml > outputs/first/text.txt
    deps:
      - data/raw
    params:
      - word
    outs:
      - outputs/first
  second:
    cmd: mkdir -p outputs/second && wc -l < outputs/first/text.txt > outputs/second/length.txt
    deps:
      - outputs/first
    params:
      - second
    outs:
      - outputs/second/length.txt
  third:
    cmd: mkdir -p outputs/third && cat outputs/second/length.txt > outputs/third/text.txt
    deps:
      - outputs/second/length.txt
    outs:
      - outputs/third/text.txt
"""
PARAMS = "word: {word}\nsecond:\n  steps: {steps}\n  batch: 8\n"


def make_shell_graph(root: Path) -> Path:
    """A working tree with the graph, under DVC but not under git."""
    write_text(root / "dvc.yaml", DVC_YAML)
    write_text(root / "data/raw/raw.txt", "a\n")
    (root / ".lexiseg").mkdir()
    Repo.init(str(root), no_scm=True).close()
    set_params(root)
    return root


def set_params(root: Path, *, word: str = "b", steps: int = 2) -> None:
    write_text(root / "params.yaml", PARAMS.format(word=word, steps=steps))


def repro(root: Path, *arguments: str) -> dict[str, str]:
    """`dvc repro`, and what it says that it did with each stage."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro", *arguments], cwd=root, text=True, capture_output=True, check=True
    )
    words = {"is cached - skipping run": "restore", "didn't change, skipping": "nothing"}
    said = dict.fromkeys(re.findall(r"Running stage '(\w+)'", done.stdout), "run")
    for text, action in words.items():
        said |= dict.fromkeys(re.findall(rf"Stage '(\w+)' {text}", done.stdout), action)
    return said
