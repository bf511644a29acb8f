"""Whether a registered version can be used by somebody else: `python -m lexiseg.tracking.load_check FOLDER`.

In a process and a folder of its own, without the promoter's password of MLflow: it loads the version as MLflow does,
asks it for the version's own input example, and looks at the answer. Prints JSON: {"fault", "signature"}, each null or
in words.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.models import Model
from mlflow.models.utils import load_serving_example
from PIL import Image

from lexiseg.tracking.pyfunc_model import COLUMNS, IMAGE, LABEL_MAP, LABELS, LEGEND
from lexiseg.tracking.registry import model_signature


def check(folder: Path) -> dict[str, str | None]:
    """Load, predict, look.

    Args:
        folder: what MLflow loads, on this machine.

    Returns:
        "fault": why it cannot be used; "signature": how its signature differs. None where all is well.
    """
    return {"signature": _signature_fault(folder), "fault": _fault(folder)}


def _signature_fault(folder: Path) -> str | None:
    found, expected = Model.load(str(folder)).signature, model_signature()
    if found is None:
        return "there is no signature"
    said = []
    for part in ("inputs", "outputs", "params"):
        ours, theirs = (str(getattr(one, part)) for one in (expected, found))
        if ours != theirs:
            said.append(f"{part} are {theirs}, not {ours}")
    return "; ".join(said) or None


def _fault(folder: Path) -> str | None:
    try:
        example: dict[str, Any] = json.loads(load_serving_example(str(folder)))
        table = pd.DataFrame(**{key: value for key, value in example["dataframe_split"].items() if key != "index"})
        asked = example["params"][LABELS]
        answer = mlflow.pyfunc.load_model(str(folder)).predict(table, params={LABELS: asked})
    # Whatever a model raises while it is loaded or asked is what this check is for.
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if list(answer.columns) != list(COLUMNS) or len(answer) != len(table):
        columns = ", ".join(map(str, answer.columns))
        return f"the answer to {len(table)} picture(s) has {len(answer)} row(s) of {columns}"
    for row, content in enumerate(table[IMAGE]):
        picture, label_map = (
            Image.open(io.BytesIO(base64.b64decode(text))) for text in (content, answer[LABEL_MAP][row])
        )
        if picture.size != label_map.size:
            return f"a label map of {label_map.size} for a picture of {picture.size}"
        if (found := [one["label"] for one in json.loads(answer[LEGEND][row])]) != list(asked):
            return f"a legend of {', '.join(found)} for the labels {', '.join(asked)}"
    return None


if __name__ == "__main__":
    print(json.dumps(check(Path(sys.argv[1]))))
