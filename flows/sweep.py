"""A sweep as a Prefect flow: `lexiseg sweep METHOD` with its log, table and pictures on Prefect's pages.

    python flows/sweep.py --method tcl --space inference --trials 10

runs it without any server; `prefect.yaml` has a deployment. A flow run that is started again after a crash goes on with
its study: finished trials are kept, and the trainings of unfinished ones go on from their checkpoints.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import lexiseg.environment  # noqa: F401  first: it turns telemetry of the libraries off

from prefect import flow, get_run_logger  # isort: skip
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from pydantic import Field

from lexiseg.driver import allow, run_group, stop_all
from lexiseg.errors import LexisegError, StageError, error_in
from lexiseg.sweeps.sweep import Request, study_name, sweep_folder
from lexiseg.workspace import require_root

SHOWN = ("history", "importance", "parallel_coordinate", "front")  # pictures on Prefect's page; MLflow has all


@flow(name="sweep", flow_run_name="{method}")
def sweep(
    method: str,
    space: list[str] | None = None,
    settings: dict[str, Any] | None = None,
    trials: Annotated[int, Field(ge=1)] = 20,
    study: str | None = None,
    workers: Annotated[int, Field(ge=1)] = 1,
    objectives: list[str] | None = None,
    constraints: list[str] | None = None,
    split: str = "val",
    seed: int = 0,
    prune: bool = True,
    gpus: Annotated[float, Field(ge=0)] = 0.0,
    timeout_hours: Annotated[float, Field(gt=0)] = 72.0,
) -> dict[str, Any]:
    """Search settings of a method; params.yaml and outputs/ stay as they are.

    The storage is that of the environment variable LEXISEG_STORAGE, since its address may hold a password; without
    it .lexiseg/sweeps.db.

    Args:
        method: lseg, tcl or stego.
        space: spaces of the method, knobs (KEY, KEY=low..high, …) or YAML files; null: its usual space.
        settings: changes by dotted key that all trials share.
        trials: of the whole study, those that are there included.
        study: its name; null: method and space.
        workers: processes that work on trials at once.
        objectives: metrics, latency or memory; null: miou.
        constraints: such as "latency<=50".
        split: whose metrics are compared.
        seed: of the search alone.
        prune: end trainings that are behind the others.
        gpus: of each worker, on a Ray cluster (LEXISEG_RAY).
        timeout_hours: after that long the sweep is stopped; a new run goes on with it.

    Returns:
        The counts of trials by state, and the best trial.
    """
    log, root = get_run_logger(), require_root()
    allow()
    fixed = [f"{key}={json.dumps(value)}" for key, value in (settings or {}).items()]
    study = study_name(Request(method=method, space=space or (), fixed=fixed, study=study))
    options = [f"--{name}={value}" for name, value in (("trials", trials), ("workers", workers), ("split", split))]
    options += [f"--study={study}", f"--seed={seed}", "--prune" if prune else "--no-prune", f"--gpus={gpus}"]
    options += [f"--set={one}" for one in fixed]
    for name, values in (("space", space), ("objective", objectives), ("constraint", constraints)):
        options += [f"--{name}={value}" for value in values or ()]
    command = [sys.executable, "-m", "lexiseg", "sweep", "run", method, *options]
    try:
        code, lines = run_group(command, root, say=log.info, timeout=3600 * timeout_hours)
    finally:
        stop_all()  # on the way out of a cancellation it may still be running
    if code:
        raise error_in(lines) or StageError(
            found=f"the sweep ended with exit code {code}: {lines[-1] if lines else 'it said nothing'}",
            allowed="a sweep that ends without an error",
            fix="see its log above, then start the flow again: it goes on with its study",
        )
    folder = sweep_folder(root, study)
    found = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    publish_artifacts(found, folder)
    best = [trial for trial in found["trials"] if trial["best"]]
    return {"study": found["study"], "counts": found["counts"], "best": best}


def publish_artifacts(found: dict[str, Any], folder: Path) -> None:
    """The table of trials, and pictures, on Prefect's pages."""
    key = "sweep-" + "".join(letter if letter.isalnum() else "-" for letter in found["study"].lower())
    rows = [
        {"trial": trial["trial"], "state": trial["state"] + (" *" if trial["best"] else "")}
        | dict(zip([text.partition(":")[0] for text in found["objectives"]], trial["values"], strict=False))
        | trial["settings"]
        for trial in found["trials"]
    ]
    create_table_artifact(table=rows, key=f"{key}-trials", description=f"Study {found['study']}; * the best")
    pictures = [path for path in sorted(folder.glob("*.png")) if path.stem.startswith(SHOWN)]
    text = [
        f"![{path.stem}](data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()})" for path in pictures
    ]
    if text:
        create_markdown_artifact(markdown="\n\n".join(text), key=f"{key}-pictures", description=found["study"])


def main() -> None:
    """Run the flow in this process: with a server where PREFECT_API_URL names one, else without."""
    parser = argparse.ArgumentParser(description="Search settings of a method, as a Prefect flow.")
    parser.add_argument("--method", required=True, help="lseg, tcl or stego")
    parser.add_argument("--space", action="append", help="a space, a knob or a YAML file; may be given again")
    parser.add_argument("--trials", type=int, default=20, help="trials of the whole study")
    parser.add_argument("--study", help="its name; default: method and space")
    parser.add_argument("--workers", type=int, default=1, help="processes at once")
    given = parser.parse_args()
    if given.trials < 1 or given.workers < 1:
        parser.error("--trials and --workers must be 1 or more")
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(128 + signal.SIGHUP))  # a closed terminal ends the trials too
    try:
        found: Any = sweep(**vars(given))
    except LexisegError as error:
        sys.exit(f"error ({type(error).__name__})\n{error}")
    print(json.dumps(found["counts"]))
    print(os.linesep.join(f"best: {trial['values']} {json.dumps(trial['settings'])}" for trial in found["best"]))


if __name__ == "__main__":
    main()
