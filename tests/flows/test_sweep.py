"""The flow of a sweep on a small working tree, with Prefect's server of a test."""

from __future__ import annotations

import json
from typing import Any

import pytest
from prefect import get_client
from prefect.exceptions import ParameterTypeError

from flows.sweep import sweep
from lexiseg.errors import SettingsError

pytestmark = pytest.mark.slow


def test_a_flow_runs_a_sweep_and_shows_it(prefect, current_tree):
    asked: dict[str, Any] = {"method": "tcl", "space": ["inference"], "study": "flow", "trials": 3}
    found: Any = sweep(**asked, settings={"tcl.train.flip": False})
    assert found["counts"]["complete"] == 3
    assert len(found["best"]) == 1
    with get_client(sync_client=True) as client:
        artifacts = {str(artifact.key): str(artifact.data) for artifact in client.read_artifacts()}
    assert len(json.loads(artifacts["sweep-flow-trials"])) == 3
    assert "data:image/png;base64," in artifacts["sweep-flow-pictures"]
    # Started again, it has nothing to do.
    again: Any = sweep(**asked, settings={"tcl.train.flip": False})
    assert again["counts"]["complete"] == 3


def test_what_is_asked_for_wrongly_is_told_of(prefect, current_tree):
    with pytest.raises(SettingsError, match="no sweep of `unet`"):
        sweep(method="unet")
    with pytest.raises(ParameterTypeError):
        sweep(method="tcl", trials=0)
