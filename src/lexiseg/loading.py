"""`lexiseg.load`: a model by its folder or by its address in MLflow's registry."""

from __future__ import annotations

from pathlib import Path

from lexiseg import inference
from lexiseg.workspace import require_root

REGISTERED = "models:/"


def load(source: str | Path) -> inference.Model:
    """Load a model folder, or a registered model (`models:/lexiseg-lseg@challenger`, `models:/lexiseg-lseg/1`).

    Raises:
        ModelError: not a model folder.
        TrackingError: MLflow cannot be reached, or does not know the address.
    """
    if str(source).startswith(REGISTERED):
        # Here, because MLflow takes a second to import and a folder does not need it.
        from lexiseg.tracking.registry import download_model

        return inference.load(download_model(str(source), require_root()))
    return inference.load(source)
