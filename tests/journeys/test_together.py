"""Several commands in one working tree at once: nothing is lost or damaged, and each says what it waits for."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from helpers.working_tree import change, copy_of, environment, run

from lexiseg.storage import hash_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_two_repros_a_flow_and_predictions(micro_tree, tmp_path):
    change(micro_tree / "params.yaml", {"lseg": {"train": {"steps": 60}}, "baseline": {"linear": {"steps": 20}}})
    undisturbed = copy_of(micro_tree, tmp_path / "undisturbed" / "lexiseg")
    run(undisturbed, "dvc", "repro")
    logs = tmp_path / "logs"
    logs.mkdir()

    def start(name: str, *command: str) -> subprocess.Popen:
        with (logs / name).open("w") as stream:
            return subprocess.Popen(command, cwd=micro_tree, env=environment(micro_tree), stdout=stream, stderr=stream)

    predict = ["lexiseg", "predict", "docs/pictures/scene.png", "--labels", "sky, ring", "--out"]
    running = {
        "flow": start("flow", sys.executable, "flows/reproduce.py"),
        "one": start("one", "dvc", "repro"),
        "two": start("two", "dvc", "repro", "lseg-register"),
    }
    ended: dict[str, int] = {}
    predictions = 0
    deadline = time.monotonic() + 500
    while len(ended) < len(running):
        assert time.monotonic() < deadline
        predictions += 1
        done = subprocess.run(
            [*predict, f"predictions/{predictions}"],
            cwd=micro_tree,
            env=environment(micro_tree),
            text=True,
            capture_output=True,
            timeout=200,
        )
        # The model is out of its place while it is registered anew; a prediction then says so in three parts.
        assert done.returncode == 0 or "to do: " in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        for name, process in running.items():
            if (code := process.poll()) is not None:
                ended[name] = code
    text = {path.name: path.read_text() for path in logs.iterdir()}
    assert ended["flow"] == 0, text["flow"]
    for name in ("one", "two"):  # dvc does not wait: it says which process has the files, or that it is locked
        assert ended[name] == 0 or "is busy" in text[name] or "Unable to acquire lock" in text[name], text[name]
    # Whatever each of them did, the results are those of one alone, and dvc has recorded them all.
    assert "up to date" in run(micro_tree, "dvc", "repro").stdout
    assert hash_tree(micro_tree / "outputs") == hash_tree(undisturbed / "outputs")
    # Nothing was computed twice: a second process found the result of the first.
    assert sum(said.count("train LSeg:   0%") for said in text.values()) == 1
    assert run(micro_tree, "dvc", "status", "--json").stdout.strip() == "{}"
