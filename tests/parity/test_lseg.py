"""LSeg against golden tensors of the official implementation.

They are no part of the repository: LEXISEG_PARITY_DIR names their folder (default: ../shared/parity beside it).
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lexiseg.methods.lseg.regularisation import ACTIVATIONS, SpatialRegularisation

FOLDER = Path(os.environ.get("LEXISEG_PARITY_DIR") or Path(__file__).parents[3] / "shared/parity")
FIXTURE = "lseg_spatial_reg_blocks"


@pytest.fixture(scope="module")
def golden():
    path = FOLDER / f"{FIXTURE}.safetensors"
    if not path.is_file():
        pytest.skip(f"no {path.name} in {FOLDER}; set LEXISEG_PARITY_DIR to the folder that has it")
    tolerance = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["tolerance"]
    return load_file(path), tolerance


@pytest.mark.parametrize("kind", ["bottleneck", "depthwise"])
@pytest.mark.parametrize("activation", ["relu", "lrelu", "tanh"])
def test_spatial_regularisation_blocks(golden, kind, activation):
    tensors, tolerance = golden
    state = {part: tensors[f"{kind}.{activation}.state_dict.depthwise.depthwise.{part}"] for part in ("weight", "bias")}

    def applied(depth):
        module = SpatialRegularisation(kind, depth=depth, activation=activation)
        module.depthwise.load_state_dict(state)
        with torch.inference_mode():
            return module(tensors["input"])

    expected = {name: tensors[f"{kind}.{activation}.{name}"] for name in ("once_act", "once_noact", "depth4")}
    torch.testing.assert_close(applied(1), expected["once_noact"], **tolerance)
    torch.testing.assert_close(ACTIVATIONS[activation](applied(1)), expected["once_act"], **tolerance)
    torch.testing.assert_close(applied(4), expected["depth4"], **tolerance)
