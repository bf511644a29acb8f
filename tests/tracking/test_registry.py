import base64
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import convert_input_example_to_serving_input, validate_serving_input
from PIL import Image

from lexiseg import inference
from lexiseg.data.adapters import files
from lexiseg.errors import LabelError, ModelError, TrackingError
from lexiseg.segmentation import Segmentation
from lexiseg.storage import hash_tree
from lexiseg.tracking import registry
from lexiseg.tracking.registry import download_model
from lexiseg.tracking.store import connect
from lexiseg.tracking.sync import sync


class FakeModel:
    """The first label left of the middle, the last one right of it."""

    own_labels = ()

    def __init__(self, folder):
        self.folder = folder

    def segment(self, image, labels):
        if "unheard-of" in labels:
            raise LabelError(found="the word unheard-of", allowed="words of the table", fix="take another")
        scores = np.full((len(labels), 2, 2), -4.0, np.float32)
        scores[0, :, 0] = scores[-1, :, 1] = 4.0
        return Segmentation.from_scores(labels=labels, scores=scores, height=image.shape[0], width=image.shape[1])

    def unknown_words(self, labels):
        return {label: ["zyx"] for label in labels if "zyx" in label}


@pytest.fixture
def fake_load(monkeypatch):
    monkeypatch.setattr(inference, "load", FakeModel)


@pytest.fixture
def published(tree):
    return sync(tree.root)


@pytest.fixture
def served(tree, published, fake_load):
    """The version as MLflow loads it."""
    location = connect(tree.root).client.get_model_version_download_uri("lexiseg-lseg", "1")
    return mlflow.pyfunc.load_model(location)


def ask(model, *pictures, labels=("grass", "ring")):
    return model.predict(pd.DataFrame({"image_b64": list(pictures)}), params={"labels": list(labels)})


def test_served_model_gives_label_map_legend_and_segments(served, picture):
    rows = ask(served, picture(12, 20), picture(6, 4), labels=["grass", "zyx sky", "ring"])
    assert list(rows.columns) == ["label_map", "legend", "segments"]
    label_map = Image.open(io.BytesIO(base64.b64decode(rows["label_map"][0])))
    ids = np.asarray(label_map)
    assert (label_map.mode, ids.shape) == ("P", (12, 20))
    assert (ids[:, :10] == 0).all()
    assert (ids[:, 10:] == 2).all()
    legend = json.loads(rows["legend"][0])
    assert [(entry["value"], entry["label"]) for entry in legend] == [(0, "grass"), (1, "zyx sky"), (2, "ring")]
    colour = "#{:02x}{:02x}{:02x}".format(*np.asarray(label_map.convert("RGB"))[0, 0])
    assert legend[0]["colour"] == colour
    segments = json.loads(rows["segments"][0])
    assert [entry["area"] for entry in segments] == [0.5, 0.0, 0.5]
    assert segments[0]["score"] > 0.7
    assert segments[1] == {"label": "zyx sky", "area": 0.0, "score": None, "unknown_words": ["zyx"]}
    assert np.asarray(Image.open(io.BytesIO(base64.b64decode(rows["label_map"][1])))).shape == (6, 4)


def test_more_labels_than_a_palette_holds(served, picture):
    labels = [f"thing {number}" for number in range(300)]
    rows = ask(served, picture(), labels=labels)
    ids = np.asarray(Image.open(io.BytesIO(base64.b64decode(rows["label_map"][0]))))
    assert sorted(np.unique(ids)) == [0, 299]
    assert json.loads(rows["legend"][0])[299]["label"] == "thing 299"


def test_bad_requests_say_what_is_wrong(served, picture):
    good = picture()
    damaged = base64.b64encode(base64.b64decode(good)[:-30]).decode()
    for pictures, labels, words in [
        ([good], [], ["no labels", "one or more labels"]),
        ([good], ["grass", "grass"], ["more than once: grass"]),
        ([good], ["grass", "unheard-of"], ["the word unheard-of", "words of the table"]),
        (["no/base64?"], ["grass"], ["image_b64 of row 0 is not base64", "b64encode"]),
        ([good, damaged], ["grass"], ["image_b64 of row 1", "complete picture"]),
        ([base64.b64encode(b"hello").decode()], ["grass"], ["image_b64 of row 0 is not a picture"]),
        ([""], ["grass"], ["image_b64 of row 0 is empty"]),
    ]:
        with pytest.raises(MlflowException) as caught:
            ask(served, *pictures, labels=labels)
        assert caught.value.error_code == "INVALID_PARAMETER_VALUE"
        assert all(word in str(caught.value) for word in [*words, "found: ", "allowed: ", "to do: "]), caught.value
    with pytest.raises(MlflowException, match="no labels"):
        served.predict(pd.DataFrame({"image_b64": [good]}))


def test_a_huge_picture_is_refused_before_it_is_decoded(served, picture, monkeypatch):
    monkeypatch.setattr(inference, "MAX_PIXELS", 100)
    with pytest.raises(MlflowException, match=r"image_b64 of row 0 has 20 x 12 pixels\s*allowed: at most 100"):
        ask(served, picture(12, 20))


def test_pictures_are_decoded_one_at_a_time(served, picture, monkeypatch):
    """The limit of pixels belongs to the process: what one thread puts back must not be another one's."""
    meeting = threading.Barrier(2)

    def read(*arguments, **more):
        with pytest.raises(threading.BrokenBarrierError):  # both never meet here
            meeting.wait(timeout=0.2)
        return read_picture(*arguments, **more)

    read_picture = files.read_picture
    monkeypatch.setattr(files, "read_picture", read)
    with ThreadPoolExecutor(2) as threads:
        for rows in threads.map(lambda _: ask(served, picture()), range(2)):
            assert len(rows) == 1


def test_signature_example_and_requirements(tree, published, fake_load):
    location = connect(tree.root).client.get_model_version_download_uri("lexiseg-lseg", "1")
    info = mlflow.models.get_model_info(location)
    assert [(column.name, str(column.type)) for column in info.signature.inputs] == [("image_b64", "DataType.string")]
    assert [column.name for column in info.signature.outputs] == ["label_map", "legend", "segments"]
    assert info.signature.params.to_dict()[0]["name"] == "labels"
    assert "python_model" not in info.flavors["python_function"]  # code and safetensors, no pickle
    folder = tree.root / ".lexiseg/artifacts"
    assert not list(folder.rglob("*.pkl"))
    requirements = next(folder.rglob("requirements.txt")).read_text()
    assert "lexiseg==" in requirements
    assert "torch==" in requirements
    assert "+" not in requirements
    example = next(folder.rglob("serving_input_example.json")).read_text()
    assert json.loads(example)["params"]["labels"] == ["grass", "sky", "ring"]
    assert len(validate_serving_input(location, example)) == 1
    assert convert_input_example_to_serving_input((pd.DataFrame({"image_b64": ["x"]}), {"labels": ["a"]}))


def test_an_address_becomes_the_model_folder(tree, published):
    register = hash_tree(tree.root / "outputs/lseg/register")
    for address in ("models:/lexiseg-lseg@challenger", "models:/lexiseg-lseg/1", "models:/lexiseg-lseg/01/"):
        assert hash_tree(download_model(address, tree.root)) == register


def test_a_model_on_a_server_is_downloaded_once(tree, published, monkeypatch):
    class Far:
        """The artifacts of a server: the files are there only after a download."""

        def __init__(self, location):
            self.inner = real(location.removeprefix("far:"))

        def download_artifacts(self, path, dst_path=None):
            assert dst_path, "a server has no local path"
            downloads.append(path)
            return self.inner.download_artifacts(path, dst_path=dst_path)

    downloads = []
    real = registry.get_artifact_repository
    uri = MlflowClient.get_model_version_download_uri
    monkeypatch.setattr(
        MlflowClient, "get_model_version_download_uri", lambda self, *arguments: f"far:{uri(self, *arguments)}"
    )
    monkeypatch.setattr(registry, "get_artifact_repository", lambda location, tracking_uri: Far(location))
    first = download_model("models:/lexiseg-lseg@challenger", tree.root)
    assert hash_tree(first) == hash_tree(tree.root / "outputs/lseg/register")
    assert first.parent == tree.root / ".lexiseg/cache/models"
    again = download_model("models:/lexiseg-lseg/1", tree.root)
    assert again == first
    assert [path for path in downloads if path != "MLmodel"] == ["artifacts/register"]
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    downloads.clear()
    address = "models:/lexiseg-lseg@challenger"
    whole = registry.download_pyfunc(*registry.find_version(address, tree.root), tree.root)
    assert whole == registry.download_pyfunc(*registry.find_version(address, tree.root), tree.root)
    assert {"MLmodel", "pyfunc_model.py", "input_example.json"} < {path.name for path in whole.iterdir()}
    assert hash_tree(whole / "artifacts/register") == hash_tree(first)
    assert [path for path in downloads if path != "MLmodel"] == [""]
    assert [path.name for path in whole.parent.iterdir()] == [whole.name]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("models:/lexiseg-lseg", ["the address 'models:/lexiseg-lseg'", "models:/NAME@ALIAS", "@challenger"]),
        ("models:/lexiseg-lseg/latest", ["the address", "models:/NAME/VERSION"]),
        ("models:/lexiseg-tcl@challenger", ["'lexiseg-tcl'", "one of lexiseg-lseg", "lexiseg sync"]),
        ("models:/lexiseg-lseg@production", ["no alias 'production'", "one of challenger"]),
        ("models:/lexiseg-lseg/7", ["no version 7", "one of 1"]),
    ],
)
def test_unknown_addresses(tree, published, address, words):
    with pytest.raises(TrackingError) as caught:
        download_model(address, tree.root)
    assert all(word in str(caught.value) for word in words)


def test_nothing_registered_yet(tree):
    with pytest.raises(TrackingError) as caught:
        download_model("models:/lexiseg-lseg@challenger", tree.root)
    assert "none yet" in caught.value.allowed


def test_a_version_that_somebody_else_registered(tree, published):
    client = connect(tree.root).client
    mlmodel = tree.root / "MLmodel"
    mlmodel.write_text("flavors:\n  sklearn: {}\n")
    client.log_artifact(published[0].id, str(mlmodel), "other")
    source = f"{client.get_run(published[0].id).info.artifact_uri}/other"
    client.create_model_version("lexiseg-lseg", source=source, run_id=published[0].id)
    with pytest.raises(ModelError) as caught:
        download_model("models:/lexiseg-lseg/2", tree.root)
    assert "models:/lexiseg-lseg/2 holds no lexiseg model folder" in caught.value.found
