"""What a Prefect server needs for lexiseg's deployments: work pools, and the rules that bring crashed runs back.

    python flows/workpools.py

writes it to the server of PREFECT_API_URL, and nothing where it is there already. `make server` does so.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any, Literal

import httpx

import lexiseg.environment  # noqa: F401  first: it turns telemetry of the libraries off

from prefect import get_client  # isort: skip
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL
from prefect.workers.process import ProcessWorker

# Pool -> flow runs at once. Within one, the flow starts as many stages as the machine holds.
POOLS = {"lexiseg-cpu": 1, "lexiseg-gpu": 1}
SILENCE = timedelta(seconds=90)  # three heartbeats (pyproject.toml, tool.prefect)
START = timedelta(minutes=10)  # longer than any flow takes from a worker's hands to its first line
LONGEST = timedelta(days=30)
ENDS = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
BEGINS = {"prefect.flow-run.Running", "prefect.flow-run.Retrying"}


def automations() -> list[AutomationCore]:
    """The rules, as Prefect's automations, for flow runs of our pools alone.

    A run that falls silent has lost its process (a machine that died tells nobody), and counts as crashed. A crashed
    run is scheduled again, and DVC passes over the stages that are finished; not so where it crashed before its flow
    began (code that cannot be imported), which would go on for ever. One that a worker took and never began is.
    """
    again = ChangeFlowRunState(
        name="AwaitingRetry",
        state=StateType.SCHEDULED,
        message="Its process was lost; started again, finished stages are passed over",
        force=True,
    )
    crashed = ChangeFlowRunState(
        name="Crashed",
        state=StateType.CRASHED,
        message=f"No heartbeat for {SILENCE.seconds} s: its process is gone",
        force=False,
    )
    beat = "prefect.flow-run.heartbeat"
    return [
        _rule("a silent run has crashed", {beat}, {beat, *ENDS}, Posture.Proactive, SILENCE, crashed),
        _rule("a crashed run is started again", BEGINS, {"prefect.flow-run.Crashed"}, Posture.Reactive, LONGEST, again),
        _rule(
            "a run that never began is started again",
            {"prefect.flow-run.Pending"},
            {*BEGINS, *ENDS},
            Posture.Proactive,
            START,
            again,
        ),
    ]


def _rule(
    name: str,
    after: set[str],
    expect: set[str],
    posture: Literal[Posture.Proactive, Posture.Reactive],
    within: timedelta,
    action: ChangeFlowRunState,
) -> AutomationCore:
    return AutomationCore(
        name=f"lexiseg: {name}",
        trigger=EventTrigger(
            after=after,
            expect=expect,
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=ResourceSpecification(
                {"prefect.resource.role": "work-pool", "prefect.resource.name": list(POOLS)}
            ),
            for_each={"prefect.resource.id"},
            posture=posture,
            threshold=1,
            within=within,
        ),
        actions=[action],
    )


def set_up(client: SyncPrefectClient) -> list[str]:
    """Create what the server lacks. A rule that is there as it should be is left alone: writing it makes it forget
    which runs it is watching.

    Returns:
        What was written, in words.
    """
    written = []
    for name, limit in POOLS.items():
        try:
            client.read_work_pool(name)
        except ObjectNotFound:
            template = ProcessWorker.get_default_base_job_template()
            pool = WorkPoolCreate(name=name, type="process", base_job_template=template, concurrency_limit=limit)
            client.create_work_pool(pool)
            written.append(f"work pool {name}, {limit} flow run at once")
    for automation in automations():
        there = client.read_automations_by_name(automation.name)
        if not there:
            client.create_automation(automation)
        elif _content(there[0]) == _content(automation):
            continue
        else:
            client.update_automation(there[0].id, automation)
        written.append(f"automation `{automation.name}`")
    return written


def _content(automation: AutomationCore) -> dict[str, Any]:
    values = automation.model_dump(mode="json", include={"name", "enabled", "trigger", "actions"})
    values["trigger"].pop("id", None)
    return values


def main() -> None:
    """Set up the server of PREFECT_API_URL."""
    if not PREFECT_API_URL.value():
        sys.exit(
            "found: PREFECT_API_URL is not set\n"
            "allowed: the address of a Prefect server\n"
            "to do: export PREFECT_API_URL=http://127.0.0.1:4200/api, after `make server`"
        )
    try:
        with get_client(sync_client=True) as client:
            written = set_up(client)
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        sys.exit(
            f"found: Prefect at {PREFECT_API_URL.value()} did not take it ({error})\n"
            "allowed: a Prefect server that runs, and may be written to\n"
            "to do: start it (`make server`), or correct PREFECT_API_URL and PREFECT_API_AUTH_STRING"
        )
    print("\n".join(written) if written else "work pools and automations are there")


if __name__ == "__main__":
    main()
