"""A training that is killed goes on where it was, and ends with the very weights that it would have had."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.working_tree import change, environment, run

from lexiseg.storage import hash_tree

STEPS = 60


def stage(tree: Path, log: Path) -> subprocess.Popen:
    """The stage's own process, writing a checkpoint after nearly every step."""
    variables = {**environment(tree), "LEXISEG_CHECKPOINT_SECONDS": "0"}
    with log.open("w") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "lexiseg", "stage", "lseg-train"], cwd=tree, env=variables, stderr=stream
        )


def checkpoints(tree: Path) -> list[Path]:
    return sorted((tree / ".lexiseg/work").glob("lseg-train-*/checkpoints/*.ckpt"))


def kill_in_training(tree: Path, log: Path, how: signal.Signals) -> None:
    """Start the training and stop it once it has written a checkpoint of its own."""
    before = {path: path.stat().st_mtime_ns for path in checkpoints(tree)}
    process = stage(tree, log)
    deadline = time.monotonic() + 200
    while all(before.get(path) == path.stat().st_mtime_ns for path in checkpoints(tree)):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    process.send_signal(how)
    assert process.wait(timeout=60) == (-how if how == signal.SIGKILL else 128 + how), log.read_text()


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_trainings_end_like_an_undisturbed_one(micro_tree, tmp_path, workers):
    # The parameter of the loader's processes is part of the fingerprint, so both runs have the same.
    change(micro_tree / "params.yaml", {"lseg": {"train": {"steps": STEPS, "workers": workers}}})
    run(micro_tree, "dvc", "repro", "--single-item", "lseg-train")
    undisturbed = hash_tree(micro_tree / "outputs/lseg/train")
    run(micro_tree, "lexiseg", "clean")
    for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        kill_in_training(micro_tree, tmp_path / "log", how)
    assert len(checkpoints(micro_tree)) == 1
    process = stage(micro_tree, tmp_path / "log")
    assert process.wait(timeout=200) == 0, (tmp_path / "log").read_text()
    assert "train LSeg: going on after step " in (tmp_path / "log").read_text()
    assert hash_tree(micro_tree / "outputs/lseg/train") == undisturbed
    assert checkpoints(micro_tree) == []  # finished work needs none
    run(micro_tree, "dvc", "commit", "--quiet", "--force", "lseg-train")
    assert run(micro_tree, "dvc", "status", "lseg-train", "--json").stdout.strip() == "{}"


def test_other_settings_start_anew(micro_tree, tmp_path):
    change(micro_tree / "params.yaml", {"lseg": {"train": {"steps": STEPS}}})
    kill_in_training(micro_tree, tmp_path / "log", signal.SIGKILL)
    change(micro_tree / "params.yaml", {"lseg": {"train": {"lr": 0.002, "steps": 2}}})
    process = stage(micro_tree, tmp_path / "log")
    assert process.wait(timeout=200) == 0
    assert "going on after" not in (tmp_path / "log").read_text()
    assert (micro_tree / "outputs/lseg/train/curve.csv").read_text().count("\n") == 3  # the head and two steps


def test_code_that_is_edited_during_training_does_not_lose_the_result(micro_tree, tmp_path):
    change(micro_tree / "params.yaml", {"lseg": {"train": {"steps": STEPS}}})
    run(micro_tree, "dvc", "repro", "--single-item", "lseg-train")
    undisturbed = hash_tree(micro_tree / "outputs/lseg/train")
    run(micro_tree, "lexiseg", "clean")
    code = micro_tree / "src/lexiseg/methods/lseg/module.py"
    before = code.read_text(encoding="utf-8")
    process = stage(micro_tree, tmp_path / "log")
    deadline = time.monotonic() + 200
    while not checkpoints(micro_tree):
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.01)
    code.write_text(before + "\nraise RuntimeError\n", encoding="utf-8")
    assert process.wait(timeout=200) == 1
    text = (tmp_path / "log").read_text()
    assert "found: src/lexiseg/methods/lseg changed while lseg-train ran" in text
    assert "the result is kept" in text
    code.write_text(before, encoding="utf-8")
    again = stage(micro_tree, tmp_path / "log")
    assert again.wait(timeout=200) == 0
    assert "finished before, linking the result" in (tmp_path / "log").read_text()
    assert hash_tree(micro_tree / "outputs/lseg/train") == undisturbed
