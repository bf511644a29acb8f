"""One server as a process of its own: what it answers, what it refuses, and how it changes versions meanwhile."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import subprocess
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import requests
import torch
from helpers.serving import Server, client_of, new_version, png, request, serving, until
from helpers.working_tree import environment
from PIL import Image

from lexiseg.storage import load_tensors, save_tensors

QUEUE = 10
NAME = "lexiseg-lseg"
LABELS = ["grass", "sky", "red ring"]
PICTURES = [png(np.random.default_rng(seed).integers(0, 256, (24, 32 + seed, 3), np.uint8)) for seed in range(5)]


@pytest.fixture(scope="module")
def server(registered: Path) -> Iterator[Server]:
    """Of lexiseg-lseg@production, which is version 1 whenever a test begins. It looks for others when it is told to."""
    with serving(registered, "lseg@production", "--watch", "0", "--queue", str(QUEUE), "--max-body", "2") as started:
        yield started


@pytest.fixture(scope="module")
def expected(registered: Path) -> list[list[dict[str, str]]]:
    """What version 1 answers to each picture when it is asked directly."""
    return directly(registered, "1")


def directly(tree: Path, number: str) -> list[list[dict[str, str]]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the server does in tests
    try:
        model = mlflow.pyfunc.load_model(str(client_of(tree).get_model_version(NAME, number).source))
        tables = [model.predict(pd.DataFrame({"image_b64": [one]}), params={"labels": LABELS}) for one in PICTURES]
    finally:
        torch.set_num_threads(before)
    return [table.to_dict(orient="records") for table in tables]


# ---- what it answers ---------------------------------------------------------------------------------------------


def test_eight_clients_get_what_the_model_gives(server, expected):
    def ask(client: int) -> None:
        with requests.Session() as session:
            for number in range(50):
                which = (client + number) % len(PICTURES)
                answer = session.post(
                    f"{server.url}/invocations", json=request(PICTURES[which], labels=LABELS), timeout=120
                )
                assert answer.status_code == 200, answer.text
                assert answer.json() == {"predictions": expected[which]}
                assert answer.headers["X-Lexiseg-Model"] == f"{NAME}/1"

    before = server.health()["requests"]["answered"]
    with ThreadPoolExecutor(8) as clients:
        list(clients.map(ask, range(8)))
    assert server.health()["requests"]["answered"] - before == 8 * 50


@pytest.mark.parametrize("form", ["dataframe_records", "inputs", "instances"])
def test_other_forms_of_mlflow(server, expected, form):
    answer = server.ask({form: [{"image_b64": PICTURES[0]}, {"image_b64": PICTURES[1]}], "params": {"labels": LABELS}})
    assert answer.json() == {"predictions": expected[0] + expected[1]}


def test_a_table_as_pandas_writes_it(server, expected):
    table = pd.DataFrame({"image_b64": PICTURES[:2]}).to_dict(orient="split")
    answer = server.ask({"dataframe_split": table, "params": {"labels": LABELS}})
    assert answer.json() == {"predictions": expected[0] + expected[1]}


@pytest.mark.parametrize("kind", ["GIF", "JPEG", "BMP", "WEBP"])
def test_other_kinds_of_pictures(server, kind):
    stream = io.BytesIO()
    Image.new("RGB", (20, 12), "green").save(stream, format=kind)
    answer = server.ask(request(base64.b64encode(stream.getvalue()).decode()))
    assert answer.status_code == 200, answer.text
    row = answer.json()["predictions"][0]
    assert Image.open(io.BytesIO(base64.b64decode(row["label_map"]))).size == (20, 12)


def test_timing_says_where_the_time_went(server):
    answer = server.ask(request(PICTURES[0]))
    phases = dict(re.findall(r"([a-z]+);dur=([\d.]+)", answer.headers["Server-Timing"]))
    milliseconds = {name: float(value) for name, value in phases.items()}
    total = milliseconds.pop("total")
    assert list(milliseconds) == ["wait", "decode", "preprocess", "text", "vision", "head", "write"]
    assert sum(milliseconds.values()) == pytest.approx(total, abs=0.1)
    assert 0 < total <= 1000 * answer.elapsed.total_seconds()
    assert all(milliseconds[name] > 0 for name in ("decode", "vision", "write"))


def test_health_and_the_addresses_of_mlflow(server):
    health = requests.get(f"{server.url}/health", timeout=60)
    said = health.json()
    assert (health.status_code, health.headers["X-Lexiseg-Model"]) == (200, f"{NAME}/1")
    assert (said["status"], said["model"], said["version"], said["alias"]) == ("ok", NAME, "1", "production")
    assert said["last_error"] is None
    assert said["limits"]["body_bytes"] == 2_000_000
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", said["loaded_at"])
    assert (said["requests"]["running"], said["requests"]["waiting"]) == (0, 0)
    assert requests.get(f"{server.url}/ping", timeout=60).status_code == 200
    assert requests.get(f"{server.url}/version", timeout=60).text == mlflow.__version__


# ---- what it refuses ---------------------------------------------------------------------------------------------


def bomb() -> str:
    """A PNG of 200 bytes that says it has 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (30_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 10_000)), chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def large(side: int) -> str:
    stream = io.BytesIO()
    Image.new("L", (side, side)).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


GOOD = PICTURES[0]
TRUNCATED = base64.b64encode(base64.b64decode(GOOD)[:-30]).decode()
SPLIT = {"columns": ["image_b64"], "data": [[GOOD]]}
AS_JSON = {"Content-Type": "application/json"}
# Pillow knows it, and gives it to an interpreter.
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n8 8 moveto\n%%EOF\n"
# What is sent, the status, and words of the message.
BAD = {
    "not an image": (request(base64.b64encode(b"hello").decode()), 400, ["row 0 is not a picture", "PNG, JPEG"]),
    "SVG": (request(base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode()), 400, ["not a picture"]),
    "PostScript": (request(base64.b64encode(POSTSCRIPT).decode()), 400, ["not a picture", "PNG, JPEG"]),
    "truncated image": (request(GOOD, TRUNCATED), 400, ["image_b64 of row 1", "complete picture"]),
    "empty image": (request(""), 400, ["row 0 is empty"]),
    "path": (request("/etc/passwd.png"), 400, ["not base64 but '/etc/passwd.png'", "no paths", "b64encode"]),
    "address": (request("http://127.0.0.1/photo.png"), 400, ["'http://127.0.0.1/photo.png'", "no addresses"]),
    "decompression bomb": (request(bomb()), 400, ["row 0 has too many pixels", "bomb"]),
    "large pictures": (request(large(3000), large(3000)), 400, ["18000000 pixels", "at most 16000000"]),
    "NaN": (b'{"dataframe_split": {"columns": ["image_b64"], "data": [[NaN]]}}', 400, ["row 0 is a number", "base64"]),
    "null": (request(None), 400, ["row 0 is nothing (null)", "base64"]),
    "number": (request(7), 400, ["row 0 is a number"]),
    "list": (request([GOOD]), 400, ["row 0 is a list"]),
    "no picture": (request(), 400, ["0 pictures", "1 to 16"]),
    "too many pictures": (request(*[GOOD] * 17), 400, ["17 pictures", "1 to 16"]),
    "20,000 labels": (request(GOOD, labels=[f"thing {n}" for n in range(20_000)]), 400, ["20000 labels", "1000"]),
    "long label": (request(GOOD, labels=["grass", "x" * 301]), 400, ["301 characters (number 1)", "at most 300"]),
    "no labels": (request(GOOD, labels=[]), 400, ["no labels", "one or more labels"]),
    "no params": ({"dataframe_split": SPLIT}, 400, ["no labels"]),
    "empty label": (request(GOOD, labels=["grass", " "]), 400, ["an empty label", "visible"]),
    "label twice": (request(GOOD, labels=["error (x)", "Error (X)"]), 400, ["more than once: error (x), Error (X)"]),
    "label of numbers": (request(GOOD, labels=["grass", 7]), 400, ["a number for the label number 1"]),
    "half a character": (request(GOOD, labels=["\ud800 grass"]), 400, ["half a character", "UTF-8"]),
    "labels as a text": ({"dataframe_split": SPLIT, "params": {"labels": "grass"}}, 400, ["a text for labels"]),
    "another parameter": (
        {"dataframe_split": SPLIT, "params": {"label": ["a"]}},
        400,
        ["with 'label'", "labels alone"],
    ),
    "params as a list": ({"dataframe_split": SPLIT, "params": ["grass"]}, 400, ["a list for params"]),
    "another column": ({"dataframe_split": {"columns": ["image"], "data": [[GOOD]]}}, 400, ["the columns 'image'"]),
    "two columns": (
        {"dataframe_split": {"columns": ["image_b64", "x"], "data": [[GOOD, 1]]}},
        400,
        ["the columns 'image_b64', 'x'"],
    ),
    "wide row": ({"dataframe_split": {"columns": ["image_b64"], "data": [[GOOD, 1]]}}, 400, ["2 values"]),
    "no data": ({"dataframe_split": {"columns": ["image_b64"]}}, 400, ["nothing (null) for data"]),
    "another index": (
        request(GOOD) | {"dataframe_split": SPLIT | {"index": [1, 2]}},
        400,
        ["an index of 2 names for 1 rows"],
    ),
    "strange index": (request(GOOD) | {"dataframe_split": SPLIT | {"index": [[1]]}}, 400, ["a number or a text"]),
    "another field": ({"dataframe_records": [{"image": GOOD}]}, 400, ["an object with 'image' in dataframe_records"]),
    "another format": ({"messages": []}, 400, ["an object with 'messages'", "dataframe_split"]),
    "labels beside": ({"dataframe_split": SPLIT, "labels": ["a"]}, 400, ["'dataframe_split', 'labels'", "params"]),
    "two formats": ({"dataframe_split": SPLIT, "inputs": []}, 400, ["one of dataframe_split"]),
    "not JSON": (b"{", 400, ["not JSON"]),
    "empty body": (b"", 400, ["not JSON"]),
    "JSON list": (b"[]", 400, ["JSON that is a list"]),
    "huge number": (b'{"inputs": ' + b"9" * 10_000 + b"}", 400, ["not JSON"]),
    "nested": (b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, ["nested too deep"]),
    "not UTF-8": (json.dumps(request(GOOD)).encode("utf-16"), 400, ["not UTF-8"]),
    "too large": (b" " * 2_000_001, 413, ["2000001 bytes", "at most 2000000 bytes", "--max-body"]),
}


def refused(answer: requests.Response, status: int, words: list[str]) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Lexiseg-Model"] == f"{NAME}/1"
    said = answer.json()
    assert set(said) == {"error_code", "message"}
    assert [line.partition(":")[0] for line in said["message"].splitlines()] == ["found", "allowed", "to do"]
    assert all(word in said["message"] for word in words), said["message"]
    for private in ("Traceback", "site-packages", "lexiseg/", "/tmp", ".lexiseg"):
        assert private not in said["message"]


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_the_server_lives_on(server, expected, name):
    body, status, words = BAD[name]
    refused(server.ask(body), status, words)
    assert server.ask(request(GOOD, labels=LABELS)).json() == {"predictions": expected[0]}


@pytest.mark.parametrize("kind", ["text/csv", "text/plain", "application/json; charset=latin-1", ""])
def test_another_content_type(server, kind):
    words = [repr(kind) if kind else "no content type", "application/json"]
    refused(server.ask(request(GOOD), headers={"Content-Type": kind}), 415, words)


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/invocations", 405, ["GET /invocations", "POST /invocations"]),
        ("DELETE", "/health", 405, ["DELETE /health", "GET /health"]),
        ("GET", "/", 404, ["/invocations, /health, /ping, /version"]),
        ("GET", "/docs", 404, ["not served"]),
        ("GET", "/../../etc/passwd", 404, ["not served"]),
    ],
)
def test_other_methods_and_addresses(server, method, path, status, words):
    answer = requests.request(method, server.url + path, timeout=60)
    refused(answer, status, words)
    if status == 405:
        assert answer.headers["Allow"] in words[1]


def test_100_mb_are_refused_by_their_length_before_they_are_sent(server):
    with open_request(server, "Content-Length: 100000000") as connection:
        answer = read_answer(connection)
    assert answer.startswith("HTTP/1.1 413")
    assert "found: a body of 100000000 bytes" in answer


def test_100_mb_without_a_length_are_refused_on_the_way(server):
    before = memory(server)
    chunk = b" " * 1_000_000
    refused(server.ask_stream(chunk for _ in range(100)), 413, ["more than 2000000 bytes", "--max-body"])
    assert memory(server) - before < 50_000_000
    assert server.ask(request(GOOD)).status_code == 200


def test_a_client_that_goes_away(server):
    before = server.health()["requests"]
    with open_request(server, "Content-Length: 1000"):
        until(lambda: server.health()["requests"]["waiting"] == 1, "the request to be there")
    until(lambda: server.health()["requests"]["waiting"] == 0, "it to be given up")
    assert server.health()["requests"] == before


def test_a_full_queue_sends_requests_away(server):
    body = json.dumps(request(GOOD)).encode()
    places = QUEUE + server.health()["limits"]["calls"]
    with ExitStack() as stack:
        # The bodies are not sent to their end, so all of these wait for as long as it takes.
        held = [stack.enter_context(open_request(server, f"Content-Length: {len(body)}")) for _ in range(places)]
        until(lambda: server.health()["requests"]["waiting"] == places, "the queue to be full")
        answer = server.ask(request(GOOD))
        refused(answer, 503, [f"{places} requests", f"{QUEUE} waiting", "try again in 1 s"])
        assert answer.headers["Retry-After"] == "1"
        for connection in held:
            connection.sendall(body)
        assert all(read_answer(connection).startswith("HTTP/1.1 200") for connection in held)
    assert server.ask(request(GOOD)).status_code == 200


def open_request(server: Server, length: str) -> socket.socket:
    """A connection on which the head of a request was sent."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = ["POST /invocations HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close"]
    connection.sendall("\r\n".join([*head, length, "", ""]).encode())
    return connection


def read_answer(connection: socket.socket) -> str:
    with connection.makefile("rb") as stream:
        return stream.read().decode()


def memory(server: Server) -> int:
    """Bytes that are resident."""
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(re.findall(r"VmRSS:\s+(\d+)", text)[0])


# ---- how it changes versions -------------------------------------------------------------------------------------


def other_weights(folder: Path) -> None:
    path = folder / "artifacts/register/model.safetensors"
    tensors = load_tensors(path)
    noise = torch.Generator().manual_seed(0)
    path.unlink()  # it may be a link
    save_tensors(path, {name: torch.randn(one.shape, generator=noise) for name, one in tensors.items()})


def half_the_weights(folder: Path) -> None:
    path = folder / "artifacts/register/model.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def of_somebody_else(folder: Path) -> None:
    (folder / "MLmodel").write_text("flavors:\n  sklearn: {}\n")


def without_phases(folder: Path) -> None:
    """As versions were that know nothing of phases."""
    path = folder / "pyfunc_model.py"
    text = path.read_text()
    path.unlink()
    path.write_text(re.sub(r'with phase\("\w+"\)', "if True", text).replace("from lexiseg.phases import phase", "pass"))


def produce(tree: Path, server: Server, number: str) -> None:
    """Promote a version, and have the server look."""
    client_of(tree).set_registered_model_alias(NAME, "production", number)
    server.look()


@pytest.fixture
def _version_one_afterwards(registered, server):
    yield
    produce(registered, server, "1")
    until(lambda: (server.health()["version"], server.health()["status"]) == ("1", "ok"), "version 1")


@pytest.mark.usefixtures("_version_one_afterwards")
def test_a_promoted_version_takes_over_without_an_error(registered, server, expected):
    number = new_version(registered, NAME, other_weights)
    answers = {f"{NAME}/1": expected, f"{NAME}/{number}": directly(registered, number)}
    assert answers[f"{NAME}/1"][0] != answers[f"{NAME}/{number}"][0]  # or equal answers would prove nothing
    seen, over = [], threading.Event()

    def keep_asking() -> None:
        while not over.is_set():
            answer = server.ask(request(PICTURES[0], labels=LABELS))
            assert answer.status_code == 200, answer.text
            seen.append(answer.headers["X-Lexiseg-Model"])
            assert answer.json() == {"predictions": answers[seen[-1]][0]}

    with ThreadPoolExecutor(2) as clients:
        asking = [clients.submit(keep_asking) for _ in range(2)]
        try:
            until(lambda: len(seen) > 4, "answers of the old version")
            produce(registered, server, number)
            until(lambda: f"{NAME}/{number}" in seen, "an answer of the new version")
            count = len(seen)
            until(lambda: len(seen) > count + 4, "more of them")
        finally:
            over.set()
    for client in asking:
        client.result()
    assert seen[0] == f"{NAME}/1"
    assert set(seen[count:]) == {f"{NAME}/{number}"}
    health = server.health()
    assert (health["version"], health["status"], health["last_error"]) == (number, "ok", None)
    assert f"{NAME}/1 -> {NAME}/{number}, loaded and tried in" in server.log.read_text()


@pytest.mark.usefixtures("_version_one_afterwards")
@pytest.mark.parametrize("change", [half_the_weights, of_somebody_else])
def test_a_version_that_cannot_be_loaded_leaves_the_old_one_alone(registered, server, expected, change):
    number = new_version(registered, NAME, change)
    produce(registered, server, number)
    until(lambda: server.health()["status"] == "degraded", "the server to notice")
    health = server.health()
    assert health["version"] == "1"
    assert health["last_error"]["what"] == f"version {number} cannot be loaded"
    assert health["last_error"]["kind"] == "ModelError"
    assert str(registered) not in json.dumps(health)
    assert server.ask(request(PICTURES[0], labels=LABELS)).json() == {"predictions": expected[0]}
    log = server.log.read_text()
    assert f"version {number} cannot be loaded; {NAME}/1 goes on\nfound: " in log


@pytest.mark.usefixtures("_version_one_afterwards")
def test_a_version_from_before_there_were_phases(registered, server, expected):
    number = new_version(registered, NAME, without_phases)
    produce(registered, server, number)
    until(lambda: server.health()["version"] == number, "the version")
    answer = server.ask(request(PICTURES[0], labels=LABELS))
    assert answer.json() == {"predictions": expected[0]}
    assert re.search(r"vision;dur=.*total;dur=", answer.headers["Server-Timing"])


# ---- how it begins and ends --------------------------------------------------------------------------------------


def test_it_looks_by_itself_and_ends_by_sigterm_also_while_a_client_is_slow(registered):
    client_of(registered).set_registered_model_alias(NAME, "watched", "1")
    address = f"models:/{NAME}@watched"
    with serving(registered, address, "--watch", "0.1") as own, open_request(own, "Content-Length: 1000"):
        assert (own.health()["version"], own.health()["alias"]) == ("1", "watched")
        number = new_version(registered, NAME, lambda _: None)
        client_of(registered).set_registered_model_alias(NAME, "watched", number)
        until(lambda: own.health()["version"] == number, "the new version")
        until(lambda: own.health()["requests"]["waiting"] == 1, "the request to be there")
        own.process.terminate()
        assert own.process.wait(timeout=20) == -15


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lseg"], ["error (TrackingError)", "'lseg'", "METHOD@ALIAS", "lseg@production"]),
        (["lseg@nobody"], ["has no alias 'nobody'", "one of challenger, production"]),
        (["models:/other/1"], ["no registered model 'other'"]),
        (["lseg/1", "--host", "256.0.0.1"], ["error (ServingError)", "256.0.0.1:0 cannot be listened on"]),
    ],
)
def test_what_cannot_be_served(registered, arguments, words):
    command = ["lexiseg", "serve", "--port", "0", *arguments]
    done = subprocess.run(command, cwd=registered, env=environment(registered), text=True, capture_output=True)
    assert done.returncode == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken(registered, server):
    command = ["lexiseg", "serve", "lseg/1", "--port", str(server.port)]
    done = subprocess.run(command, cwd=registered, env=environment(registered), text=True, capture_output=True)
    assert done.returncode == 1
    assert f"127.0.0.1:{server.port} cannot be listened on" in done.stderr
    assert "to do: name another one, such as --port 8081" in done.stderr
