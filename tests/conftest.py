"""Fixtures of several folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.working_tree import copy_of, finished_micro_tree


@pytest.fixture(scope="session")
def _finished_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Every worker of xdist has a base folder of its own; the one above is common to all.
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base
    return finished_micro_tree(shared / "finished" / "lexiseg")


@pytest.fixture
def micro_tree(_finished_tree: Path, tmp_path: Path) -> Path:
    """A small working tree after `dvc repro`, the test's own."""
    return copy_of(_finished_tree, tmp_path / "lexiseg")
