"""The Makefile: what a newcomer types first."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from helpers.working_tree import SOURCE, environment, run, take_as_installed

MAKEFILE = SOURCE / "Makefile"


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(folder), text=True, capture_output=True, timeout=280)


def test_help_lists_every_target(tmp_path):
    shutil.copy(MAKEFILE, tmp_path)
    shown = re.findall(r"^  make ([a-z-]+) +\S", make(tmp_path).stdout, flags=re.MULTILINE)
    targets = re.findall(r"^([a-z][a-z-]*):", MAKEFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(shown) == sorted(set(targets) - {"a-clone"})


def test_an_old_python_is_refused(tmp_path):
    shutil.copy(MAKEFILE, tmp_path)
    take_as_installed(tmp_path)
    (tmp_path / ".venv/installed").unlink()
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\ncase \"$2\" in *'%d.%d'*) echo 3.9.18;; *) exit 1;; esac\n")
    old.chmod(0o755)
    done = make(tmp_path, "install", f"PYTHON={old}")
    assert done.returncode != 0
    assert f"found: {old} is 3.9.18" in done.stderr
    assert "allowed: Python 3.11 or newer" in done.stderr
    assert "to do: install one" in done.stderr
    assert not any((tmp_path / ".venv").iterdir())


def test_a_folder_without_git_is_refused(tmp_path):
    shutil.copy(MAKEFILE, tmp_path)
    take_as_installed(tmp_path)
    done = make(tmp_path, "repro")
    assert done.returncode != 0
    assert f"found: {tmp_path} is not a git working tree" in done.stderr
    assert "allowed: a clone" in done.stderr
    assert "to do: git clone" in done.stderr


def test_repro_runs_the_graph_publishes_and_reports(micro_tree):
    done = make(micro_tree, "repro")
    assert done.returncode == 0, done.stderr
    places = [done.stdout.index(text) for text in ("data/world is there", "up to date", "lexiseg-lseg", "mIoU")]
    assert places == sorted(places)
    assert run(micro_tree, "git", "status", "--short").stdout == ""


def test_repro_fetches_the_embedded_data(micro_tree):
    # As in a fresh clone: neither the data nor DVC's cache.
    for folder in ("data/world", "data/embedded", ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(micro_tree / folder)
    shutil.copytree(SOURCE / "data/embedded", micro_tree / "data/embedded")
    shutil.copy(SOURCE / "data.dvc", micro_tree / "data.dvc")
    text = make(micro_tree, "repro", "--dry-run").stdout
    command = re.search(r"dvc pull --remote embedded data/world", text)
    assert command, text
    run(micro_tree, *command.group().split())
    assert (micro_tree / "data/world/world.yaml").is_file()


@pytest.mark.slow
def test_ui_serves_the_runs(micro_tree):
    run(micro_tree, "lexiseg", "sync")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        ["make", "ui", f"PORT={port}"],
        cwd=micro_tree,
        env=environment(micro_tree),
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout
        assert f"http://127.0.0.1:{port}" in server.stdout.readline() + server.stdout.readline()
        assert _answer(f"http://127.0.0.1:{port}/health", seconds=120) == "OK"
    finally:
        subprocess.run(["kill", "--", f"-{server.pid}"], check=False)
        server.wait(timeout=30)


def _answer(address: str, *, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5) as response:
                return response.read().decode()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
