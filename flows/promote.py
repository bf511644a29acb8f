"""A promotion as a Prefect flow: `lexiseg promote METHOD`, its evidence on Prefect's pages, a human asked on demand.

    python flows/promote.py --method lseg

runs it without any server; `prefect.yaml` has deployments. With `approval` the run pauses when all gates are passed,
until somebody resumes it on its page (or by the API) with a name, yes or no, and a reason. Any answer is a decision in
`lexiseg history`, and so is none in time; a run that is cancelled, or finds nothing to measure, decides nothing.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Annotated, Any

import lexiseg.environment  # noqa: F401  first: it turns telemetry of the libraries off

from prefect import flow, get_run_logger, pause_flow_run  # isort: skip
from prefect.artifacts import create_markdown_artifact
from prefect.exceptions import FlowPauseTimeout
from prefect.input import RunInput
from prefect.runtime import flow_run
from pydantic import Field

from lexiseg.errors import LexisegError
from lexiseg.promotion.promote import Examination, decide, examine, who_asks
from lexiseg.workspace import require_root


class Approval(RunInput):
    """What a human says to a promotion."""

    approve: bool = Field(default=False, description="On: this version becomes production. Off: it is refused.")
    name: str = Field(min_length=1, max_length=100, description="Your name, for the history.")
    reason: str = Field(default="", max_length=500, description="In words, for the history.")


@flow(name="promote", flow_run_name="{method}")
def promote(
    method: str,
    version: str | None = None,
    approval: bool = False,
    approval_hours: Annotated[float, Field(gt=0, le=24 * 30)] = 72.0,
    poll_seconds: Annotated[int, Field(ge=1)] = 10,
) -> dict[str, Any]:
    """Make a registered version production, if it passes the gates of `promotion` in params.yaml.

    A refusal is a result like any other: the run completes, and its result and artifact say why.

    Args:
        method: lseg, tcl or stego.
        version: its number; null: the alias challenger.
        approval: ask a human when all gates are passed.
        approval_hours: without an answer for so long it is refused.
        poll_seconds: between looks for an answer.

    Returns:
        outcome, version, the versions in production before and after, reason, and number of the decision; and whether
        it was carried out: "yes", or why not.
    """
    log, root = get_run_logger(), require_root()
    examination = examine(root, method, version=version, say=log.info)
    show(examination)
    asked, refused = who_asks(f"flow run {flow_run.name}"), None
    if approval and examination.passed:
        log.info("all gates are passed; waiting for somebody to approve")
        try:
            answer = pause_flow_run(
                wait_for_input=Approval, timeout=int(3600 * approval_hours), poll_interval=poll_seconds
            )
        except FlowPauseTimeout:
            refused = f"nobody approved it within {approval_hours:g} hours"
        else:
            said = f"{answer.name}{f': {answer.reason}' if answer.reason else ''}"
            asked["approved_by" if answer.approve else "denied_by"] = said
            refused = None if answer.approve else f"not approved by {said}"
    entry = decide(root, examination, asked=asked, approval=refused)
    decision = entry.decision
    log.info("%s version %s: %s", decision.outcome, decision.version, decision.reason)
    kept = ("outcome", "version", "before", "after", "reason", "number")
    return {key: asdict(decision)[key] for key in kept} | {"carried_out": entry.carried_out}


def show(examination: Examination) -> None:
    """The gates and what was found, on Prefect's pages."""
    candidate = examination.candidate
    rows = [
        f"| {gate.name} | {'passed' if gate.passed else '**FAILED**'} | {gate.found} | {gate.allowed} |"
        for gate in examination.gates
    ]
    text = [
        f"# {candidate.method}, version {candidate.version}",
        f"Production: {f'version {examination.production}' if examination.production else 'none yet'}. "
        f"{'All gates are passed.' if examination.passed else examination.reason}",
        "",
        "| gate | | found | allowed |",
        "|---|---|---|---|",
        *rows,
    ]
    create_markdown_artifact(markdown="\n".join(text), key=f"promotion-{candidate.method}", description=text[0][2:])


def main() -> None:
    """Run the flow in this process: with a server where PREFECT_API_URL names one, else without."""
    parser = argparse.ArgumentParser(description="Promote a registered version, as a Prefect flow.")
    parser.add_argument("--method", required=True, help="lseg, tcl or stego")
    parser.add_argument("--version", help="its number; default: the alias challenger")
    parser.add_argument("--approval", action="store_true", help="ask a human when all gates are passed")
    try:
        found: Any = promote(**vars(parser.parse_args()))
    except LexisegError as error:
        sys.exit(f"error ({type(error).__name__})\n{error}")
    print(f"{found['outcome']} version {found['version']}: {found['reason']}")
    if (found["outcome"], found["carried_out"]) != ("promoted", "yes"):
        sys.exit(1)


if __name__ == "__main__":
    main()
