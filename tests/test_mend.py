from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.shell_graph import make_shell_graph, repro

from lexiseg.mend import mend
from lexiseg.pipeline import read_lock
from lexiseg.storage import read_json, write_json, write_text


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LEXISEG_HOME", raising=False)
    return make_shell_graph(tmp_path / "tree")


def test_half_written_files_of_dvc_are_mended(tree):
    repro(tree)
    assert mend(tree) == []
    whole = (tree / "dvc.lock").read_bytes()
    for cut in (0, whole.index(b"second") + 4, len(whole) - 45):
        write_text(tree / "dvc.lock", whole[:cut].decode())
        write_text(tree / ".dvc/tmp/rwlock", '{"read": {')
        assert len(mend(tree)) == 2, whole[:cut]
        assert read_lock(tree) == {}  # not under git here
        assert repro(tree) == dict.fromkeys(("first", "second", "third"), "restore")
        assert (tree / "dvc.lock").read_bytes() == whole


def test_a_lock_that_ends_early_but_is_one_is_left_alone(tree):
    repro(tree)
    whole = (tree / "dvc.lock").read_text()
    write_text(tree / "dvc.lock", whole[: whole.index("  third:")])
    assert mend(tree) == []
    assert repro(tree) == {"first": "nothing", "second": "nothing", "third": "restore"}


def test_locks_of_processes_that_are_gone_are_dropped(tree):
    repro(tree)
    table = tree / ".dvc/tmp/rwlock"
    # As dvc writes it of itself: sys.argv, whose first word is a file where the process was started by -m.
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", "repro", "first"])
    gone = subprocess.Popen(["true"])
    gone.wait()
    living = {"pid": other.pid, "cmd": "/somewhere/dvc/__main__.py repro first"}
    dead, reused = {"pid": gone.pid, "cmd": "dvc repro"}, {"pid": os.getpid(), "cmd": "dvc repro first"}
    try:
        write_json(table, {"read": {"a": [dead, living], "b": [reused]}, "write": {"c": dead, "d": living}})
        assert mend(tree) == [".dvc/tmp/rwlock held 3 locks of processes that are gone; they are removed"]
        assert read_json(table) == {"read": {"a": [living]}, "write": {"d": living}}
        assert mend(tree) == []
    finally:
        other.kill()
        other.wait()


def test_the_locks_of_a_dvc_that_works_are_left(tree):
    text = (tree / "dvc.yaml").read_text()
    wait = "until [ -e go ]; do sleep 0.05; done; cat data/raw"
    write_text(tree / "dvc.yaml", text.replace("cat data/raw", wait))
    working = subprocess.Popen([sys.executable, "-m", "dvc", "repro", "first"], cwd=tree)
    table = tree / ".dvc/tmp/rwlock"
    deadline = time.monotonic() + 60
    while not (table.is_file() and "repro" in table.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert mend(tree) == []
    (tree / "go").touch()
    assert working.wait(timeout=60) == 0


def test_a_clone_without_files_of_dvc_is_mended_too(tree):
    shutil.rmtree(tree / ".dvc/tmp")
    write_text(tree / "dvc.lock", "schema: '2.0'\nstages:\n  first:\n    cm")
    assert mend(tree) == ["dvc.lock was half-written; it is removed"]
