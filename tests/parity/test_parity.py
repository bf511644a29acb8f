"""Golden tensors of the official implementations: every fixture in the folder, by the runner of its kind.

They are no part of the repository: LEXISEG_PARITY_DIR names their folder (default: ../shared/parity beside it). A
fixture is NAME.safetensors with NAME.json, which describes it. A runner takes both and compares; `RUNNERS` finds it
by the name. A fixture of a method that lexiseg has, and that no runner knows, fails.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lexiseg.methods import METHODS
from parity.lseg import RUNNERS as LSEG
from parity.stego import RUNNERS as STEGO
from parity.tcl import NEEDS
from parity.tcl import RUNNERS as TCL

FOLDER = Path(os.environ.get("LEXISEG_PARITY_DIR") or Path(__file__).parents[3] / "shared/parity")
RUNNERS = {**LSEG, **STEGO, **TCL}
NAMES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
# Methods whose official code fixtures may come from.
_FIVE = ("lseg", "xdecoder", "tcl", "stego", "ovseg")


def runner_of(name: str):
    return next((run for pattern, run in RUNNERS.items() if re.fullmatch(pattern, name)), None)


def load_fixture(folder: Path, name: str):
    """Tensors and description; those of the fixture it builds upon come along, where it has none of that name."""
    tensors = load_file(folder / f"{name}.safetensors")
    description = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    for pattern, other in NEEDS.items():
        if match := re.fullmatch(pattern, name):
            base, described = load_fixture(folder, match.expand(other))
            tensors = {**base, **tensors}
            description["config"] = {**described["config"], **description.get("config", {})}
    return tensors, description


@pytest.mark.parametrize("name", NAMES or [None])
def test_fixture(name, record_property):
    if name is None:
        pytest.skip(f"no fixtures in {FOLDER}; set LEXISEG_PARITY_DIR to the folder that has them")
    run = runner_of(name)
    record_property("parity", "known" if run else "unknown")
    method = name.partition("_")[0]
    if run is None and method in _FIVE and method not in METHODS:
        pytest.skip(f"{name}: the method {method} is not there yet")
    if run is None:
        pytest.fail(f"no runner for the fixture {name}")
    run(*load_fixture(FOLDER, name))
