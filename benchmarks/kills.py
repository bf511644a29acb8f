"""Kill the graph at random moments, go on, and compare with an undisturbed run.

    python benchmarks/kills.py --kills 50 --jobs 2 --out benchmarks/results/kills.json

Each kill has a small working tree of its own, in which LSeg (or the tiny CLIP too) is to be trained, predicted,
evaluated and registered. Something is killed by SIGKILL, then `dvc repro` (or the flow) is started again; nothing else
is done but `lexiseg mend` where a killed dvc left its own file half-written, which is counted. It is a pass if the
outputs have the hashes of the undisturbed run, MLflow has one run per method, no lock is left, and nothing is left
after `lexiseg clean`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
from mlflow import MlflowClient

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.working_tree import change, environment, finished_micro_tree, run

from lexiseg.checkpoint import load_checkpoint
from lexiseg.provenance import made_with
from lexiseg.storage import hash_tree, write_json

ROOT = Path(__file__).parents[1]
TARGET = "lseg-register"
CHECKPOINT_SECONDS = 0.5
STEPS = 60
LIMIT = 300.0  # seconds for anything to happen

# Kind of kill -> how often among 50, and what is waited for.
KINDS = {
    "step of lseg-train": 8,
    "step of lseg-train, 2 loaders": 6,
    "step of encode": 6,
    "checkpoint being written": 6,
    "dvc saving": 7,
    "stage, any time": 3,
    "dvc, any time": 4,
    "dvc and stage, any time": 3,
    "loader process": 2,
    "flow, any time": 3,
    "prefect worker, any time": 2,
}


# All trees deploy under one name.
ONE_DEPLOYMENT = threading.Lock()


class Missed(Exception):  # noqa: N818  no error: the moment had passed
    """The kill would not have hit what it was meant for."""


class Trial:
    """One working tree, one kill, one repetition."""

    def __init__(self, base: Path, folder: Path, kind: str, number: int, server: str) -> None:
        self.kind, self.number, self.server = kind, number, server
        self.random = random.Random(number)
        self.tree = folder / "lexiseg"
        shutil.copytree(base, self.tree, symlinks=True)
        set_up(self.tree, variant_of(kind))
        self.variables = environment(self.tree) | {
            "LEXISEG_CHECKPOINT_SECONDS": str(CHECKPOINT_SECONDS),
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_LOGGING_LEVEL": "INFO",
        }
        self.log = folder / "log"
        self.began = time.time()
        self.notes: dict[str, Any] = {}

    # ---- the kill ------------------------------------------------------------------------------------------

    def disturb(self) -> None:
        """Start the graph and kill what the kind says, when it says."""
        kind = self.kind
        if kind.startswith("prefect worker"):
            run_in(self, "prefect", "--no-prompt", "deploy", "--all")
            started = run_in(self, "prefect", "deployment", "run", "reproduce/lseg")
            self.flow_run = re.findall(r"UUID: (\S+)", started)[0]
            process = self.start("prefect", "worker", "start", "--pool", "lexiseg-cpu")
            wait(lambda: self.stage_process() is not None, process, self.log)
        elif kind.startswith("flow"):
            process = self.start(sys.executable, "flows/reproduce.py", "--method", "lseg")
            wait(lambda: self.stage_process() is not None, process, self.log)
        else:
            process = self.start("dvc", "repro", TARGET)
        try:
            getattr(self, f"_{re.sub('[^a-z]+', '_', kind.split(',')[0])}")(process)
        finally:
            process.wait(timeout=LIMIT)

    def _step_of_lseg_train(self, process: subprocess.Popen) -> None:
        self._kill_in_training(process, "lseg-train")

    def _step_of_encode(self, process: subprocess.Popen) -> None:
        self._kill_in_training(process, "encode")

    def _kill_in_training(self, process: subprocess.Popen, stage: str) -> None:
        wait(lambda: bool(self.checkpoints(stage)), process, self.log, pause=0.01)
        first = self.newest(stage)
        time.sleep(self.random.uniform(0, 2.5))
        target = self.held(stage)
        step, written = self.newest(stage)
        if self.finished(stage) or step == STEPS:
            target.resume()
            raise Missed
        self.notes["seconds since checkpoint"] = round(time.time() - written, 2)
        if written > first[1]:  # the rate at which this training went
            rate = (step - first[0]) / (written - first[1])
            self.notes["steps lost"] = min(round(rate * (time.time() - written), 1), STEPS - step)
        self.notes["checkpoint at step"] = step
        kill(target.pid)
        if self.random.random() < 0.5:  # the machine's way to die: all at once
            kill(process.pid, group=True)

    def _checkpoint_being_written(self, process: subprocess.Popen) -> None:
        skip = self.random.randint(0, 5)
        seen: set[Path] = set()

        def parts() -> list[Path]:
            places = (self.tree / ".lexiseg/work").glob("lseg-train-*/checkpoints/.*.part")
            return [part for part in places if any(part.iterdir())]

        while len(seen) <= skip:
            wait(lambda: bool(set(parts()) - seen) or self.finished("lseg-train"), process, self.log, pause=0.0)
            if self.finished("lseg-train"):
                raise Missed
            target = self.held("lseg-train")
            left = parts()
            seen.update(left)
            if len(seen) <= skip or not left:
                skip = min(skip, len(seen))
                target.resume()
                continue
            kill(target.pid)
            self.notes["half-written"] = {file.name: file.stat().st_size for part in left for file in part.iterdir()}
            return
        raise Missed

    def _dvc_saving(self, process: subprocess.Popen) -> None:
        wait(lambda: self.stage_process("lseg-train") is not None, process, self.log, pause=0.002)
        wait(lambda: self.stage_process("lseg-train") is None, process, self.log, pause=0.002)
        time.sleep(self.random.uniform(0, 0.35))
        dvc = psutil.Process(process.pid)
        dvc.suspend()
        if self.stage_process() is not None or not self.finished("lseg-train"):
            dvc.resume()
            raise Missed
        text = (self.tree / "dvc.lock").read_text(errors="replace")
        self.notes["dvc.lock"] = f"{len(text)} characters, {'with' if 'steps: 60' in text else 'without'} the new run"
        kill(process.pid)

    def _stage(self, process: subprocess.Popen) -> None:
        self._any_time()
        wait(lambda: self.stage_process() is not None, process, self.log)
        kill(self.held("").pid)

    def _dvc(self, process: subprocess.Popen) -> None:
        self._any_time()
        kill(process.pid)

    def _dvc_and_stage(self, process: subprocess.Popen) -> None:
        self._any_time()
        kill(process.pid, group=True)

    def _loader_process(self, process: subprocess.Popen) -> None:
        def loaders() -> list[psutil.Process]:
            stage = self.stage_process("lseg-train")
            return stage.children() if stage and self.checkpoints("lseg-train") else []

        wait(lambda: bool(loaders()), process, self.log)
        for loader in loaders():
            kill(loader.pid)
            return
        raise Missed

    def _flow(self, process: subprocess.Popen) -> None:
        self._any_time()
        kill(process.pid)

    def _prefect_worker(self, process: subprocess.Popen) -> None:
        self._any_time()
        kill(process.pid)

    def _any_time(self) -> None:
        time.sleep(self.random.uniform(0, 18))

    # ---- going on, and the comparison ----------------------------------------------------------------------

    def go_on(self) -> None:
        """What a user does next."""
        command = ["dvc", "repro", TARGET]
        if self.kind.startswith("prefect worker"):
            worker = self.start("prefect", "worker", "start", "--pool", "lexiseg-cpu")
            wait(lambda: state_of(self.server, self.flow_run) == "COMPLETED", worker, self.log, pause=1.0)
            kill(worker.pid, group=True)  # it has nothing left to do
            worker.wait(timeout=LIMIT)
            return
        if self.kind.startswith("flow"):
            command = [sys.executable, "flows/reproduce.py", "--method", "lseg"]
        for attempt in range(3):
            done = self.finish(*command)
            if done == 0:
                self.notes["repetitions"] = attempt + 1
                break
            mended = run(self.tree, "lexiseg", "mend").stdout
            if "nothing to mend" not in mended:
                self.notes["mended"] = mended.strip()
        else:
            raise AssertionError(f"`{' '.join(command)}` failed three times:\n{self.log.read_text()[-3000:]}")

    def faults(self, expected: dict[str, str]) -> list[str]:
        """What is not as it should be."""
        found = []
        text = self.log.read_text(errors="replace")
        self.notes["went on after step"] = [int(step) for step in re.findall(r"going on after step (\d+)", text)]
        actual = hash_tree(self.tree / "outputs/lseg")
        if actual != expected:
            found.append(f"outputs differ: {sorted(k for k in expected if actual.get(k) != expected[k])}")
        run(self.tree, "lexiseg", "sync")
        client = MlflowClient(f"sqlite:///{self.tree}/.lexiseg/mlflow.db")
        runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
        names = Counter(one.info.run_name for one in runs)
        if set(names.values()) != {1} or "lseg" not in names:
            found.append(f"MLflow's runs: {dict(names)}")
        if run(self.tree, "dvc", "status", TARGET, "--json").stdout.strip() != "{}":
            found.append("dvc status is not clean")
        left = [process.cmdline() for process in of_tree(self.tree)]
        if left:
            found.append(f"processes: {left}")
        run(self.tree, "lexiseg", "clean")
        table = self.tree / ".dvc/tmp/rwlock"
        locks = json.loads(table.read_text()) if table.is_file() else {}
        if any(locks.values()):
            found.append(f"locks of dvc: {locks}")
        places = [self.tree / "outputs", self.tree / ".lexiseg"]
        rest = [path for place in places for path in place.rglob("*.part")]
        rest += list((self.tree / ".lexiseg/work").glob("*"))
        rest += list((self.tree / ".lexiseg/copies").glob("*"))
        if rest:
            found.append(f"left after clean: {[str(path.relative_to(self.tree)) for path in rest]}")
        return found

    # ---- tools ---------------------------------------------------------------------------------------------

    def start(self, *command: str) -> subprocess.Popen:
        variables = self.variables | ({"PREFECT_API_URL": self.server} if "worker" in self.kind else {})
        with self.log.open("a") as stream:
            return subprocess.Popen(
                command, cwd=self.tree, env=variables, stdout=stream, stderr=stream, start_new_session=True
            )

    def finish(self, *command: str) -> int:
        return self.start(*command).wait(timeout=LIMIT)

    def stage_process(self, name: str = "") -> psutil.Process | None:
        """The process of a stage that is running in the tree."""
        found = {}
        for process in of_tree(self.tree):
            with suppress(psutil.Error):
                words = process.cmdline()
                if words[-2:-1] == ["stage"] and words[-1].startswith(name) and "python" in words[0]:
                    found[process.pid] = process
        # Processes of a loader have the words of their parent.
        with suppress(psutil.Error):
            return next((process for process in found.values() if process.ppid() not in found), None)
        return None

    def checkpoints(self, stage: str) -> list[Path]:
        return sorted((self.tree / ".lexiseg/work").glob(f"{stage}-*/checkpoints/*.ckpt"))

    def newest(self, stage: str) -> tuple[int, float]:
        """Step and time of the newest checkpoint."""
        with suppress(FileNotFoundError):  # finished work keeps none
            for path in self.checkpoints(stage):
                written = path.stat().st_mtime
                if checkpoint := load_checkpoint(path):
                    return checkpoint.step, written
        return STEPS, time.time()

    def finished(self, stage: str) -> bool:
        """Whether the stage's work under the present settings is done; the base tree's is another."""
        done = (self.tree / ".lexiseg/work").glob(f"{stage}-*/finished.json")
        return any(path.stat().st_mtime > self.began for path in done)

    def held(self, name: str) -> psutil.Process:
        """The process of a running stage, stopped so that it can be looked at before it is killed."""
        target = self.stage_process(name)
        if target is None:
            raise Missed
        try:
            target.suspend()
        except psutil.NoSuchProcess:
            raise Missed from None
        return target


def variant_of(kind: str) -> str:
    return "encode" if "encode" in kind else "loaders" if "loader" in kind else "plain"


def set_up(tree: Path, variant: str) -> None:
    """Settings under which the target is stale."""
    workers = 2 if variant == "loaders" else 0
    change(tree / "params.yaml", {"lseg": {"train": {"steps": STEPS, "workers": workers}}})
    if variant == "encode":
        change(tree / "params.yaml", {"encode": {"pretrain": {"steps": STEPS}}, "lseg": {"train": {"steps": 6}}})


def of_tree(tree: Path) -> list[psutil.Process]:
    """All living processes that work in a tree."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == tree:
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill(pid: int, *, group: bool = False) -> None:
    with suppress(ProcessLookupError):  # it may have ended by itself
        os.killpg(pid, signal.SIGKILL) if group else os.kill(pid, signal.SIGKILL)


def wait(what: Callable[[], bool], process: subprocess.Popen, log: Path, *, pause: float = 0.05) -> None:
    deadline = time.monotonic() + LIMIT
    while not what():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"it did not come to that; exit code {process.poll()}\n{log.read_text()[-3000:]}")
        time.sleep(pause)


def run_in(trial: Trial, *command: str) -> str:
    variables = trial.variables | {"PREFECT_API_URL": trial.server}
    done = subprocess.run(
        command, cwd=trial.tree, env=variables, text=True, capture_output=True, timeout=LIMIT, check=True
    )
    return done.stdout


def state_of(server: str, flow_run: str) -> str:
    from prefect import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: server}), get_client(sync_client=True) as client:
        state = client.read_flow_run(UUID(flow_run)).state
    return state.type.value if state else "?"


@contextmanager
def prefect_server(tree: Path, port: int):
    """Prefect's and MLflow's servers, as `make server` starts them."""
    command = [sys.executable, "flows/server.py", "--prefect-port", str(port), "--mlflow-port", str(port + 1)]
    log = tree.parent / "server.log"
    with log.open("w") as stream:
        server = subprocess.Popen(command, cwd=tree, env=environment(tree), stdout=stream, stderr=stream)
    try:
        wait(lambda: "Ctrl+C" in log.read_text(), server, log)
        yield f"http://127.0.0.1:{port}/api"
    finally:
        server.terminate()
        server.wait(timeout=60)


def one(base: Path, folder: Path, kind: str, number: int, server: str, expected: dict[str, dict[str, str]]) -> dict:
    """One kill, as a row of the result. A miss is tried again in another tree."""
    started = time.monotonic()
    faults, notes, misses = ["missed ten times"], {}, 0
    for misses in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        trial = Trial(base, folder, kind, number + 100 * misses, server)
        try:
            with ONE_DEPLOYMENT if "worker" in kind else nullcontext():
                trial.disturb()
                trial.go_on()
            faults = trial.faults(expected[variant_of(kind)])
        except Missed:
            continue
        except Exception as error:  # one trial must not lose the others
            faults = [f"{type(error).__name__}: {error}"]
        finally:
            for process in of_tree(trial.tree):
                kill(process.pid)
        notes = trial.notes
        break
    print(f"{number:>3} {kind:<32} {faults or 'ok'} {time.monotonic() - started:.0f} s", flush=True)
    if not faults:
        shutil.rmtree(folder, ignore_errors=True)
    return {"kind": kind, "number": number, "misses": misses, "faults": faults, **notes}


def main() -> None:
    """Kill, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--port", type=int, default=4361)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    made = made_with(ROOT)
    kinds = [kind for kind, count in KINDS.items() for _ in range(count)]
    if given.kills < len(kinds):  # each kind once, and then the next ones
        kinds = [*KINDS, *kinds][: given.kills]
    place = Path(tempfile.mkdtemp(prefix="kills-"))
    base = finished_micro_tree(place / "base" / "lexiseg")
    expected = {}
    for variant in sorted({variant_of(kind) for kind in kinds}):
        tree = place / f"undisturbed-{variant}" / "lexiseg"
        shutil.copytree(base, tree, symlinks=True)
        set_up(tree, variant)
        run(tree, "dvc", "repro", TARGET)
        expected[variant] = hash_tree(tree / "outputs/lseg")
    site = place / "server" / "lexiseg"
    shutil.copytree(base, site, symlinks=True)
    with prefect_server(site, given.port) as server, ThreadPoolExecutor(given.jobs) as pool:
        rows = list(
            pool.map(
                lambda item: one(base, place / f"{item[0]:02d}", item[1], item[0], server, expected), enumerate(kinds)
            )
        )
    passed = [row for row in rows if not row["faults"]]
    lost = sorted(row["steps lost"] for row in passed if "steps lost" in row)
    result = {
        "passed": len(passed),
        "kills": len(rows),
        "tally": {kind: f"{sum(r['kind'] == kind for r in passed)} of {kinds.count(kind)}" for kind in KINDS},
        "checkpoint_seconds": CHECKPOINT_SECONDS,
        "steps": STEPS,
        "steps_lost": {"median": lost[len(lost) // 2], "most": lost[-1]} if lost else None,
        "mended": sum("mended" in row for row in rows),
        "rows": rows,
        "made_with": made,
    }
    if given.out:
        write_json(given.out, result)
    print(json.dumps({key: result[key] for key in ("passed", "kills", "tally", "steps_lost", "mended")}, indent=2))
    if len(passed) == len(rows):
        shutil.rmtree(place)
    else:
        sys.exit(f"what failed is in {place}")


if __name__ == "__main__":
    main()
