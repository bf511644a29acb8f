"""A registered model as MLflow serves it. MLflow copies this one file into the model and runs it there.

In:  a table with the column `image_b64` (a picture file as base64), and the parameter `labels`.
Out: a row per picture: `label_map` (PNG as base64, pixel value = position in the legend), `legend` and
     `segments` (JSON: area 0..1, mean score 0..1, words the text encoder has never seen).
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import tempfile
import threading
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from PIL import Image

IMAGE, LABELS = "image_b64", "labels"
LABEL_MAP, LEGEND, SEGMENTS = COLUMNS = ("label_map", "legend", "segments")
FOLDER = "model"
# Servers predict in several threads, and the limit of pixels is PIL's own, of the whole process.
_ONE_AT_A_TIME = threading.Lock()


class SegmentationModel(mlflow.pyfunc.PythonModel):
    """Loads the model folder among the artifacts and segments pictures by words."""

    def load_context(self, context: Any) -> None:
        from lexiseg import environment, inference  # noqa: F401  (a served model tells nobody)

        self._model = inference.load(Path(context.artifacts[FOLDER]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Segment every row; a request that cannot be served is INVALID_PARAMETER_VALUE with the reason."""
        from lexiseg.errors import LexisegError

        labels = [str(label) for label in (params or {}).get(LABELS, [])]
        if not labels and self._model.own_labels:
            labels = list(self._model.own_labels)
        try:
            rows = [self._row(content, row, labels) for row, content in enumerate(model_input[IMAGE])]
        except LexisegError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def _row(self, content: Any, row: int, labels: list[str]) -> dict[str, str]:
        from lexiseg.phases import phase
        from lexiseg.segmentation import check_labels

        names = check_labels(labels)
        with phase("decode"):
            picture = _picture(content, row)
        result = self._model.segment(picture, names)
        unknown = self._model.unknown_words(names)
        with phase("write"):
            return _answer(result, unknown)


def _answer(result: Any, unknown: dict[str, list[str]]) -> dict[str, str]:
    """A row of the answer: `result` is a `lexiseg.segmentation.Segmentation`, `unknown` its words never seen."""
    from lexiseg.pictures import palette

    names, colours = result.labels, palette(result.labels)
    legend = [
        {"value": value, "label": name, "colour": "#{:02x}{:02x}{:02x}".format(*colours[value])}
        for value, name in enumerate(names)
    ]
    segments = [
        {
            "label": name,
            "area": round(result.area(name), 6),
            "score": None if (score := result.mean_score(name)) is None else round(score, 6),
            "unknown_words": unknown.get(name, []),
        }
        for name in names
    ]
    return {
        LABEL_MAP: base64.b64encode(_png(result.label_map, colours)).decode(),
        LEGEND: json.dumps(legend, ensure_ascii=False),
        SEGMENTS: json.dumps(segments, ensure_ascii=False),
    }


def _picture(content: Any, row: int) -> np.ndarray:
    """The uint8 RGB picture (H, W, 3) of a request, with the limits and conversions of all of lexiseg."""
    from lexiseg.data.adapters.files import pixel_limit, read_picture
    from lexiseg.errors import DataError
    from lexiseg.inference import MAX_PIXELS

    name = f"{IMAGE} of row {row}"
    try:
        decoded = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise DataError(
            found=f"{name} is not base64 ({error})",
            allowed="the bytes of a PNG or JPEG file as base64 text",
            fix="send base64.b64encode(Path('photo.jpg').read_bytes()).decode()",
        ) from error
    with tempfile.TemporaryDirectory() as folder, _ONE_AT_A_TIME, pixel_limit(MAX_PIXELS):
        file = Path(folder) / "picture"
        file.write_bytes(decoded)
        image = read_picture(file, file=name).image
    assert image is not None  # read_picture always decodes
    return image


def _png(label_map: np.ndarray, colours: np.ndarray) -> bytes:
    """Palette picture up to 256 labels (any viewer shows colours), 16-bit greyscale beyond."""
    if len(colours) <= 256:
        picture = Image.fromarray(label_map.astype(np.uint8), mode="P")
        picture.putpalette(colours.tobytes())
    else:
        picture = Image.fromarray(label_map.astype(np.uint16))
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


mlflow.models.set_model(SegmentationModel())
