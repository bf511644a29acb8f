"""What the Prefect flow costs beside plain `dvc repro`: the whole graph in fresh clones, one after the other in turns.

    python benchmarks/flow_overhead.py --pairs 1 --out benchmarks/results/flow_overhead.json

A pair takes about eighteen minutes on two cores, which should have nothing else to do. Both sides end with a published
MLflow store, the flow with its temporary server started and stopped. The outputs have to be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lexiseg.history import recall
from lexiseg.provenance import made_with
from lexiseg.storage import sha256_of_file, write_json

ROOT = Path(__file__).parents[1]
SIDES = {
    "dvc": "dvc repro && lexiseg sync",
    "flow": f"{sys.executable} flows/reproduce.py",
}


def clone(place: Path) -> Path:
    """A fresh clone with its data."""
    tree = place / "lexiseg"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tree)], check=True)
    subprocess.run(["dvc", "pull", "--quiet", "--remote", "embedded", "data/world"], cwd=tree, check=True)
    return tree


def measure(command: str, place: Path) -> dict:
    """Seconds of a side, the hash of its dvc.lock, and the seconds of each stage's process."""
    tree = clone(place)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LEXISEG", "PREFECT", "MLFLOW"))}
    variables = kept | {"PYTHONPATH": str(tree / "src"), "PREFECT_HOME": str(place / "prefect")}
    with (place / "log").open("w") as log:
        started = time.monotonic()
        subprocess.run(["bash", "-c", command], cwd=tree, env=variables, stdout=log, stderr=log, check=True)
        seconds = time.monotonic() - started
    stages = {took.stage: took.seconds for took in recall(tree / ".lexiseg")}
    return {"seconds": round(seconds, 1), "dvc.lock": sha256_of_file(tree / "dvc.lock"), "stages": stages}


def main() -> None:
    """Measure in turns and report the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    made = made_with(ROOT)
    place = Path(tempfile.mkdtemp(prefix="flow-overhead-"))
    runs: dict[str, list[dict]] = {side: [] for side in SIDES}
    for number in range(given.pairs):
        for side, command in SIDES.items():
            folder = place / f"{side}-{number}"
            folder.mkdir()
            runs[side].append(measure(command, folder))
            print(f"{side}: {runs[side][-1]['seconds']} s", flush=True)
            shutil.rmtree(folder)
    locks = {run["dvc.lock"] for rows in runs.values() for run in rows}
    median = {side: statistics.median(run["seconds"] for run in rows) for side, rows in runs.items()}
    result = {
        "ratio": round(median["flow"] / median["dvc"], 3),
        "outputs_equal": len(locks) == 1,
        "runs": runs,
        "made_with": made,
    }
    if given.out:
        write_json(given.out, result)
    print(json.dumps({"ratio": result["ratio"], "outputs_equal": result["outputs_equal"]}))


if __name__ == "__main__":
    main()
