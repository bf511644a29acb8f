"""A working tree whose graph has run, and a registry with one model in production."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.registered import Registry
from helpers.working_tree import change, copy_of

# The models of the small tree are no good, and the machine of a test may be slow.
GATES = {"floors": {"lseg": {"miou": 0.2}, "tcl": {}, "stego": {}}, "latency": 60_000.0, "memory": 60_000.0}


@pytest.fixture
def tree(_finished_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working tree, with MLflow's database in it."""
    root = copy_of(_finished_tree, tmp_path / "lexiseg", linked=True)
    for name in [name for name in os.environ if name.startswith(("LEXISEG", "MLFLOW_TRACKING"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(root)
    change(root / "params.yaml", {"promotion": GATES})
    return root


@pytest.fixture
def registry(tree: Path) -> Registry:
    """Its registry, empty."""
    return Registry(tree)
