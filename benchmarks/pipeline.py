"""What each stage of the graph took, from the history of the working tree that it ran in.

    python benchmarks/pipeline.py --out

Nothing runs here, that is for `dvc repro`: `.lexiseg/history.jsonl` has the time of every stage's process, from its
start, and its largest memory. Of each stage it is the last run from start to end under the settings as they are. What
dvc itself does between stages (hashes, its lock file) is not in it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import ROOT, arguments_for, write_result
from lexiseg.errors import StageError
from lexiseg.history import best_match, recall
from lexiseg.pipeline import read_graph
from lexiseg.settings import read_yaml
from lexiseg.stage import value_at
from lexiseg.workspace import private_folder


def rows_of(root: Path) -> list[dict[str, Any]]:
    """{"stage", "seconds", "memory_bytes"} of each stage of the graph, in its order.

    Raises:
        StageError: a stage has not run from start to end under these settings.
    """
    history, values, rows, missing = recall(private_folder(root)), read_yaml(root / "params.yaml"), [], []
    for name, node in read_graph(root).items():
        took = best_match(history, name, {key: value_at(values, key) for key in node.params})
        if took is None or not took.whole or took.params != {key: value_at(values, key) for key in node.params}:
            missing.append(name)
        else:
            rows.append({"stage": name, "seconds": took.seconds, "memory_bytes": took.memory})
    if missing:
        raise StageError(
            found=f"no whole run of {', '.join(missing)} under these settings in the history",
            allowed="stages that ran here from start to end",
            fix="run `dvc repro`; where it finds earlier results, remove outputs/, .dvc/cache and .lexiseg/work first",
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Print the stages with their times, and write them."""
    parser = arguments_for(__doc__, repeats=None)
    parser.add_argument("--root", type=Path, default=ROOT, help="the working tree whose history is read")
    given = parser.parse_args(argv)
    rows = rows_of(vars(given).pop("root"))  # a path of this machine is no part of a result
    for row in rows:
        print(f"  {row['stage']:<28} {row['seconds']:8.1f} s  {row['memory_bytes'] / 1e6:8.0f} MB")
    print(f"  {'all':<28} {sum(row['seconds'] for row in rows):8.1f} s")
    write_result("pipeline", rows, given=given, precision="fp32")


if __name__ == "__main__":
    main()
