"""Trainings that several processes share, against the same in one process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers.working_tree import change, environment
from safetensors.torch import load_file

# Of a weight after three steps of Adam at a rate of 0.001: sums of float32 in another order, and where a gradient is
# all but zero its sign, too.
TOLERANCE = 2e-5
LONGER = {"tcl": {"train": {"steps": 40, "batch": 8}}}


def start(root: Path, stage: str, *, devices: int, **variables: str) -> subprocess.Popen[str]:
    change(root / "params.yaml", {"devices": devices})
    shutil.rmtree(root / "outputs" / stage.replace("-", "/"), ignore_errors=True)
    return subprocess.Popen(
        [sys.executable, "-m", "lexiseg", "stage", stage],
        cwd=root,
        env=environment(root) | {"LEXISEG_CHECKPOINT_SECONDS": "0"} | variables,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def train(root: Path, stage: str, *, devices: int, **variables: str) -> str:
    process = start(root, stage, devices=devices, **variables)
    text = process.communicate(timeout=280)[1]
    assert process.returncode == 0, text
    return text


def other_rank(process: subprocess.Popen[str]) -> psutil.Process | None:
    with suppress(psutil.Error):
        for child in psutil.Process(process.pid).children():
            if "lexiseg.stages.rank" in child.cmdline():
                return child
    return None


def in_the_middle(root: Path, process: subprocess.Popen[str]) -> psutil.Process:
    """Waits until a shared training has a checkpoint; returns rank 1."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        rank = other_rank(process)
        if rank and list((root / ".lexiseg/work").glob("tcl-train-*/checkpoints/*.ckpt")):
            return rank
        time.sleep(0.02)
    raise AssertionError("no checkpoint came")


def result(root: Path, stage: str) -> tuple[dict[str, torch.Tensor], list[str], dict[str, Any]]:
    folder = root / "outputs" / stage.replace("-", "/")
    lines = (folder / "curve.csv").read_text().splitlines()
    return load_file(folder / "model.safetensors"), lines, json.loads((folder / "model.json").read_text())


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.mark.parametrize("how", ["processes", pytest.param("ray", marks=pytest.mark.slow)])
def test_two_processes_learn_what_one_does(micro_tree, how):
    """TCL has no statistics of the batch: its CLIP is frozen."""
    train(micro_tree, "tcl-train", devices=1)
    alone, curve, config = result(micro_tree, "tcl-train")
    variables = {}
    if how == "ray":
        variables = {"LEXISEG_RAY": "local", "RAY_TMPDIR": tempfile.mkdtemp(prefix="ray-", dir="/tmp")}
    train(micro_tree, "tcl-train", devices=2, **variables)
    together, shared_curve, shared_config = result(micro_tree, "tcl-train")
    assert difference(alone, together) < TOLERANCE
    assert shared_config == config
    assert len(shared_curve) == len(curve)
    for one, other in zip(curve[1:], shared_curve[1:], strict=True):
        assert [float(value) for value in other.split(",")] == pytest.approx(
            [float(value) for value in one.split(",")], rel=1e-3
        )


def test_batch_norms_see_their_own_part_on_cpus(micro_tree):
    """LSeg has batch norms, which torch does not synchronise there: two processes learn something else."""
    train(micro_tree, "lseg-train", devices=1)
    alone, _, config = result(micro_tree, "lseg-train")
    train(micro_tree, "lseg-train", devices=2)
    together, _, shared_config = result(micro_tree, "lseg-train")
    assert config == shared_config
    assert 1e-4 < difference(alone, together) < 0.2


def test_a_process_that_is_killed_ends_the_others_and_the_training_goes_on(micro_tree):
    change(micro_tree / "params.yaml", LONGER)
    train(micro_tree, "tcl-train", devices=2)
    whole, curve, _ = result(micro_tree, "tcl-train")
    shutil.rmtree(micro_tree / ".lexiseg/work")
    process = start(micro_tree, "tcl-train", devices=2)
    in_the_middle(micro_tree, process).kill()
    text = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert "another process of the training ended with exit code -9" in text
    assert "`dvc repro` goes on from the last checkpoint" in text
    text = train(micro_tree, "tcl-train", devices=2)
    assert "going on after step" in text
    resumed, resumed_curve, _ = result(micro_tree, "tcl-train")
    assert difference(whole, resumed) == 0
    assert resumed_curve == curve


def test_a_shared_training_is_stopped_whole(micro_tree):
    change(micro_tree / "params.yaml", LONGER)
    process = start(micro_tree, "tcl-train", devices=2)
    rank = in_the_middle(micro_tree, process)
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 143
    _, alive = psutil.wait_procs([rank], timeout=30)
    assert not alive
    assert "going on after step" in train(micro_tree, "tcl-train", devices=2)


def test_an_error_of_the_stage_is_its_own(micro_tree):
    (micro_tree / "outputs/prepare/info.json").unlink()
    process = start(micro_tree, "tcl-train", devices=2)
    text = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert "error (DataError)\nfound: no prepared data set in" in text
    assert "Traceback" not in text


def test_batches_that_cannot_be_divided_are_refused(micro_tree):
    process = start(micro_tree, "tcl-train", devices=3)
    text = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert "tcl.train.batch 4 cannot be divided among devices: 3" in text
