"""What is killed goes on where it was, and ends with the very bytes that it would have had."""

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


def stage(tree: Path, log: Path, name: str = "lseg-train", *, first: str = "") -> subprocess.Popen:
    """The stage's own process, writing a checkpoint after nearly every step; `first` is Python that it starts with."""
    variables = {**environment(tree), "LEXISEG_CHECKPOINT_SECONDS": "0"}
    code = f"{first}\nfrom lexiseg.cli import app\napp(['stage', '{name}'])"
    with log.open("w") as stream:
        return subprocess.Popen([sys.executable, "-c", code], cwd=tree, env=variables, stderr=stream)


def checkpoints(tree: Path, name: str = "lseg-train") -> list[Path]:
    # A file that is being written lies in a folder whose name begins with a dot.
    found = (tree / ".lexiseg/work").glob(f"{name}-*/checkpoints/**/*")
    return sorted(path for path in found if path.is_file() and not path.parent.name.startswith("."))


def kill_in_training(tree: Path, log: Path, how: signal.Signals, name: str = "lseg-train", *, first: str = "") -> None:
    """Start the stage and stop it once it has written a checkpoint of its own."""
    before = {path: path.stat().st_mtime_ns for path in checkpoints(tree, name)}
    process = stage(tree, log, name, first=first)
    deadline = time.monotonic() + 200
    while before == {path: path.stat().st_mtime_ns for path in checkpoints(tree, name)}:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    process.send_signal(how)
    assert process.wait(timeout=60) == (-how if how == signal.SIGKILL else 128 + how), log.read_text()


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
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


def test_killed_trainings_of_stego_end_like_undisturbed_ones(micro_tree, tmp_path):
    """The head; and the probes, two trainings in one stage: whichever is killed, what was finished is kept."""
    log = tmp_path / "log"
    changed = {"train": {"steps": STEPS}, "probe": {"kind": "gradient", "steps": STEPS}}
    change(micro_tree / "params.yaml", {"stego": changed})
    names = {"stego-train": ["train STEGO"], "stego-probe": ["probe clusters", "probe linear"]}
    for name, titles in names.items():
        run(micro_tree, "dvc", "repro", "--single-item", name)
        output = micro_tree / "outputs" / name.replace("-", "/")
        undisturbed = hash_tree(output)
        run(micro_tree, "lexiseg", "clean")
        kill_in_training(micro_tree, log, signal.SIGKILL, name)
        process = stage(micro_tree, log, name)
        assert process.wait(timeout=200) == 0, log.read_text()
        assert f"{titles[0]}: going on after step " in log.read_text()
        assert hash_tree(output) == undisturbed
        assert checkpoints(micro_tree, name) == []


def test_killed_features_keep_their_shards(micro_tree, tmp_path):
    name, log, output = "stego-features", tmp_path / "log", micro_tree / "outputs/stego/features"
    # A shard of one picture, written slowly enough to be killed between two.
    first = """
import time
from lexiseg.methods.stego import features
features._SHARD_BYTES, write = 1, features.save_tensors
def slowly(path, tensors):
    write(path, tensors)
    time.sleep(0.1)
features.save_tensors = slowly
"""
    run(micro_tree, "lexiseg", "clean")
    process = stage(micro_tree, log, name, first=first)
    assert process.wait(timeout=200) == 0, log.read_text()
    undisturbed = hash_tree(output)
    shards = [path.name for path in sorted(output.glob("*.safetensors"))]
    assert len(shards) > 3
    run(micro_tree, "lexiseg", "clean")
    kill_in_training(micro_tree, log, signal.SIGKILL, name, first=first)
    kept = {path.name: path.stat().st_mtime_ns for path in checkpoints(micro_tree, name)}
    assert 0 < len(kept) < len(shards)
    process = stage(micro_tree, log, name, first=first)
    assert process.wait(timeout=200) == 0, log.read_text()
    assert hash_tree(output) == undisturbed
    assert {shard: (output / shard).stat().st_mtime_ns for shard in kept} == kept
