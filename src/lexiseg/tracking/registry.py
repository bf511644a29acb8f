"""Registered models: a model folder becomes an MLflow version once, and an address becomes a folder again."""

from __future__ import annotations

import base64
import io
import re
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from PIL import Image

from lexiseg.errors import MissingVersionError, ModelError, TrackingError
from lexiseg.storage import atomic_path, read_json, sha256_of_json
from lexiseg.tracking import pyfunc_model
from lexiseg.tracking.card import PER_CLASS, model_card
from lexiseg.tracking.publish import Published
from lexiseg.tracking.records import ModelFolder, Record
from lexiseg.tracking.store import Store, connect, tracking_errors
from lexiseg.workspace import private_folder

CONTENT, CHALLENGER = "lexiseg.content", "challenger"
ADDRESS = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))/?")
# What loading and using a model folder imports.
REQUIREMENTS = (
    "lexiseg", "mlflow", "numpy", "open_clip_torch", "pandas", "pillow", "safetensors", "timm", "tokenizers", "torch",
)  # fmt: skip
EXAMPLE_LABELS = 4
MAX_DESCRIPTION = 5000  # characters that MLflow keeps of a version's description


def model_name(method: str) -> str:
    """The registered model of a method: "lexiseg-lseg"."""
    return f"lexiseg-{method}"


def publish_model(store: Store, record: Record, run_id: str) -> list[Published]:
    """Make the record's model folder a version of its registered model, once per content, alias `challenger`.

    The version is created last and whole, so an interrupted publication leaves files of a run, never half a
    version; the next one writes them again.
    """
    folder = record.model
    if folder is None:
        return []
    client, name = store.client, model_name(record.method)
    found = client.search_model_versions(f"name = '{name}' AND tags.`{CONTENT}` = '{folder.content}'")
    done: list[Published] = []
    if found:
        number = str(min(int(item.version) for item in found))
    else:
        number = _new_version(store, record, folder, run_id)
        done.append(Published(kind="model", name=name, id=number, action="created"))
    done += _publish_card(store, record, folder, number)
    aliases = client.get_registered_model(name).aliases
    if str(aliases.get(CHALLENGER)) != number:
        client.set_registered_model_alias(name, CHALLENGER, number)
        if found:
            done.append(Published(kind="alias", name=f"{name}@{CHALLENGER}", id=number, action="completed"))
    return done


def download_model(uri: str, root: Path) -> Path:
    """The model folder behind an address, on this machine.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        root: the working tree, which says where MLflow is.

    Returns:
        A folder for `lexiseg.load`: inside the artifacts where the store is local, else a download that is
        kept in the private folder.

    Raises:
        TrackingError: another form of address, an unknown name, alias or version, or MLflow is out of reach.
        ModelError: the version is no model of lexiseg.
    """
    store, found = find_version(uri, root)
    with tracking_errors(store.uri):
        location, inside = _checked(store, found, uri)
        content = found.tags.get(CONTENT) or sha256_of_json([store.uri, uri, found.creation_timestamp])
        return _fetch(store, location, inside, uri, kept=private_folder(root) / "cache" / "models" / content[:20])


def find_version(uri: str, root: Path) -> tuple[Store, Any]:
    """The model version that an address means now, and the MLflow that it is in.

    Raises:
        TrackingError: see `download_model`.
    """
    match = ADDRESS.fullmatch(uri)
    if not match:
        raise TrackingError(
            found=f"the address {uri!r}",
            allowed="models:/NAME@ALIAS or models:/NAME/VERSION",
            fix=f"try models:/{model_name('lseg')}@{CHALLENGER}",
        )
    store = connect(root)
    with tracking_errors(store.uri):
        return store, _resolve(store, match["name"], alias=match["alias"], number=match["version"])


def download_pyfunc(store: Store, found: Any, root: Path) -> Path:
    """The whole of what MLflow loads of a version of `find_version`, on this machine, as `download_model` keeps it.

    Raises:
        TrackingError: MLflow is out of reach.
        ModelError: the version is no model of lexiseg.
    """
    uri = f"models:/{found.name}/{found.version}"
    with tracking_errors(store.uri):
        location, _ = _checked(store, found, uri)
        # Versions with one content may have been published with different code.
        key = sha256_of_json([store.uri, uri, found.creation_timestamp])
        return _fetch(store, location, "", uri, kept=private_folder(root) / "cache" / "served" / key[:20])


def model_folder_in(pyfunc: Path) -> Path:
    """The model folder inside what `download_pyfunc` gives.

    Raises:
        ModelError: there is none, or it is not whole.
    """
    folder = pyfunc / _folder_inside(pyfunc / MLMODEL_FILE_NAME, str(pyfunc))
    if not (folder / "card.json").is_file():
        raise ModelError(
            found=f"{folder} has no card.json",
            allowed="a model folder as lexiseg registered it",
            fix="restore its files in MLflow, or register the model anew (`dvc repro`, `lexiseg sync`)",
        )
    return folder


def _checked(store: Store, found: Any, uri: str) -> tuple[str, str]:
    """Where a version's artifacts are, and the model folder inside them; raises ModelError where there is none."""
    location = store.client.get_model_version_download_uri(found.name, found.version)
    files = get_artifact_repository(location, tracking_uri=store.uri)
    with tempfile.TemporaryDirectory() as scratch:
        return location, _folder_inside(Path(files.download_artifacts(MLMODEL_FILE_NAME, dst_path=scratch)), uri)


def _fetch(store: Store, location: str, inside: str, uri: str, *, kept: Path) -> Path:
    """A folder inside a version's artifacts: itself where the store is local, else a download to `kept`."""
    files = get_artifact_repository(location, tracking_uri=store.uri)
    if location.startswith(("file:", "/")):
        return Path(files.download_artifacts(inside))
    if not kept.is_dir():
        print(f"downloading {uri}", file=sys.stderr, flush=True)
        with atomic_path(kept) as temporary, tempfile.TemporaryDirectory(dir=temporary.parent) as scratch:
            Path(files.download_artifacts(inside, dst_path=scratch)).rename(temporary)
    return kept


def _publish_card(store: Store, record: Record, folder: ModelFolder, number: str) -> list[Published]:
    """Bring the version's description up to date: other seeds may have come."""
    name = model_name(record.method)
    version = store.client.get_model_version(name, number)
    tables = {Path(path).name: file for path, file in record.files.items() if path.endswith(PER_CLASS)}
    text = model_card(
        store,
        method=record.method,
        name=name,
        version=number,
        run_id=str(version.run_id),  # of equal models that several runs gave, the first
        folder=folder.path,
        per_class={table.removesuffix(PER_CLASS): file for table, file in tables.items()},
    )
    if len(text) > MAX_DESCRIPTION:
        rest = f"\n… all of it: `lexiseg card {record.method} --version {number}`"
        text = text[: MAX_DESCRIPTION - len(rest)] + rest
    if version.description == text:
        return []
    store.client.update_model_version(name, number, description=text)
    # What comes with a new version is a part of it.
    card = Published(kind="card", name=f"{name}/{number}", id=number, action="completed")
    return [card] if version.description else []


def _new_version(store: Store, record: Record, folder: ModelFolder, run_id: str) -> str:
    client, name = store.client, model_name(record.method)
    if registered_model(store, name) is None:
        client.create_registered_model(name, tags={"lexiseg.method": record.method})
    # Under its content: another version that the same run gives later must not overwrite this one.
    place = f"models/{folder.content[:12]}"
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / "pyfunc"
        _save(local, folder.path, Model(artifact_path=place, run_id=run_id))
        client.log_artifacts(run_id, str(local), place)
    licences = {f"lexiseg.licence.{part}": str(text) for part, text in folder.card["licences"].items() if text}
    created = client.create_model_version(
        name,
        source=f"{client.get_run(run_id).info.artifact_uri}/{place}",
        run_id=run_id,
        tags={**record.tags, **licences, CONTENT: folder.content},
    )
    return str(created.version)


def model_signature() -> ModelSignature:
    """What a version takes and gives: pictures as text and labels; a row of text per picture."""
    return ModelSignature(
        inputs=Schema([ColSpec("string", pyfunc_model.IMAGE)]),
        outputs=Schema([ColSpec("string", column) for column in pyfunc_model.COLUMNS]),
        # There are no labels by default: a request without them gets the error that says so.
        params=ParamSchema([ParamSpec(pyfunc_model.LABELS, "string", [], shape=(-1,))]),
    )


def _save(target: Path, folder: Path, mlflow_model: Model) -> None:
    """Write the pyfunc model: the folder as an artifact, and pyfunc_model.py as the code; nothing is pickled."""
    names = list(read_json(folder / "vocabulary.json")["names"])
    example = pd.DataFrame({pyfunc_model.IMAGE: [_example_picture()]})
    mlflow.pyfunc.save_model(
        str(target),
        python_model=pyfunc_model.__file__,
        artifacts={pyfunc_model.FOLDER: str(folder.resolve())},
        signature=model_signature(),
        input_example=(example, {pyfunc_model.LABELS: names[:EXAMPLE_LABELS]}),
        # What follows a plus sign (2.15.0+cpu) is on no package index.
        pip_requirements=[f"{package}=={version(package).partition('+')[0]}" for package in REQUIREMENTS],
        mlflow_model=mlflow_model,
    )


def _example_picture() -> str:
    rows, columns = np.mgrid[0:64, 0:64].astype(np.uint8) * 4
    stream = io.BytesIO()
    Image.fromarray(np.dstack([rows, columns, 255 - rows])).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


def _folder_inside(mlmodel: Path, uri: str) -> str:
    flavours: Mapping[str, Any] = Model.load(str(mlmodel)).flavors
    artifacts = (flavours.get("python_function") or {}).get("artifacts") or {}
    if pyfunc_model.FOLDER not in artifacts:
        raise ModelError(
            found=f"{uri} holds no lexiseg model folder",
            allowed="a version that `lexiseg sync` registered",
            fix=f"name another one, such as models:/{model_name('lseg')}@{CHALLENGER}",
        )
    return str(artifacts[pyfunc_model.FOLDER]["path"])


def _resolve(store: Store, name: str, *, alias: str | None, number: str | None) -> Any:
    """The model version that a name with an alias or a number means."""
    client = store.client
    registered = registered_model(store, name)
    if registered is None:
        known = sorted(model.name for model in client.search_registered_models())
        raise MissingVersionError(
            found=f"no registered model {name!r} in MLflow",
            allowed=f"one of {', '.join(known)}" if known else "a model that was registered; there is none yet",
            fix="`dvc repro` makes the model, `lexiseg sync` registers it",
        )
    if alias is not None:
        if alias not in registered.aliases:
            raise MissingVersionError(
                found=f"the model {name} has no alias {alias!r}",
                allowed=f"one of {', '.join(sorted(registered.aliases)) or 'none yet'}, or a version number",
                fix=f"`lexiseg sync` sets {CHALLENGER}, `lexiseg promote METHOD --to production` sets production",
            )
        number = str(registered.aliases[alias])
    versions = {str(item.version): item for item in client.search_model_versions(f"name = '{name}'")}
    if str(int(number or 0)) not in versions:
        raise MissingVersionError(
            found=f"the model {name} has no version {number}",
            allowed=f"one of {', '.join(sorted(versions, key=int)) or 'none yet'}",
            fix=f"take one of them, or an alias such as models:/{name}@{CHALLENGER}",
        )
    return versions[str(int(number or 0))]


def registered_model(store: Store, name: str) -> Any:
    """The registered model of a name, read anew; None: there is none."""
    try:
        return store.client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
