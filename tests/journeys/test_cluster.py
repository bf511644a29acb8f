"""Prepare on a Ray cluster, against prepare without one."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers.working_tree import change, environment

from lexiseg.storage import hash_tree


def prepare(root: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lexiseg", "stage", "prepare"],
        cwd=root,
        env=environment(root) | variables,
        text=True,
        capture_output=True,
        timeout=280,
    )


def test_prepare_gives_the_same_with_ray(micro_tree):
    # Four shards of 64 samples and a rest, each examined by another process.
    change(micro_tree / "data/world/world.yaml", {"splits": {"train": {"count": 300}}})
    done = prepare(micro_tree)
    assert done.returncode == 0, done.stderr
    alone = hash_tree(micro_tree / "outputs/prepare")
    shutil.rmtree(micro_tree / ".lexiseg/work")
    shutil.rmtree(micro_tree / "outputs/prepare")
    done = prepare(micro_tree, LEXISEG_RAY="local", RAY_TMPDIR=tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    assert done.returncode == 0, done.stderr
    assert hash_tree(micro_tree / "outputs/prepare") == alone


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_cluster_that_is_not_there_is_told_of(micro_tree, address):
    shutil.rmtree(micro_tree / ".lexiseg/work")
    done = prepare(micro_tree, LEXISEG_RAY=address)
    assert done.returncode == 1
    assert f"no Ray cluster at {address}" in done.stderr
    assert "ray start --head" in done.stderr
    assert "Traceback" not in done.stderr
