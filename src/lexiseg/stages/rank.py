"""A process that takes part in a training and is not the stage's own: `python -m lexiseg.stages.rank RANK.json`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from lexiseg import environment  # first: it sets what libraries read when they are imported
from lexiseg.checkpoint import checkpoints_in
from lexiseg.errors import LexisegError
from lexiseg.ranks import Rank, rank
from lexiseg.settings import View
from lexiseg.stages.registry import stage_function
from lexiseg.stages.settings import parse_settings
from lexiseg.storage import read_json


def run_rank(job: Rank) -> None:
    """Do a stage as one of its ranks; what another than rank 0 writes is thrown away."""
    environment.keep_memory()
    settings = View(parse_settings(job.values), job.declared)
    inputs = {name: Path(path) for name, path in job.inputs.items()}
    with tempfile.TemporaryDirectory(prefix="lexiseg-rank-") as scratch, checkpoints_in(Path(job.checkpoints)):
        stage_function(job.stage)(settings, inputs, Path(job.outputs) if rank() == 0 else Path(scratch))


if __name__ == "__main__":
    try:
        run_rank(Rank(**read_json(Path(sys.argv[1]))))
    except LexisegError as error:
        sys.exit(f"error ({type(error).__name__})\n{error}")
