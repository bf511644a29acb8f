"""A model's way to production and back, by the commands that a user types: repro, sync, promote, serve, rollback."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers.serving import png, request, serving, until
from helpers.working_tree import change, environment, run

from lexiseg.data.dataset import PreparedSplit
from lexiseg.storage import read_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def command(tree: Path, *arguments: str, code: int = 0) -> str:
    """A command that ends with this exit code; what it printed."""
    done = subprocess.run(
        ["lexiseg", *arguments], cwd=tree, env=environment(tree), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def another(tree: Path, lr: float) -> float:
    """Train at another rate and register what comes out; returns its mIoU on test."""
    change(tree / "params.yaml", {"lseg": {"train": {"lr": lr}}})
    run(tree, "dvc", "repro", "--quiet", "lseg-register")
    assert "lexiseg-lseg" in command(tree, "sync")
    return read_json(tree / "outputs/lseg/evaluate/metrics.json")["splits"]["test"]["miou"]


def gates(tree: Path, **changed: Any) -> None:
    change(tree / "params.yaml", {"promotion": {"latency": 60_000.0, "memory": 60_000.0, **changed}})


def test_to_production_and_back(micro_tree):
    tree = micro_tree
    picture = png(PreparedSplit(tree / "outputs/prepare", "test").image(0))
    # The models of this tree can nothing; that the gates hold back is seen below.
    gates(tree, floors={"lseg": {"miou": 0.0}}, least_pictures=4)
    command(tree, "sync")
    assert "would be promoted" in command(tree, "promote", "lseg", "--to", "production", "--check")
    assert "nothing was decided yet, no version is production" in command(tree, "history", "lseg")
    assert "promoted version 1" in command(tree, "promote", "lseg", "--to", "production")

    with serving(tree, "lseg@production", "--watch", "0") as server:

        def answered_by() -> str:
            answer = server.ask(request(picture))
            assert answer.status_code == 200, answer.text
            return answer.headers["X-Lexiseg-Model"]

        assert answered_by() == "lexiseg-lseg/1"
        scores = {"2": another(tree, 0.01), "3": another(tree, 0.1)}
        better, worse = sorted(scores, key=scores.__getitem__, reverse=True)
        assert scores[better] > scores[worse]
        # Four pictures tell no two models apart for sure, so for the better one the interval may reach far down.
        gates(tree, margin=-0.9)
        assert "promoted" in command(tree, "promote", "lseg", "--version", better, "--to", "production")
        assert answered_by() == "lexiseg-lseg/1"  # until it looks
        server.look()
        until(lambda: answered_by() == f"lexiseg-lseg/{better}", "the promoted version to be served")

        gates(tree, margin=0.0)
        refused = command(tree, "promote", "lseg", "--version", worse, "--to", "production", code=1)
        assert f"refused version {worse}: difference: -" in refused
        assert "to do: a better model" in refused
        server.look()
        assert answered_by() == f"lexiseg-lseg/{better}"

        assert "rolled back to version 1" in command(tree, "rollback", "lseg", "--reason", "a test")
        server.look()
        until(lambda: answered_by() == "lexiseg-lseg/1", "the version of before to be served")

    told = json.loads(command(tree, "history", "lseg", "--json"))
    assert (told["production"], told["faults"]) == ("1", [])
    assert [one["outcome"] for one in told["decisions"]] == ["promoted", "promoted", "refused", "rolled back"]
    assert [one["number"] for one in told["decisions"]] == [1, 2, 3, 4]
    assert f"# lexiseg-lseg, version {better}" in command(tree, "card", "lseg", "--version", better)
