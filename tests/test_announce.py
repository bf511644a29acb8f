from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_CSRF_SUPPORT_ENABLED, temporary_settings

from lexiseg.announce import announce_data


@pytest.fixture
def server() -> Iterator[tuple[str, list]]:
    """The address of a server that takes events, and what it has taken."""
    taken: list = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            taken.append((self.path, json.loads(body)))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/api", taken
    server.shutdown()


def test_changed_data_is_an_event(server):
    address, taken = server
    with temporary_settings({PREFECT_API_URL: address, PREFECT_CLIENT_CSRF_SUPPORT_ENABLED: False}):
        assert announce_data("street")
    ((path, (event,)),) = taken
    assert path == "/api/events"
    assert event["event"] == "lexiseg.data.changed"
    assert event["resource"]["prefect.resource.id"] == "lexiseg.data.street"


def test_without_a_server_nobody_is_told():
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert not announce_data("street")


def test_a_server_that_is_down_is_a_note(capsys):
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert not announce_data("street")
    assert "note: Prefect at http://127.0.0.1:9/api was not told of it" in capsys.readouterr().err
