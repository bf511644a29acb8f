"""The flow of a promotion on a small working tree, with Prefect's server of a test, and a human who is asked."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from helpers.registered import Registry, without_processes
from helpers.working_tree import change
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import StateType

from flows.promote import promote
from lexiseg.promotion.promote import read_history

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def registry(current_tree) -> Registry:
    """A registry whose first version is in production."""
    gates = {"floors": {"lseg": {"miou": 0.2}}, "latency": 60_000.0, "memory": 60_000.0}
    change(current_tree / "params.yaml", {"promotion": gates})
    found = Registry(current_tree)
    found.add(0.5)
    return found


def answer(**said: Any) -> threading.Thread:
    """Somebody who waits for a paused run and resumes it."""

    def wait() -> None:
        paused = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PAUSED])))
        with get_client(sync_client=True) as client:
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline:
                runs = client.read_flow_runs(flow_run_filter=paused)
                if runs:
                    client.resume_flow_run(runs[0].id, run_input=said)
                    return
                time.sleep(0.5)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_flow_promotes_and_shows_its_evidence(prefect, registry, monkeypatch):
    """The first is measured by real processes."""
    found: Any = promote("lseg")
    assert (found["outcome"], found["after"]) == ("promoted", "1")
    without_processes(monkeypatch)
    registry.add(0.3)
    refused: Any = promote("lseg")
    assert (refused["outcome"], refused["after"]) == ("refused", "1")
    with get_client(sync_client=True) as client:
        shown = [str(one.data) for one in client.read_artifacts() if one.key == "promotion-lseg"]
    assert any("| difference | **FAILED** |" in text for text in shown)
    entries = read_history(registry.root, "lseg").entries
    assert all(entry.decision.asked["through"].startswith("flow run ") for entry in entries)


def test_a_human_approves_or_does_not(prefect, registry, monkeypatch):
    without_processes(monkeypatch)
    human = answer(approve=False, name="Bob", reason="Friday")
    found: Any = promote("lseg", approval=True, poll_seconds=1)
    human.join()
    assert (found["outcome"], found["reason"]) == ("refused", "not approved by Bob: Friday")
    human = answer(approve=True, name="Ann")
    found = promote("lseg", approval=True, poll_seconds=1)
    human.join()
    assert (found["outcome"], found["after"]) == ("promoted", "1")
    first, second = read_history(registry.root, "lseg").entries
    assert first.decision.asked["denied_by"] == "Bob: Friday"
    assert second.decision.asked["approved_by"] == "Ann"


def test_without_an_answer_it_is_refused(prefect, registry, monkeypatch):
    without_processes(monkeypatch)
    found: Any = promote("lseg", approval=True, approval_hours=1 / 3600, poll_seconds=1)
    assert found["outcome"] == "refused"
    assert "nobody approved it within" in found["reason"]
