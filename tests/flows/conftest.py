"""What tests of flows share: Prefect's server of a test, and a finished working tree that is the current one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.working_tree import environment
from prefect.testing.utilities import prefect_test_harness


@pytest.fixture(scope="package")
def prefect() -> Iterator[None]:
    """The server."""
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def current_tree(micro_tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working tree, with the environment of commands in it."""
    for name in [name for name in os.environ if name.startswith(("LEXISEG", "MLFLOW"))]:
        monkeypatch.delenv(name)
    for name, value in environment(micro_tree).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(micro_tree)
    return micro_tree
