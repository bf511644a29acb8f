"""A registered LSeg under load: `lexiseg serve` beside plain `mlflow models serve` of the same version.

    python benchmarks/serving.py --out

Eight clients ask at once, one request after the other, for a picture of the embedded world and four labels. All servers
are there all the time and are loaded in turns; that they answer the same is checked before. MLflow computes as many
requests at once as Python's default pool has threads, each on all cores; a further candidate is MLflow with one core
for each. Where the time of lexiseg goes comes from its header Server-Timing.
"""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import requests

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import ROOT, arguments_for, compare, table, use_threads, write_result
from lexiseg.serving.source import address_of
from lexiseg.tracking.registry import download_pyfunc, find_version

PICTURE = ROOT / "docs/pictures/scene.png"
LABELS = ["brick", "water", "ring", "heart"]
SECONDS = 300.0  # for a server to start, and for a request
PERCENTILES = (50, 90, 99)


class Load:
    """Clients that ask a server, and what they saw.

    Attributes:
        rounds: per round, for every request seconds and the milliseconds of each phase.
    """

    def __init__(self, url: str, body: bytes, *, clients: int, requests: int) -> None:
        self.url, self._body, self._clients, self._requests = url, body, clients, requests
        self.rounds: list[list[tuple[float, dict[str, float]]]] = []

    def __call__(self) -> None:
        """One round: every client asks for its number of requests."""
        with ThreadPoolExecutor(self._clients) as pool:
            seen = list(pool.map(lambda _: self._one_client(), range(self._clients)))
        self.rounds.append([one for client in seen for one in client])

    def ask(self, session: requests.Session) -> requests.Response:
        headers = {"Content-Type": "application/json"}
        answer = session.post(f"{self.url}/invocations", data=self._body, headers=headers, timeout=SECONDS)
        if answer.status_code != 200:
            raise RuntimeError(f"{self.url} answers {answer.status_code}: {answer.text}")
        return answer

    def _one_client(self) -> list[tuple[float, dict[str, float]]]:
        seen = []
        with requests.Session() as session:
            for _ in range(self._requests):
                started = time.perf_counter()
                answer = self.ask(session)
                seconds = time.perf_counter() - started
                timing = re.findall(r"(\w+);dur=([\d.]+)", answer.headers.get("Server-Timing", ""))
                seen.append((seconds, {name: float(value) for name, value in timing}))
        return seen


def latencies(load: Load, *, repeats: int) -> dict[str, Any]:
    """Percentiles in milliseconds over the requests of the last rounds: `latency_ms`, and `phases_ms` by phase."""
    seen = [one for round_ in load.rounds[-repeats:] for one in round_]
    phases = {name: percentiles([timing.get(name, 0.0) for _, timing in seen]) for name in seen[0][1]}
    return {"latency_ms": percentiles([1000 * seconds for seconds, _ in seen]), "phases_ms": phases}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{which}": float(np.percentile(values, which)) for which in PERCENTILES}


@contextmanager
def server(command: Sequence[str], *, root: Path, cores: int) -> Iterator[str]:
    """A server as a process, with so many cores for a call; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    bin_folder = str(Path(sys.executable).parent)
    variables = os.environ | {
        "PATH": os.pathsep.join([bin_folder, os.environ["PATH"]]),
        "OMP_NUM_THREADS": str(cores),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        cwd=root,
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, process)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # MLflow's server is a child of its command
        process.wait(timeout=60)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            requests.get(f"{url}/ping", timeout=SECONDS).raise_for_status()
            return
        except requests.RequestException:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def main(argv: Sequence[str] | None = None) -> None:
    """Check that the answers are the same, then load the servers in turns."""
    parser = arguments_for(__doc__, repeats=5)
    parser.add_argument("--model", default="lseg@challenger", help="as for `lexiseg serve`")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=50, help="of each client in a round")
    parser.add_argument("--root", type=Path, default=ROOT, help="the working tree whose MLflow has the model")
    given = parser.parse_args(argv)
    use_threads(given.threads)
    root = vars(given).pop("root")  # a path of this machine is no part of a result
    cores = given.threads or len(os.sched_getaffinity(0))
    folder = str(download_pyfunc(*find_version(address_of(given.model), root), root))
    picture = base64.b64encode(PICTURE.read_bytes()).decode()
    body = json.dumps(
        {"dataframe_split": {"columns": ["image_b64"], "data": [[picture]]}, "params": {"labels": LABELS}}
    ).encode()
    ours = ["lexiseg", "serve", given.model, "--watch", "0"]
    plain = ["mlflow", "models", "serve", "-m", folder, "--env-manager", "local", "--host", "127.0.0.1"]
    commands: dict[str, tuple[list[str], int]] = {
        "lexiseg": (ours, cores),
        "lexiseg, one call at once": ([*ours, "--calls", "1"], cores),
        "mlflow": (plain, cores),
        "mlflow, one core for each call": (plain, 1),
    }
    with ExitStack() as stack:
        loads: dict[str, Load] = {}
        for name, (command, threads) in commands.items():
            url = stack.enter_context(server(command, root=root, cores=threads))
            loads[name] = Load(url, body, clients=given.clients, requests=given.requests)
        check_answers(loads)
        candidates: dict[str, Callable[[], None]] = dict(loads)
        timed = compare(candidates, repeats=given.repeats, title="serving")
    count = given.clients * given.requests
    found = {name: latencies(load, repeats=given.repeats) for name, load in loads.items()}
    per_second = {name: count / seconds["median"] for name, seconds in timed["seconds"].items()}
    rows = [{"clients": given.clients, "requests": count, "per_second": per_second, "requests_seen": found, **timed}]
    print(f"{given.clients} clients, {count} requests in a round\n{table(timed, per=count, unit='request')}")
    for name, seen in found.items():
        shown = ", ".join(f"{key} {value:.1f}" for key, value in seen["latency_ms"].items())
        print(f"  {name:<34} {per_second[name]:6.1f} requests/s; latency in ms: {shown}")
        for phase, values in seen["phases_ms"].items():
            print(f"    {phase:<12} " + ", ".join(f"{key} {value:.2f}" for key, value in values.items()))
    write_result("serving", rows, given=given, precision="fp32", peers=("mlflow",))


def check_answers(loads: dict[str, Load]) -> None:
    """Stop where two servers answer differently: labels and map have to be equal, scores to a thousandth.

    Raises:
        AssertionError: they do not compute the same.
    """
    first: list[Any] = []
    for name, load in loads.items():
        with requests.Session() as session:
            row = load.ask(session).json()["predictions"][0]
        scores = [[part["area"], part["score"] or 0.0] for part in json.loads(row["segments"])]
        first = first or [row["label_map"], row["legend"], scores]
        if [row["label_map"], row["legend"]] != first[:2] or not np.allclose(scores, first[2], atol=1e-3):
            raise AssertionError(f"{name} answers otherwise than lexiseg")


if __name__ == "__main__":
    main()
