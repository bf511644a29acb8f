"""What a server as a process does not show: faults of the model itself, and bodies that take too long."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from helpers.serving import png, request
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from mlflow.types import ColSpec, Schema

from lexiseg.errors import LabelError
from lexiseg.phases import Phases
from lexiseg.serving.app import ServingApp, timing
from lexiseg.serving.current import Current, Served
from lexiseg.serving.limits import Limits

PICTURE = png(np.zeros((4, 4, 3), np.uint8))


class Model:
    """As MLflow's scoring server takes it."""

    def __init__(self, predict):
        self._predict, self.metadata = predict, self

    def get_input_schema(self):
        return Schema([ColSpec("string", "image_b64")])

    def predict(self, data, params=None):
        return self._predict(data)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    content: Any


def app_of(predict, **limits) -> ServingApp:
    served = Served(name="lexiseg-lseg", number="1", app=scoring_server.init(Model(predict)))  # type: ignore[arg-type]
    return ServingApp(Current(lambda: ("1", lambda: served)), alias=None, limits=Limits(**limits))


async def ask(app: ServingApp, method: str, path: str, body: Any = None) -> Answer:
    """One request; without a body its body never comes."""
    sent: list[dict[str, Any]] = []
    waiting = [] if body is None else [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive():
        return waiting.pop() if waiting else await asyncio.get_running_loop().create_future()

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    await app({"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}, receive, send)
    said = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], said, json.loads(sent[1]["body"]))


def test_a_fault_of_the_model_is_an_error_of_the_server_without_its_stack(caplog):
    def fails(data):
        raise ZeroDivisionError("in /home/me/model.py")

    app = app_of(fails)
    answer = asyncio.run(ask(app, "POST", "/invocations", request(PICTURE)))
    assert (answer.status, answer.content["error_code"]) == (500, "INTERNAL_ERROR")
    assert "found: a fault of the server" in answer.content["message"]
    assert "home" not in answer.content["message"]
    assert "ZeroDivisionError: in /home/me/model.py" in caplog.text
    assert asyncio.run(ask(app, "GET", "/health")).content["requests"]["failed"] == 1


def test_what_the_model_refuses_is_an_error_of_the_client():
    def refuses(data):
        error = LabelError(found="the labels zyx, which name no cluster", allowed="grass", fix="leave them out")
        raise MlflowException.invalid_parameter_value(str(error))

    answer = asyncio.run(ask(app_of(refuses), "POST", "/invocations", request(PICTURE, labels=["zyx"])))
    assert answer.status == 400
    message = "found: the labels zyx, which name no cluster\nallowed: grass\nto do: leave them out"
    assert answer.content == {"error_code": "INVALID_PARAMETER_VALUE", "message": message}


def test_what_the_model_answers_goes_through():
    answer = asyncio.run(ask(app_of(len), "POST", "/invocations", request(PICTURE, PICTURE)))
    assert (answer.status, answer.content) == (200, {"predictions": 2})
    assert answer.headers["x-lexiseg-model"] == "lexiseg-lseg/1"


def test_a_body_that_does_not_come():
    app = app_of(len, body_seconds=0.01)
    answer = asyncio.run(ask(app, "POST", "/invocations"))
    assert (answer.status, answer.content["error_code"]) == (408, "REQUEST_TIMEOUT")
    assert "found: 0 bytes of a body after 0.01 s" in answer.content["message"]
    assert asyncio.run(ask(app, "GET", "/health")).content["requests"]["waiting"] == 0


def test_no_more_calls_at_once_than_allowed():
    together = threading.Barrier(2)
    at_once, most, lock = 0, 0, threading.Lock()

    def predict(data):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        together.wait(timeout=60)  # two calls meet here, and there are never three
        with lock:
            at_once -= 1
        return len(data)

    async def ask_all() -> list[Answer]:
        return await asyncio.gather(*[ask(app, "POST", "/invocations", request(PICTURE)) for _ in range(6)])

    app = app_of(predict, calls=2)
    assert [answer.status for answer in asyncio.run(ask_all())] == [200] * 6
    assert most == 2


@pytest.mark.parametrize(
    ("seconds", "header"),
    [
        ({"vision": 0.02, "wait": 0.001}, "wait;dur=1.00, vision;dur=20.00, total;dur=21.00"),
        ({}, "total;dur=0.00"),
    ],
)
def test_timing(seconds, header):
    phases = Phases()
    phases.seconds.update(seconds)
    assert timing(phases) == header
