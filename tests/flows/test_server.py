from __future__ import annotations

import socket
from pathlib import Path

import pytest

from flows import server
from flows.server import serve
from flows.workpools import POOLS, automations
from lexiseg.errors import StageError
from lexiseg.settings import read_yaml

ROOT = Path(__file__).parents[2]


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StageError, match=f"port {port} of 127") as caught:
            serve(tmp_path, prefect_port=port, mlflow_port=port + 1)
    assert caught.value.fix.endswith(f"make server PREFECT_PORT={port + 1}")
    assert not list(tmp_path.iterdir())


def test_a_server_that_ends_at_once_is_named_with_its_last_words(tmp_path, monkeypatch):
    # Neither package is there for this Python.
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no module named $2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(server.sys, "executable", str(python))
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], two.getsockname()[1]
    with pytest.raises(StageError, match="the server of Prefect ended: no module named prefect"):
        serve(tmp_path / "tree", prefect_port=ports[0], mlflow_port=ports[1])


def test_deployments_use_the_pools_that_are_made():
    deployments = read_yaml(ROOT / "prefect.yaml")["deployments"]
    assert {deployment["work_pool"]["name"] for deployment in deployments} == set(POOLS)
    assert [(one["entrypoint"].partition(":")[2], one["name"]) for one in deployments] == [
        *(("reproduce", name) for name in ("all", "lseg", "tcl", "all-gpu", "nightly", "data-changed")),
        ("sweep", "tcl"),
        ("promote", "challenger"),
        ("promote", "challenger-with-approval"),
    ]


def test_rules_are_for_runs_of_our_pools_alone():
    for automation in automations():
        values = automation.model_dump(mode="json")
        assert values["trigger"]["match_related"]["prefect.resource.name"] == list(POOLS)
        assert values["trigger"]["for_each"] == ["prefect.resource.id"]
    again = next(one for one in automations() if "crashed run" in one.name)
    # Without a beginning there is no crash to answer: code that cannot be imported would be started for ever.
    assert "prefect.flow-run.Running" in again.model_dump(mode="json")["trigger"]["after"]
