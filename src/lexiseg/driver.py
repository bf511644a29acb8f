"""Drive the graph stage by stage from outside of DVC: what the Prefect flow does with every stage.

A command runs in a process group of its own, its lines are passed on as they come, and it can be stopped whole:
SIGTERM first, so that a training writes its checkpoint, SIGKILL for what is left after a while.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Literal

from lexiseg.errors import LexisegError, StageError, error_in
from lexiseg.pipeline import is_busy

Outcome = Literal["ran", "linked", "restored", "unchanged"]
# Seconds between SIGTERM and SIGKILL. A step of a training and its checkpoint fit in, and it is less than the 30 after
# which Prefect kills a flow that it has cancelled.
GRACE = 20.0
KILL = 10.0  # seconds for the kernel to end what got SIGKILL
PAUSE = 2.0  # seconds between two tries while dvc is busy
# What DVC and the stage say -> what happened.
_OUTCOMES: dict[str, Outcome] = {
    "didn't change, skipping": "unchanged",
    "is cached - skipping run": "restored",
    "finished before, linking the result": "linked",
}
_running: set[int] = set()  # process groups
_changing = threading.Lock()
_stopping = threading.Event()  # nothing is started any more


class StoppedError(Exception):
    """A command was stopped with all its processes.

    Args:
        what: the command.
        expired: its time was over; otherwise somebody called `stop_all`.
    """

    def __init__(self, what: str, *, expired: bool) -> None:
        self.expired = expired
        super().__init__(f"{what} was stopped{' because its time was over' if expired else ''}")


def reproduce_stage(
    root: Path, name: str, *, say: Callable[[str], None], timeout: float | None = None, patience: float = 86400.0
) -> Outcome:
    """Bring one stage up to date by `dvc repro`; what it needs has to be.

    While another dvc works on the same files this waits, and says so. A finished result is never lost to a lock: DVC
    may drop it, but the work folder has it and the next try links it.

    Args:
        root: the working tree.
        name: the stage, as in dvc.yaml.
        say: called with every line that dvc and the stage print, in the calling thread.
        timeout: seconds for one try; then the whole process group is stopped.
        patience: seconds to go on trying while another dvc is busy.

    Raises:
        LexisegError: the stage failed; where it said why in three parts, the very error.
        StoppedError: its time was over, or `stop_all` was called.
    """
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name]
    deadline = time.monotonic() + patience
    waiting = False
    while True:
        held = _Held(say, hold=waiting)
        code, lines = run_group(command, root, say=held, timeout=timeout)
        if not is_busy(lines):
            held.release()
        if code == 0:
            text = "\n".join(lines)
            outcomes: list[Outcome] = [outcome for words, outcome in _OUTCOMES.items() if words in text]
            return outcomes[0] if outcomes else "ran"
        if not is_busy(lines):
            raise _error(name, code, lines)
        if time.monotonic() > deadline:
            raise StageError(
                found=f"another dvc works on the files of {name}, since more than {patience:.0f} s",
                allowed="one dvc at a time for the same files",
                fix="let it end, or stop it; dvc's message above names its process",
            )
        if not waiting:
            say(f"{name}: another dvc works on the same files; waiting for it")
        waiting = True
        _stopping.wait(PAUSE)


def run_group(
    command: Sequence[str], root: Path, *, say: Callable[[str], None], timeout: float | None = None
) -> tuple[int, list[str]]:
    """Run a command in a process group of its own, in `root` and with its package.

    Returns:
        The exit code, and its last 200 lines.

    Raises:
        StoppedError: its time was over, or `stop_all` was called.
    """
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root / "src"), os.environ.get("PYTHONPATH")]))
    with _changing:
        if _stopping.is_set():
            raise StoppedError(" ".join(command), expired=False)
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        _running.add(process.pid)
    expired = threading.Event()

    def end() -> None:
        expired.set()
        stop_groups([process.pid])

    timer = threading.Timer(timeout, end) if timeout is not None else None
    if timer:
        timer.daemon = True
        timer.start()
    lines: deque[str] = deque(maxlen=200)
    try:
        assert process.stdout
        for line in split_lines(process.stdout):
            lines.append(line)
            say(line)
        code = process.wait()
    except BaseException:
        stop_groups([process.pid])
        raise
    finally:
        if timer:
            timer.cancel()
        with _changing:
            stopped = process.pid not in _running
            _running.discard(process.pid)
    if stopped or expired.is_set():
        # Another thread stops the group. A dying process closes its output before it is gone, so its last line is not
        # the end of it yet.
        _wait_until_gone([process.pid], GRACE + KILL)
        raise StoppedError(" ".join(command), expired=expired.is_set())
    return code, list(lines)


def allow() -> None:
    """Let commands run again after `stop_all`."""
    _stopping.clear()


def stop_all() -> None:
    """Stop every process group that `run_group` started and that is still there, and start no other until `allow`."""
    with _changing:
        _stopping.set()
        groups = sorted(_running)
        _running.clear()
    stop_groups(groups)


def stop_groups(groups: Sequence[int], *, grace: float | None = None) -> None:
    """End process groups: SIGTERM, and after `grace` seconds (GRACE) SIGKILL. Returns when no process is left."""
    for number, seconds in ((signal.SIGTERM, GRACE if grace is None else grace), (signal.SIGKILL, KILL)):
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, number)
        _wait_until_gone(groups, seconds)


def split_lines(stream: IO[bytes]) -> Iterator[str]:
    """The lines of a stream as they come; what a progress bar writes over itself counts as lines of their own."""
    rest = b""
    while chunk := stream.read1(65536):  # type: ignore[attr-defined]
        *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
        yield from (text for line in lines if (text := line.decode("utf-8", "replace").rstrip()))
    if rest.strip():
        yield rest.decode("utf-8", "replace").rstrip()


def _wait_until_gone(groups: Sequence[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while _living(groups) and time.monotonic() < deadline:
        time.sleep(0.05)


def _living(groups: Sequence[int]) -> list[int]:
    """The processes of the groups; zombies, which only wait for their parent, do not count."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) in groups and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


class _Held:
    """Passes lines on, at once or from the moment that the stage runs.

    While another dvc is waited for, every try ends in dvc's long message; it is shown once.
    """

    def __init__(self, say: Callable[[str], None], *, hold: bool) -> None:
        self._say, self._hold, self._lines = say, hold, []

    def __call__(self, line: str) -> None:
        if line.startswith("Running stage "):
            self.release()
        if self._hold:
            self._lines.append(line)
        else:
            self._say(line)

    def release(self) -> None:
        self._hold = False
        for line in self._lines:
            self._say(line)
        self._lines = []


def _error(name: str, code: int, lines: Sequence[str]) -> LexisegError:
    """The stage's own error where its last lines hold one in three parts."""
    found = error_in(lines)
    if found is not None:
        return found
    last = lines[-1].removeprefix(f"ERROR: failed to reproduce '{name}': ") if lines else "it said nothing"
    return StageError(
        found=f"{name} failed with exit code {code}: {last}",
        allowed="a stage that ends without an error",
        fix=f"see its log above; `dvc repro --single-item {name}` repeats it",
    )
