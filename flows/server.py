"""Prefect's and MLflow's servers on this machine, started and stopped together: what `make server` runs.

Both listen on the loopback address only, since neither asks for a password. Their data lie in `.lexiseg/`.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import lexiseg.environment  # noqa: F401  first: it turns telemetry of the libraries off
from lexiseg.driver import stop_groups
from lexiseg.errors import LexisegError, StageError
from lexiseg.workspace import private_folder, require_root

HOST = "127.0.0.1"
START_SECONDS = 180.0


def serve(root: Path, *, prefect_port: int, mlflow_port: int) -> None:
    """Start both servers, set the Prefect one up, and wait until one ends or this process is told to.

    Raises:
        StageError: a port is taken, or a server ended by itself.
    """
    for name, port in (("PREFECT_PORT", prefect_port), ("MLFLOW_PORT", mlflow_port)):
        _check_free(name, port)
    private = private_folder(root)
    private.mkdir(parents=True, exist_ok=True)
    api = f"http://{HOST}:{prefect_port}/api"
    store = f"sqlite:///{private / 'mlflow.db'}"  # where `lexiseg sync` writes by itself
    listen = f"--host {HOST} --port {mlflow_port} --workers 1".split()
    commands = {
        "Prefect": f"prefect server start --host {HOST} --port {prefect_port}".split(),
        "MLflow": ["mlflow", "server", "--backend-store-uri", store, *listen],
    }
    health = {"Prefect": f"{api}/health", "MLflow": f"http://{HOST}:{mlflow_port}/health"}
    variables = dict(os.environ, PREFECT_HOME=str(private / "prefect"), PREFECT_API_URL=api)
    servers: dict[str, subprocess.Popen] = {}
    try:
        for name, command in commands.items():
            log = (private / f"{name.lower()}-server.log").open("wb")
            command = [sys.executable, "-m", *command]
            servers[name] = subprocess.Popen(
                command, cwd=root, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        print("starting Prefect and MLflow; the first time this takes half a minute", flush=True)
        for name, address in health.items():
            _wait_for(name, address, servers[name], private)
        setup = [sys.executable, str(Path(__file__).with_name("workpools.py"))]
        if subprocess.run(setup, cwd=root, env=variables, check=False).returncode:
            raise StageError(
                found=f"the Prefect server at {api} could not be set up, see above",
                allowed="a server of the installed version of Prefect",
                fix=f"see {private / 'prefect-server.log'}; remove {private / 'prefect'} if it is of another version",
            )
        print(
            f"\nPrefect  http://{HOST}:{prefect_port}\nMLflow   http://{HOST}:{mlflow_port}\n\n"
            f"in other terminals:\n"
            f"  export PREFECT_API_URL={api}\n"
            f"  prefect --no-prompt deploy --all\n"
            f"  make worker\n"
            f"  prefect deployment run reproduce/all\n\nCtrl+C ends both servers",
            flush=True,
        )
        while all(server.poll() is None for server in servers.values()):
            time.sleep(1.0)
        ended = next(name for name, server in servers.items() if server.poll() is not None)
        raise _ended(ended, private)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a second one would leave them running
            signal.signal(number, signal.SIG_IGN)
        stop_groups([server.pid for server in servers.values()])


def _check_free(name: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise StageError(
                found=f"port {port} of {HOST} cannot be used ({error.strerror})",
                allowed="a free port",
                fix=f"stop what listens there, or choose another: make server {name}={port + 1}",
            ) from error


def _wait_for(name: str, address: str, server: subprocess.Popen, private: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise _ended(name, private)
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise StageError(
        found=f"{name} did not answer at {address} within {START_SECONDS:.0f} s",
        allowed="a server that starts",
        fix=f"see {private / f'{name.lower()}-server.log'}",
    )


def _ended(name: str, private: Path) -> StageError:
    log = private / f"{name.lower()}-server.log"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return StageError(
        found=f"the server of {name} ended: {lines[-1] if lines else 'it said nothing'}",
        allowed="a server that runs until it is stopped",
        fix=f"see {log}",
    )


def main() -> None:
    """Serve until Ctrl+C or SIGTERM."""
    parser = argparse.ArgumentParser(description="Prefect's and MLflow's servers on this machine.")
    parser.add_argument("--prefect-port", type=int, default=4200)
    parser.add_argument("--mlflow-port", type=int, default=5000)
    given = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):  # a closed terminal too: the servers have sessions of their own
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        serve(require_root(), prefect_port=given.prefect_port, mlflow_port=given.mlflow_port)
    except LexisegError as error:
        sys.exit(f"error ({type(error).__name__})\n{error}")
    except KeyboardInterrupt:
        print("\nboth servers are stopped")


if __name__ == "__main__":
    main()
