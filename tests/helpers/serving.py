"""A `lexiseg serve` of its own process, versions for it to serve, and requests to it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import requests
from mlflow import MlflowClient
from PIL import Image

from helpers.working_tree import environment

SECONDS = 120.0  # for anything to happen on a busy machine


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        url: "http://127.0.0.1:PORT".
        process: `lexiseg serve`.
        log: what it printed as errors.
    """

    url: str
    process: subprocess.Popen[str]
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ask(self, body: Any, **more: Any) -> requests.Response:
        """POST to /invocations: bytes as they are, all else as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | more.pop("headers", {})
        return requests.post(f"{self.url}/invocations", data=data, headers=headers, timeout=SECONDS, **more)

    def ask_stream(self, chunks: Iterable[bytes]) -> requests.Response:
        """POST a body of unknown length."""
        headers = {"Content-Type": "application/json"}
        return requests.post(f"{self.url}/invocations", data=chunks, headers=headers, timeout=SECONDS)

    def health(self) -> dict[str, Any]:
        return requests.get(f"{self.url}/health", timeout=SECONDS).json()

    def look(self) -> None:
        """Have it look for a new version."""
        self.process.send_signal(signal.SIGHUP)


@contextmanager
def serving(tree: Path, *arguments: str) -> Iterator[Server]:
    """`lexiseg serve` with these arguments, in a working tree, on a free port; ended afterwards."""
    log = tree.parent / f"serve-{time.monotonic_ns()}.log"
    command = ["lexiseg", "serve", *arguments, "--port", "0"]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, cwd=tree, env=environment(tree), stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        assert process.stdout
        said = process.stdout.readline() + process.stdout.readline()
        match = re.search(r"on (http://\S+:\d+), pid (\d+)", said)
        assert match, f"{' '.join(command)}\n{said}\n{log.read_text()}"
        assert int(match[2]) == process.pid
        server = Server(match[1], process, log)
        until(lambda: answers(server), "the server to answer")
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def answers(server: Server) -> bool:
    try:
        return requests.get(f"{server.url}/ping", timeout=SECONDS).ok
    except requests.ConnectionError:
        assert server.process.poll() is None, server.log.read_text()
        return False


def until(holds: Callable[[], bool], what: str) -> None:
    """Look again and again until something holds."""
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"waited {SECONDS:.0f} s for {what}"
        time.sleep(0.02)


def png(pixels: np.ndarray) -> str:
    """A PNG as base64."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


def request(*pictures: Any, labels: Any = ("grass", "sky", "ring")) -> dict[str, Any]:
    """A request for pictures that are base64."""
    table = {"columns": ["image_b64"], "data": [[picture] for picture in pictures]}
    return {"dataframe_split": table, "params": {"labels": list(labels)}}


def client_of(tree: Path) -> MlflowClient:
    """Of the store that a working tree has of its own."""
    uri = f"sqlite:///{tree / '.lexiseg/mlflow.db'}"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def new_version(tree: Path, name: str, change: Callable[[Path], None]) -> str:
    """Register a changed copy of version 1 of a model; returns its number."""
    client = client_of(tree)
    first = client.get_model_version(name, "1")
    source = Path(str(first.source))
    copy = source.with_name(f"{source.name}-{time.monotonic_ns()}")
    shutil.copytree(source, copy)
    change(copy)
    # Without the tags of the first: among them is the hash of its content.
    return str(client.create_model_version(name, source=str(copy), run_id=first.run_id).version)
