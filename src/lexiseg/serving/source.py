"""A registered version from MLflow, as something that answers requests."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lexiseg.errors import LexisegError, ModelError, TrackingError
from lexiseg.phases import turn_to
from lexiseg.serving.current import Served

NAME = re.compile(r"(?P<method>[a-z][a-z0-9_-]*)(?P<which>@[^/@]+|/\d+)")


def address_of(text: str) -> str:
    """ "lseg@production" -> "models:/lexiseg-lseg@production"; an address stays as it is.

    Raises:
        TrackingError: neither.
    """
    if text.startswith("models:/"):
        return text
    match = NAME.fullmatch(text)
    if not match:
        raise TrackingError(
            found=f"{text!r} for a model to serve",
            allowed="METHOD@ALIAS, METHOD/VERSION, models:/NAME@ALIAS or models:/NAME/VERSION",
            fix="name it like lseg@production, lseg@challenger or lseg/3",
        )
    from lexiseg.tracking.registry import model_name

    return f"models:/{model_name(match['method'])}{match['which']}"


def finder(address: str, root: Path) -> Callable[[], tuple[str, Callable[[], Served]]]:
    """What `Current` asks: the number of the version that the address means now, and what loads it.

    Its errors are TrackingError (MLflow is out of reach, or knows no such version) and ModelError (the version is no
    model of lexiseg, or cannot be used).
    """
    from lexiseg.tracking.registry import download_pyfunc, find_version

    def find() -> tuple[str, Callable[[], Served]]:
        store, version = find_version(address, root)
        number = str(version.version)

        def load() -> Served:
            folder = download_pyfunc(store, version, root)
            return Served(name=version.name, number=number, app=_tried(folder, f"{version.name}/{number}"))

        return number, load

    return find


def _tried(folder: Path, label: str) -> Any:
    """MLflow's scoring server of a model that has answered the example it was registered with."""
    import mlflow.pyfunc
    from mlflow.environment_variables import MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT
    from mlflow.pyfunc import scoring_server

    # It lists every package whose version is another one; what is installed here is what serves.
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    try:
        model = _Timed(mlflow.pyfunc.load_model(str(folder)))
        params = model.metadata.load_input_example_params(str(folder))
        model.predict(model.metadata.load_input_example(str(folder)), params=params)
    except LexisegError:
        raise
    except Exception as error:  # a damaged model may fail in any way
        raise ModelError(
            found=f"{label} fails on its own example ({type(error).__name__}: {' '.join(str(error).split())[:300]})",
            allowed="a version that can be loaded and used by this lexiseg",
            fix="serve another version, or register the model again by `lexiseg sync`",
        ) from error
    # Its own limit of 60 s gives up the answer and not the work, which no thread can be made to leave.
    os.environ[MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.name] = str(10**6)
    return scoring_server.init(model)  # type: ignore[arg-type]  # it asks for no more than `_Timed` has


class _Timed:
    """A model as the scoring server uses it; what follows a prediction counts as writing the answer."""

    def __init__(self, model: Any) -> None:
        self._model, self.metadata = model, model.metadata

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> Any:
        found = self._model.predict(data, params=params)
        turn_to("write")
        return found
