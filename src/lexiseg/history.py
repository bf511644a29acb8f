"""What stages took on this machine: times, memory and disk, from which `lexiseg plan` expects those of the next run.

None of it is part of an output or of a fingerprint; deleting `.lexiseg/history.jsonl` only makes plans forget.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = "history.jsonl"


@dataclass(frozen=True)
class Took:
    """One run of a stage from its start to its end, in a process of its own.

    Attributes:
        stage: its name in dvc.yaml.
        params: the parameters it declares, by dotted key.
        seconds: wall-clock time from the start of the process.
        memory: bytes of the process at its largest, and of its largest child.
        disk: bytes of the outputs.
        whole: False where a training went on from a checkpoint, so that the time is that of the rest.
        finished: UTC, ISO 8601.
    """

    stage: str
    params: dict[str, Any]
    seconds: float
    memory: int
    disk: int
    whole: bool
    finished: str


def remember(private: Path, took: Took) -> None:
    """Append a run to the history in the folder `.lexiseg`."""
    # One write of one line: several processes may append at once.
    with (private / FILE).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(took), sort_keys=True) + "\n")


def recall(private: Path) -> list[Took]:
    """All remembered runs, oldest first; lines that cannot be read (of a killed process, say) are passed over."""
    path = private / FILE
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(Took(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def best_match(history: list[Took], stage: str, params: Mapping[str, Any]) -> Took | None:
    """The run to expect the next one from: whole before resumed, equal settings before others, the latest of those."""
    runs = [took for took in history if took.stage == stage]
    return max(
        enumerate(runs), key=lambda item: (item[1].whole, item[1].params == dict(params), item[0]), default=(0, None)
    )[1]


def peak_memory() -> int:
    """Bytes that this process held at its largest, and the largest of the children that have ended."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    children = unit * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    # Linux counts as a process's own what its parent held when it was started; this line of /proc does not.
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() if status.is_file() else []
    own = next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    return children + (unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if own is None else own)
