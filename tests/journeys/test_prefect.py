"""From an empty machine: servers, deployments, a worker that is killed in training, and another that finishes."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from helpers.working_tree import change, copy_of, environment, run, write_street
from mlflow import MlflowClient
from prefect import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.settings import PREFECT_API_URL, temporary_settings

from lexiseg.driver import stop_groups
from lexiseg.storage import hash_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 120


class Site:
    """A working tree with its servers, and one worker after the other."""

    def __init__(self, tree: Path) -> None:
        self.tree, self.log = tree, tree.parent / "log"
        self.ports = free_port(), free_port()
        self.api = f"http://127.0.0.1:{self.ports[0]}/api"
        self.variables = environment(tree) | {"PREFECT_API_URL": self.api, "LEXISEG_CHECKPOINT_SECONDS": "0"}
        self.groups: list[subprocess.Popen] = []

    def start(self, *command: str) -> subprocess.Popen:
        with self.log.open("a") as stream:
            process = subprocess.Popen(
                command, cwd=self.tree, env=self.variables, stdout=stream, stderr=stream, start_new_session=True
            )
        self.groups.append(process)
        return process

    def serve(self) -> subprocess.Popen:
        before = self.text().count("Ctrl+C ends both servers")
        server = self.start("make", "server", f"PREFECT_PORT={self.ports[0]}", f"MLFLOW_PORT={self.ports[1]}")
        self.wait(lambda: self.text().count("Ctrl+C ends both servers") > before, server)
        return server

    def work(self) -> subprocess.Popen:
        return self.start("make", "worker")

    def prefect(self, *arguments: str) -> str:
        done = subprocess.run(
            ["prefect", *arguments], cwd=self.tree, env=self.variables, text=True, capture_output=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def prefect_run(self, deployment: str, **parameters: object) -> str:
        given = [f"--param={name}={json.dumps(value)}" for name, value in parameters.items()]
        return re.findall(r"UUID: (\S+)", self.prefect("deployment", "run", deployment, *given))[0]

    def starts(self, flow_run: str) -> int:
        with temporary_settings({PREFECT_API_URL: self.api}), get_client(sync_client=True) as client:
            return client.read_flow_run(flow_run).run_count  # type: ignore[arg-type]

    def wait(self, what: Callable[[], bool], *processes: subprocess.Popen, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.text()[-5000:]
            assert all(process.poll() is None for process in processes), self.text()[-5000:]
            time.sleep(0.1)

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def training(self) -> bool:
        return any((self.tree / ".lexiseg/work").glob("lseg-train-*/checkpoints/*.ckpt"))

    def state(self, flow_run: str) -> str:
        with temporary_settings({PREFECT_API_URL: self.api}), get_client(sync_client=True) as client:
            state = client.read_flow_run(flow_run).state  # type: ignore[arg-type]
        return state.type.value if state else "?"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def site(micro_tree: Path) -> Iterator[Site]:
    change(micro_tree / "params.yaml", {"lseg": {"train": {"steps": STEPS}}})
    site = Site(micro_tree)
    try:
        yield site
    finally:
        for process in reversed(site.groups):
            stop_groups([process.pid], grace=30)
            process.wait(timeout=60)


def test_a_worker_is_killed_and_another_finishes_its_run(site, tmp_path):
    undisturbed = copy_of(site.tree, tmp_path / "undisturbed" / "lexiseg")
    run(undisturbed, "dvc", "repro", "lseg-register")
    site.serve()
    site.prefect("--no-prompt", "deploy", "--all")
    flow_run = site.prefect_run("reproduce/lseg")
    worker = site.work()
    site.wait(site.training, worker)
    (process,) = [one for one in psutil.Process(worker.pid).children(recursive=True) if "worker" in one.cmdline()]
    process.send_signal(signal.SIGKILL)
    worker.wait(timeout=60)
    assert site.state(flow_run) != "COMPLETED"

    site.work()
    site.wait(lambda: site.state(flow_run) == "COMPLETED", seconds=400)
    with temporary_settings({PREFECT_API_URL: site.api}), get_client(sync_client=True) as client:
        only = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run]))  # type: ignore[list-item]
        tasks = client.read_task_runs(flow_run_filter=only)
        artifacts = {artifact.key for artifact in client.read_artifacts(flow_run_filter=only)}
        logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run])))  # type: ignore[list-item]
    assert site.starts(flow_run) == 2
    text = "\n".join(log.message for log in logs)
    assert "train LSeg: going on after step " in text
    assert "encode: unchanged" in text
    done = [task.name for task in tasks if task.state and task.state.is_completed()]
    assert done.count("lseg-train") == 1
    assert {"prepare", "encode", "lseg-register"} <= set(done)
    assert {"lseg-metrics", "lseg-pictures"} <= artifacts
    assert hash_tree(site.tree / "outputs") == hash_tree(undisturbed / "outputs")
    client = MlflowClient(f"sqlite:///{site.tree}/.lexiseg/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [run.info.run_name for run in runs].count("lseg") == 1

    # Other data starts the deployment that waits for it.
    write_street(site.tree.parent / "CamVid")
    command = ["lexiseg", "data", "add", "street", "../CamVid", "--adapter", "camvid"]
    added = subprocess.run(command, cwd=site.tree, env=site.variables, text=True, capture_output=True, timeout=120)
    assert "Prefect was told" in added.stdout, added.stdout + added.stderr

    def started(deployment: str = "data-changed") -> bool:
        waiting = DeploymentFilter(name=DeploymentFilterName(any_=[deployment]))
        with temporary_settings({PREFECT_API_URL: site.api}), get_client(sync_client=True) as client:
            return bool(client.read_flow_runs(deployment_filter=waiting))

    site.wait(started, seconds=60)
    site.wait(lambda: started("nightly"), seconds=60)  # planned for the nights to come


def test_a_server_that_is_restarted_is_waited_for(site):
    server = site.serve()
    site.prefect("--no-prompt", "deploy", "--all")
    flow_run = site.prefect_run("reproduce/lseg")
    worker = site.work()
    site.wait(site.training, worker)
    stop_groups([server.pid], grace=30)
    server.wait(timeout=60)
    site.serve()
    site.wait(lambda: site.state(flow_run) == "COMPLETED", seconds=400)
    assert site.starts(flow_run) == 1
    assert json.loads(run(site.tree, "dvc", "status", "lseg-register", "--json").stdout) == {}


def test_a_cancelled_run_stops_its_stage_and_keeps_its_checkpoint(site):
    site.serve()
    site.prefect("--no-prompt", "deploy", "--all")
    flow_run = site.prefect_run("reproduce/all", settings={"lseg.train.lr": 0.002, "lseg.train.steps": 5000})
    worker = site.work()
    site.wait(site.training, worker)
    site.prefect("flow-run", "cancel", flow_run)
    site.wait(lambda: site.state(flow_run) == "CANCELLED", worker, seconds=120)

    def stages() -> list[list[str]]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if str(site.tree) in process.cwd() and "stage" in process.cmdline():
                    found.append(process.cmdline())
        return found

    site.wait(lambda: not stages(), seconds=60)
    assert site.training()  # a checkpoint is there
    # Its copy is left for a look, and goes with a clean.
    assert [path for path in (site.tree / ".lexiseg/copies").iterdir() if path.is_dir()]
    run(site.tree, "lexiseg", "clean")
    assert list((site.tree / ".lexiseg/copies").iterdir()) == []


def test_a_flow_that_cannot_be_imported_is_not_started_again_and_again(site):
    site.serve()
    site.prefect("--no-prompt", "deploy", "--all")
    flow = site.tree / "flows/reproduce.py"
    flow.write_text("raise RuntimeError\n" + flow.read_text(encoding="utf-8"), encoding="utf-8")
    flow_run = site.prefect_run("reproduce/lseg")
    worker = site.work()
    site.wait(lambda: site.state(flow_run) in ("CRASHED", "FAILED"), worker)
    time.sleep(20)  # a rule that started it again would have done so within a second
    assert site.state(flow_run) in ("CRASHED", "FAILED")
    assert site.text().count("submitting flow run") == 1, site.text()


def test_a_promotion_waits_for_a_human_and_goes_on(site):
    gates = {"floors": {"lseg": {"miou": 0.0}}, "latency": 60_000.0, "memory": 60_000.0}
    change(site.tree / "params.yaml", {"promotion": gates})
    run(site.tree, "lexiseg", "sync")
    site.serve()
    site.prefect("--no-prompt", "deploy", "--all")
    flow_run = site.prefect_run("promote/challenger-with-approval", method="lseg")
    worker = site.work()
    site.wait(lambda: site.state(flow_run) == "PAUSED", worker)
    assert "no version is production" in run(site.tree, "lexiseg", "history", "lseg").stdout
    with temporary_settings({PREFECT_API_URL: site.api}), get_client(sync_client=True) as client:
        client.resume_flow_run(flow_run, run_input={"approve": True, "name": "Ann", "reason": "a test"})  # type: ignore[arg-type]
    site.wait(lambda: site.state(flow_run) == "COMPLETED", worker)
    told = run(site.tree, "lexiseg", "history", "lseg").stdout
    assert "promoted version 1 (before: nothing)" in told
    assert "approved by Ann: a test" in told
    assert "lseg: version 1 is production" in told


def test_setting_a_server_up_twice_changes_nothing(site):
    site.serve()
    done = subprocess.run(
        [sys.executable, "flows/workpools.py"], cwd=site.tree, env=site.variables, text=True, capture_output=True
    )
    assert done.stdout == "work pools and automations are there\n", done.stderr
