from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from dvc.repo import Repo

from lexiseg import driver
from lexiseg.driver import StoppedError, allow, reproduce_stage, run_group, split_lines, stop_all
from lexiseg.errors import DataError, StageError
from lexiseg.pipeline import OUTPUTS
from lexiseg.storage import write_text

DVC_YAML = """\
stages:
  first:
    cmd: bash run.sh
    deps:
      - data.txt
      - run.sh
    outs:
      - outputs/first.txt
"""


@pytest.fixture(autouse=True)
def _nothing_is_stopped() -> Iterator[None]:
    allow()  # a flow of another test may have ended by a stop
    yield
    allow()


def graph(root: Path, command: str) -> Path:
    """A working tree with one stage that runs a shell command."""
    write_text(root / "dvc.yaml", DVC_YAML)
    write_text(root / "run.sh", command)
    write_text(root / "data.txt", "a")
    if not (root / ".dvc").is_dir():
        Repo.init(str(root), no_scm=True).close()
    (root / OUTPUTS).mkdir(exist_ok=True)
    return root


def left_of(group: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def test_lines_come_when_they_are_written_and_bars_as_lines_of_their_own(tmp_path):
    lines = []
    script = "printf 'one\\ntwo'; printf '\\r 50%%'; printf '\\r100%%\\n\\n'; echo bad >&2; exit 3"
    code, last = run_group(["bash", "-c", script], tmp_path, say=lines.append)
    assert code == 3
    assert lines == last == ["one", "two", " 50%", "100%", "bad"]


def test_a_line_is_passed_on_before_the_command_ends(tmp_path):
    # The command waits for a file that is only made once its first line has arrived.
    def say(line: str) -> None:
        (tmp_path / "seen").touch()

    code, _ = run_group(
        ["bash", "-c", "echo one; until [ -e seen ]; do sleep 0.05; done"], tmp_path, say=say, timeout=60
    )
    assert code == 0


def test_split_lines_takes_the_last_one_without_an_end(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"a\r\nb\xff\n  \nlast")
    with path.open("rb") as stream:
        assert list(split_lines(stream)) == ["a", "b�", "last"]


def test_a_timeout_stops_all_processes_of_the_command(tmp_path):
    script = "sleep 300 & python -c 'import time; time.sleep(300)' & echo $$; wait"
    lines = []
    with pytest.raises(StoppedError, match="because its time was over") as caught:
        run_group(["bash", "-c", script], tmp_path, say=lines.append, timeout=3.0)
    assert caught.value.expired
    assert left_of(int(lines[0])) == []


def test_who_closes_its_output_before_it_ends_is_waited_for(tmp_path):
    script = """
import os, signal, sys, time
if os.fork() == 0:
    def leave(*_):
        os.close(1); os.close(2); time.sleep(2); os._exit(0)
    signal.signal(signal.SIGTERM, leave)
    print(os.getpgid(0), flush=True)
time.sleep(300)
"""
    lines = []

    def say(line: str) -> None:
        lines.append(line)
        threading.Thread(target=stop_all).start()

    with pytest.raises(StoppedError):
        run_group([sys.executable, "-c", script], tmp_path, say=say)
    assert left_of(int(lines[0])) == []


def test_what_ignores_sigterm_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "GRACE", 0.5)
    script = "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.getpid()); time.sleep(300)"
    lines = []

    def say(line: str) -> None:
        lines.append(line)
        threading.Thread(target=stop_all).start()

    with pytest.raises(StoppedError):
        run_group([sys.executable, "-u", "-c", script], tmp_path, say=say)
    assert left_of(int(lines[0])) == []


def test_stop_all_stops_what_runs(tmp_path):
    caught = []

    def work() -> None:
        try:
            run_group(["sleep", "300"], tmp_path, say=print)
        except StoppedError as error:
            caught.append(error.expired)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while len(driver._running) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    stop_all()
    for thread in threads:
        thread.join(timeout=30)
    assert caught == [False, False]
    with pytest.raises(StoppedError):  # nor does anything begin that was waiting for its turn
        run_group(["touch", "begun"], tmp_path, say=print)
    assert not (tmp_path / "begun").exists()
    allow()
    assert run_group(["touch", "begun"], tmp_path, say=print)[0] == 0


def test_outcomes_are_what_dvc_did(tmp_path):
    root = graph(tmp_path, "cp data.txt outputs/first.txt")
    assert reproduce_stage(root, "first", say=print) == "ran"
    assert reproduce_stage(root, "first", say=print) == "unchanged"
    (root / "outputs/first.txt").unlink()
    assert reproduce_stage(root, "first", say=print) == "restored"
    graph(root, "echo 'first: finished before, linking the result' && cp data.txt outputs/first.txt")
    assert reproduce_stage(root, "first", say=print) == "linked"


def test_the_error_of_a_stage_comes_as_it_is(tmp_path):
    text = "error (DataError)\\nfound: two\\nlines\\nallowed: some\\nto do: this"
    root = graph(tmp_path, f"printf '{text}\\n' && exit 1")
    with pytest.raises(DataError) as caught:
        reproduce_stage(root, "first", say=print)
    assert (caught.value.found, caught.value.allowed, caught.value.fix) == ("two\nlines", "some", "this")


def test_any_other_end_names_the_last_line(tmp_path):
    root = graph(tmp_path, "exit 7")
    with pytest.raises(StageError, match=r"first failed with exit code \d+: .*exited with 7"):
        reproduce_stage(root, "first", say=print)


def test_another_dvc_is_waited_for(tmp_path):
    root = graph(tmp_path, "touch begun && until [ -e go ]; do sleep 0.05; done && cp data.txt outputs/first.txt")
    other = subprocess.Popen([sys.executable, "-m", "dvc", "repro", "-s", "first"], cwd=root)
    deadline = time.monotonic() + 60
    while not (root / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lines = []

    def say(line: str) -> None:
        lines.append(line)
        if "waiting for it" in line:
            (root / "go").touch()

    assert reproduce_stage(root, "first", say=say, patience=60) == "unchanged"
    assert other.wait(timeout=60) == 0
    waiting = "first: another dvc works on the same files; waiting for it"
    assert lines.count(waiting) == 1
    assert any("is busy" in line for line in lines[: lines.index(waiting)])  # dvc's own words name the process
    assert not any("is busy" in line for line in lines[lines.index(waiting) :])


def test_waiting_for_another_dvc_has_an_end(tmp_path):
    root = graph(tmp_path, "touch begun && until [ -e go ]; do sleep 0.05; done && cp data.txt outputs/first.txt")
    other = subprocess.Popen([sys.executable, "-m", "dvc", "repro", "-s", "first"], cwd=root)
    try:
        deadline = time.monotonic() + 60
        while not (root / "begun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(StageError, match="another dvc works on the files of first"):
            reproduce_stage(root, "first", say=print, patience=0)
    finally:
        (root / "go").touch()
        assert other.wait(timeout=60) == 0
