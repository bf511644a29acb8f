"""The servers of compose.yaml as processes of this machine: Debian's PostgreSQL, moto for S3, ours as they are."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.compose import PORTS, Process, process, read_env, services
from helpers.postgres import Postgres
from helpers.working_tree import SOURCE
from lexiseg.driver import stop_groups

SECONDS = 180.0  # for what takes ten on a machine that is not busy


class Team:
    """The servers of one test, in a folder with its own .env."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("compose.yaml", ".env.example"):
            shutil.copy2(SOURCE / name, root / name)
        shutil.copytree(SOURCE / "team", root / "team", ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run([sys.executable, "team/make_env.py"], cwd=root, check=True, capture_output=True)
        self.secrets = read_env(root / ".env")
        self.postgres = Postgres(superuser="postgres", password=self.secrets["POSTGRES_PASSWORD"])
        self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True)) | {"postgres": self.postgres.port}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._done: set[str] = set()

    def url(self, name: str) -> str:
        """The address of a server."""
        return f"http://127.0.0.1:{self.ports[name]}"

    def start(self, *names: str) -> None:
        """Start services with what they depend on, as `docker compose up` does."""
        for name in names:
            self._launch(name)
        for name in names:
            self._wait(name)

    def stop(self, *names: str) -> None:
        """Stop servers and all their processes."""
        gone = [self._running.pop(name) for name in names if name in self._running]
        stop_groups([server.pid for server in gone], grace=5)
        for server in gone:
            server.wait(timeout=30)

    def close(self) -> None:
        """Stop everything, and remove the databases."""
        try:
            self.stop(*self._running)
        finally:
            self.postgres.remove()

    def run(self, name: str, *command: str) -> str:
        """What a command prints that is run as `docker compose run --rm NAME COMMAND` runs it; without one, its own."""
        here = self._process(name)
        words = [word.replace("/team/", f"{self.root}/team/") for word in command] or here.command
        return self._ran(words, here.environment)

    def shell(self, command: str, **variables: str) -> str:
        """What a line of bash prints, as the superuser of the databases."""
        database = {"PGHOST": "127.0.0.1", "PGPORT": str(self.ports["postgres"])}
        secret = {"PGPASSWORD": self.secrets["POSTGRES_PASSWORD"]}
        return self._ran(["bash", "-euo", "pipefail", "-c", command], database | secret | variables)

    def admin(self) -> dict[str, str]:
        """The environment of MLflow's administrator."""
        return self.member("admin", self.secrets["MLFLOW_ADMIN_PASSWORD"])

    def member(self, name: str, password: str) -> dict[str, str]:
        """The environment of one of MLflow's users."""
        who = {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": password}
        return {"MLFLOW_TRACKING_URI": self.url("mlflow"), **who}

    def users(self, *arguments: str) -> str:
        """What `team/users.py` prints for the administrator."""
        return self._ran([sys.executable, "team/users.py", *arguments], self.admin()).strip()

    def log(self, name: str) -> str:
        """What a server has said."""
        path = self.root / f"{name}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def _process(self, name: str) -> Process:
        if name == "s3":
            command = ["moto_server", "-H", "127.0.0.1", "-p", str(self.ports[name])]
            return Process(command=command, environment={}, health=None, needs=[])
        return process(self.root, name, variables=self.secrets, ports=self.ports)

    def _launch(self, name: str) -> None:
        if name in self._running or name in self._done or name == "postgres":
            return
        here = self._process(name)
        for need in here.needs:
            self._launch(need)
        for need in here.needs:
            self._wait(need)
        if services(self.root)[name].get("restart") == "no":
            self.run(name)
            self._done.add(name)
            return
        with (self.root / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                here.command,
                cwd=self.root,
                env=self._environment(here.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait(self, name: str) -> None:
        if name not in self._running:
            return
        health = self._process(name).health

        def answers() -> bool:
            server = self._running[name]
            assert server.poll() is None, f"{name} ended\n{self.log(name)[-4000:]}"
            if health is None:
                with socket.socket() as probe:
                    return probe.connect_ex(("127.0.0.1", self.ports[name])) == 0
            return subprocess.run(health, env=self._environment({}), capture_output=True).returncode == 0

        wait_for(answers, what=lambda: f"{name} does not answer\n{self.log(name)[-4000:]}")

    def _environment(self, variables: dict[str, str]) -> dict[str, str]:
        """What a container has: nothing of ours but where programs are."""
        places = [Path(sys.executable).parent, self.postgres.programs, os.environ["PATH"]]
        return {"PATH": os.pathsep.join(map(str, places)), "HOME": str(self.root), "LANG": "C.UTF-8", **variables}

    def _ran(self, command: list[str], variables: dict[str, str]) -> str:
        done = subprocess.run(
            command, cwd=self.root, env=self._environment(variables), text=True, capture_output=True, timeout=SECONDS
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def wait_for(what_holds: Callable[[], Any], *, what: Callable[[], str]) -> Any:
    """What a condition gives, as soon as it gives something; after SECONDS the text of `what` is the failure."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if found := what_holds():
            return found
        time.sleep(0.1)
    raise AssertionError(what())


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses now; all are taken at once, so no two are the same."""
    held = [socket.socket() for _ in range(count)]
    try:
        for probe in held:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in held]
    finally:
        for probe in held:
            probe.close()
