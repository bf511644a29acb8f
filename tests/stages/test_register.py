import itertools

import numpy as np
import pytest
import torch
from helpers.tiny import encoded, prepared, settings, text_table, timm_backbone, validated, vocabulary_of

import lexiseg
from lexiseg.inference import load
from lexiseg.methods.lseg.stages import train
from lexiseg.settings import View
from lexiseg.stages.register import run
from lexiseg.storage import hash_tree, read_json, write_json

METRICS = {
    "method": "lseg",
    "protocol": {"name": "generic", "hash": "a" * 64, "card": {"dataset": "tiny"}},
    "splits": {"test": {"miou": 0.5}},
}


def inputs_of(root, changes):
    """What the graph has before the stage: data, encoders, a trained model and its metrics."""
    prepare = prepared(root, counts={"train": 2, "test": 2})
    encode = encoded(root / "encode", changes=changes, vocabulary=vocabulary_of(prepare))
    inputs = {"prepare": prepare, "encode": encode, **validated(root)}
    recipe = {"lseg.model.clip_residual": "encode.backbone.source" not in changes}
    train(View(settings(recipe), ["seed", "lseg.model", "lseg.train"]), inputs, root / "train")
    write_json(root / "metrics.json", METRICS)
    return {**inputs, "lseg/train": root / "train", "lseg/evaluate/metrics.json": root / "metrics.json"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return inputs_of(tmp_path_factory.mktemp("clip"), {})


@pytest.fixture(scope="module")
def table_inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("table")
    table = text_table(root, ["grass", "sky", "hoop"])
    changes = {**table, "encode.text.stand_ins": {"ring": "hoop"}, **timm_backbone(root), "encode.clip.source": "none"}
    return inputs_of(root, changes)


def registered(inputs, out, changes=None):
    run(View(settings(changes), ["lseg.predict"]), inputs, out, method="lseg")
    return hash_tree(out)


def picture():
    return np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def test_a_folder_with_all_a_user_needs(inputs, tmp_path):
    files = registered(inputs, tmp_path)
    assert sorted(files) == [
        "card.json",
        "clip/clip.json",
        "clip/model.safetensors",
        "clip/tokenizer.json",
        "model.json",
        "model.safetensors",
        "text/text.json",
        "vocabulary.json",
    ]
    assert files["model.safetensors"] == hash_tree(inputs["lseg/train"])["model.safetensors"]
    assert read_json(tmp_path / "vocabulary.json") == vocabulary_of(inputs["prepare"]).to_json()
    assert files == registered(inputs, tmp_path / "again")


def test_it_works_without_the_graph(inputs, tmp_path, monkeypatch):
    registered(inputs, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    result = load(tmp_path / "elsewhere").segment(picture(), ["sky", "a purple ring", "grass"])
    assert result.label_map.shape == (16, 24)
    assert result.scores.shape == (3, 8, 12)


def test_the_card(inputs, tmp_path):
    registered(inputs, tmp_path)
    card = read_json(tmp_path / "card.json")
    assert card["method"] == "lseg"
    assert card["package"] == f"lexiseg {lexiseg.__version__}"
    assert card["data"]["name"] == "tiny"
    assert card["data"]["content_digest"] == read_json(inputs["prepare"] / "info.json")["content_digest"]
    assert card["protocol"] == METRICS["protocol"]
    assert card["metrics"] == METRICS["splits"]
    clip = read_json(inputs["encode"] / "clip/clip.json")["licence"]
    assert card["licences"] == {
        "data": "not stated (no licence.txt)",
        "text": clip,
        "backbone": clip,
        "code": "Apache-2.0",
    }


def test_the_licences_of_a_table_and_a_backbone(table_inputs, tmp_path):
    files = registered(table_inputs, tmp_path)
    assert not any(name.startswith("clip/") for name in files)
    licences = read_json(tmp_path / "card.json")["licences"]
    assert (licences["text"], licences["backbone"]) == ("MIT", "Apache-2.0")
    model = load(tmp_path)
    assert model.segment(picture(), ["hoop", "sky"]).labels == ("hoop", "sky")
    assert read_json(tmp_path / "model.json")["stand_ins"] == {"ring": "hoop"}


@pytest.mark.parametrize(("resize", "size"), [(None, (8, 12)), ([32, 48], (16, 24))])
def test_it_predicts_as_it_was_evaluated(inputs, tmp_path, resize, size):
    registered(inputs, tmp_path, {"lseg.predict.resize": resize})
    assert read_json(tmp_path / "model.json")["predict"]["resize"] == resize
    assert load(tmp_path).segment(picture(), ["sky"]).scores.shape[1:] == size


def test_the_labels_of_training_are_no_limit(inputs, tmp_path):
    registered(inputs, tmp_path)
    model = load(tmp_path)
    labels = [" ".join(order) for order in itertools.permutations(["small", "red", "ring", "sky"])] + ["a", "grass"]
    result = model.segment(picture(), labels)
    assert result.scores.shape == (26, 8, 12)
    assert torch.isfinite(torch.from_numpy(result.scores)).all()
