"""What a Prefect server needs for lexiseg's deployments: work pools, and two rules that bring crashed runs back.

    python flows/workpools.py

writes it to the server of PREFECT_API_URL, and changes nothing where it is there already. `make server` does so.
"""

from __future__ import annotations

import sys
from datetime import timedelta

import lexiseg.environment  # noqa: F401  first: it turns telemetry of the libraries off

from prefect import get_client  # isort: skip
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.workers.process import ProcessWorker

# Pool -> flow runs at once. Within one, the flow starts as many stages as the cores hold.
POOLS = {"lexiseg-cpu": 1, "lexiseg-gpu": 1}
SILENCE = timedelta(seconds=90)  # three heartbeats (pyproject.toml, tool.prefect)
ENDS = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}


def automations() -> list[AutomationCore]:
    """The rules, as Prefect's automations.

    A flow run that falls silent has lost its process (a machine that died tells nobody), and counts as crashed. A
    crashed run of one of our pools is scheduled again; DVC passes over the stages that are finished.
    """
    return [
        AutomationCore(
            name="lexiseg: a silent run has crashed",
            trigger=EventTrigger(
                after={"prefect.flow-run.heartbeat"},
                expect={"prefect.flow-run.heartbeat", *ENDS},
                match={"prefect.resource.id": ["prefect.flow-run.*"]},
                match_related={"prefect.resource.role": "work-pool", "prefect.resource.name": list(POOLS)},
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=SILENCE,
            ),
            actions=[
                ChangeFlowRunState(
                    name="Crashed",
                    state=StateType.CRASHED,
                    message=f"No heartbeat for {SILENCE.seconds} s: its process is gone",
                    force=False,
                )
            ],
        ),
        AutomationCore(
            name="lexiseg: a crashed run is started again",
            trigger=EventTrigger(
                expect={"prefect.flow-run.Crashed"},
                match={"prefect.resource.id": ["prefect.flow-run.*"]},
                match_related={"prefect.resource.role": "work-pool", "prefect.resource.name": list(POOLS)},
                for_each={"prefect.resource.id"},
                posture=Posture.Reactive,
                threshold=1,
            ),
            actions=[
                ChangeFlowRunState(
                    name="AwaitingRetry",
                    state=StateType.SCHEDULED,
                    message="Crashed, and started again: finished stages are passed over",
                    force=True,
                )
            ],
        ),
    ]


def set_up(client: SyncPrefectClient) -> list[str]:
    """Create what the server lacks, and bring its rules up to date.

    Returns:
        What was created, in words.
    """
    created = []
    for name, limit in POOLS.items():
        try:
            client.read_work_pool(name)
        except ObjectNotFound:
            template = ProcessWorker.get_default_base_job_template()
            pool = WorkPoolCreate(name=name, type="process", base_job_template=template, concurrency_limit=limit)
            client.create_work_pool(pool)
            created.append(f"work pool {name}, {limit} flow run at once")
    for automation in automations():
        there = client.read_automations_by_name(automation.name)
        if there:
            client.update_automation(there[0].id, automation)
        else:
            client.create_automation(automation)
            created.append(f"automation `{automation.name}`")
    return created


def main() -> None:
    """Set up the server of PREFECT_API_URL."""
    if not PREFECT_API_URL.value():
        sys.exit(
            "found: PREFECT_API_URL is not set\n"
            "allowed: the address of a Prefect server\n"
            "to do: export PREFECT_API_URL=http://127.0.0.1:4200/api, after `make server`"
        )
    with get_client(sync_client=True) as client:
        created = set_up(client)
    print("\n".join(created) if created else "work pools and automations are there")


if __name__ == "__main__":
    main()
