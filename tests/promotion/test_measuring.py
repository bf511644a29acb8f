"""What the processes that measure are given, and what is made of one that says nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from lexiseg.promotion import measuring
from lexiseg.promotion.candidate import Candidate
from lexiseg.promotion.measuring import check_loading, measure_costs


@pytest.fixture
def candidate(tmp_path: Path) -> Candidate:
    return Candidate(method="lseg", version="1", run_id="1", tags={}, folder=tmp_path, pyfunc=tmp_path, card={})


def answering(monkeypatch: pytest.MonkeyPatch, *, stdout: str, stderr: str = "", code: int = 0) -> dict[str, Any]:
    """Processes say this; returns what they are given."""
    given: dict[str, Any] = {}

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        given.update(options, command=command)
        return subprocess.CompletedProcess(command, code, stdout, stderr)

    monkeypatch.setattr(measuring.subprocess, "run", run)
    return given


def test_who_asks_makes_no_difference_to_the_threads(tree, candidate, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    given = answering(monkeypatch, stdout='a word of a library\n{"latency": 1.0, "memory": 2.0}\n')
    assert measure_costs(tree, candidate, "test") == {"latency": 1.0, "memory": 2.0}
    assert given["env"]["OMP_NUM_THREADS"] == "1"


def test_nobody_looked_where_the_process_died(candidate, monkeypatch):
    answering(monkeypatch, stdout="", stderr="Killed\n", code=-9)
    said = check_loading(candidate)
    assert said["fault"] == "exit code -9: Killed"
    assert said["signature"] == "not looked at: the process that looks gave no answer"
