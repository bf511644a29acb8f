"""What is measured for a promotion: costs, use in a clean process, and scores where none were recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lexiseg.errors import LexisegError, PromotionError
from lexiseg.methods import METHODS
from lexiseg.promotion.candidate import Candidate, Scores, read_counts
from lexiseg.settings import override
from lexiseg.stages.registry import stage_function
from lexiseg.stages.settings import parse_settings, read_values
from lexiseg.storage import read_json

PREPARED = "outputs/prepare"
LONGEST_SECONDS = 900.0


def check_loading(candidate: Candidate) -> dict[str, str | None]:
    """Load a version and ask it for its own example, in a process and a folder of its own.

    Returns:
        "fault" and "signature" of `lexiseg.tracking.load_check`.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        found = _ask("lexiseg.tracking.load_check", str(candidate.pyfunc), folder=Path(elsewhere))
    if isinstance(found, str):
        return {"fault": found, "signature": "not looked at: the process that looks gave no answer"}
    return found


def measure_costs(root: Path, candidate: Candidate, split: str) -> dict[str, float] | str:
    """Latency (ms per picture, median) and memory (MB) of a version on this machine, in a process of its own.

    It has as many threads as `threads` of params.yaml says, whoever asks.

    Returns:
        See `lexiseg.cost`; where nothing could be measured, why not.
    """
    prepared = root / PREPARED
    if not (prepared / "info.json").is_file():
        return f"there are no pictures to measure with: {PREPARED} is missing; `dvc repro prepare` makes it"
    threads = str(parse_settings(read_values(root)).threads)
    return _ask("lexiseg.cost", str(candidate.folder), str(prepared), split, folder=root, OMP_NUM_THREADS=threads)


def _ask(module: str, *arguments: str, folder: Path, **variables: str) -> Any:
    """What a module prints as JSON when it runs as a program; in words, why it printed none."""
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(
            command, cwd=folder, env=_environment() | variables, capture_output=True, text=True, timeout=LONGEST_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {LONGEST_SECONDS:.0f} s"
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = done.stderr.strip()
        _, mark, ours = said.rpartition("found: ")  # of an error of lexiseg, its first part
        text = ours.splitlines()[0] if mark else (said.splitlines() or ["it said nothing"])[-1]
        return f"exit code {done.returncode}: {text[:300]}"


def _environment() -> dict[str, str]:
    # The package of this working tree, also for copies that are not installed; and none of MLflow's passwords.
    package = str(Path(__file__).parents[2])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_TRACKING_")}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))}


def measure_again(root: Path, candidate: Candidate, split: str) -> Scores:
    """Predict and evaluate a split of outputs/prepare with a registered version, by the stages of the graph.

    What belongs to the model (its settings of prediction and refinement) is taken from its folder, all else from
    params.yaml.

    Raises:
        PromotionError: there is no such split here, or the stages refused; with their words.
    """
    method, prepared = candidate.method, root / PREPARED
    config = read_json(candidate.folder / "model.json")
    changes = {f"{method}.{key}": config[key] for key in ("predict", "refine") if key in config}
    changes |= {"evaluate.splits": [split], "evaluate.pictures": 0}
    if METHODS[method].clusters and config["names"] is None:
        changes[f"{method}.protocol"] = "unlabelled"
    with tempfile.TemporaryDirectory() as scratch:
        predictions, made = Path(scratch) / "predict", Path(scratch) / "evaluate"
        predictions.mkdir()
        made.mkdir()
        try:
            info = read_json(prepared / "info.json")
            settings = parse_settings(override(read_values(root), changes), source=f"params.yaml with {changes}")
            inputs = {
                "prepare": prepared,
                f"{method}/{METHODS[method].model}": candidate.folder,
                "encode": candidate.folder,
                "encode-trunk": candidate.folder / "trunk",
                f"{method}/predict": predictions,
            }
            stage_function(f"{method}-predict")(settings, inputs, predictions)
            stage_function(f"{method}-evaluate")(settings, inputs, made)
        except (LexisegError, FileNotFoundError) as error:
            raise PromotionError(
                found=f"version {candidate.version} could not be evaluated on {split} of {PREPARED}: "
                f"{getattr(error, 'found', error)}",
                allowed="a prepared data set that the version can be asked about",
                fix=getattr(error, "fix", "`dvc repro prepare` makes it"),
            ) from error
        metrics, tables = read_json(made / "metrics.json"), made / "tables"
        images = tables / f"{split}_images.parquet"
        if not images.is_file():
            raise PromotionError(
                found=f"nothing is compared with labels on {split} under {metrics['protocol']['name']}",
                allowed="a protocol and a split with labels",
                fix="set `promotion.split` to a split that has them",
            )
        return Scores(
            protocol=metrics["protocol"],
            data_digest=info["content_digest"],
            counts=read_counts(images, tables / f"{split}_per_class.csv"),
            metrics=metrics["splits"][split],
            measured="again",
        )
