"""docs/serving.md against a server: its commands run as they stand, but for the port."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
from helpers.serving import Server, png, request, serving, until
from helpers.working_tree import SOURCE, environment
from test_docs import Block, blocks_of, commands_of

PAGE = SOURCE / "docs/serving.md"
SERVE, MLFLOW = "lexiseg serve lseg@production --port 8080", "mlflow models serve"


@pytest.fixture(scope="module")
def server(registered: Path) -> Iterator[Server]:
    """What the page's first command starts, on a free port."""
    first, *_ = blocks_of(PAGE.read_text(encoding="utf-8"))
    assert commands_of(first) == [SERVE]
    with serving(
        registered, *shlex.split(SERVE.removeprefix("lexiseg serve ").removesuffix(" --port 8080"))
    ) as started:
        yield started


def run_block(block: Block, tree: Path, port: int) -> str:
    text = block.text if block.language == "python" else "\n".join(commands_of(block))
    assert "127.0.0.1:8080" in text, f"line {block.line} asks no server"
    text = text.replace("127.0.0.1:8080", f"127.0.0.1:{port}")
    command = [sys.executable, "-c", text] if block.language == "python" else ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(command, cwd=tree, env=environment(tree), text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, f"line {block.line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_blocks_of_the_page(registered, server):
    said = {}
    for block in blocks_of(PAGE.read_text(encoding="utf-8")):
        if SERVE not in block.text and MLFLOW not in block.text:
            said[block.language, block.line] = run_block(block, registered, server.port)
    curl, python, error, health = said.values()
    assert list(json.loads(curl)["predictions"][0]) == ["label_map", "legend", "segments"]
    assert "% of the picture" in python
    assert "(64, 64) lexiseg-lseg/1 wait;dur=" in python
    shown = re.findall(r"^```json\n(.*?)\n```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    (expected,) = map(json.loads, shown)
    assert json.loads(error)["error_code"] == expected["error_code"]
    assert json.loads(error)["message"].startswith(expected["message"].removesuffix("…"))
    assert json.loads(health)["status"] == "ok"


def test_the_numbers_of_the_page(server):
    text = PAGE.read_text(encoding="utf-8")
    defaults = dict(re.findall(r"^\| `--([a-z-]+)` \| ([\d,]+)", text, flags=re.MULTILINE))
    limits = server.health()["limits"]
    assert {name: int(value.replace(",", "")) for name, value in defaults.items()} == {
        "max-body": limits["body_bytes"] / 1e6,
        "max-pictures": limits["pictures"],
        "max-pixels": limits["pixels"],
        "max-labels": limits["labels"],
        "calls": limits["calls"],
        "queue": limits["queue"],
    }
    assert f"at most {limits['label_characters']} characters" in text
    assert f"A body has {limits['body_seconds']:g} s" in text


@pytest.mark.slow
def test_plain_mlflow_answers_the_same(registered, server):
    picture = png(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8))
    (block,) = [block for block in blocks_of(PAGE.read_text(encoding="utf-8")) if MLFLOW in block.text]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = "\n".join(commands_of(block)).replace("8081", str(port))
    log = registered.parent / "mlflow.log"
    with log.open("w") as errors:
        plain = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=registered,
            env=environment(registered),
            stdout=errors,
            stderr=errors,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        assert plain.poll() is None, log.read_text()
        try:
            return requests.get(f"{url}/ping", timeout=10).ok
        except requests.ConnectionError:
            return False

    try:
        until(is_up, "MLflow's server")
        answer = requests.post(f"{url}/invocations", json=request(picture), timeout=60)
        assert answer.json() == server.ask(request(picture)).json()
    finally:
        os.killpg(plain.pid, signal.SIGTERM)
        plain.wait(timeout=30)
