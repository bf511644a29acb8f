"""An imported model in the graph: evaluated as it is, registered, or trained further."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.official_lseg import clip_state, write_checkpoint
from helpers.tiny import SMALL, encoded, prepared, settings, validated, vocabulary_of

import lexiseg
from lexiseg.errors import ModelError, SettingsError
from lexiseg.importing import import_model
from lexiseg.methods.lseg.stages import train
from lexiseg.settings import View, override, read_yaml
from lexiseg.stages import baseline, encode, evaluate, predict, register
from lexiseg.stages.settings import parse_settings
from lexiseg.storage import hash_tree, load_tensors, read_json
from lexiseg.workspace import model_identity


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A prepared data set, a model imported from a checkpoint, and the settings that the import gives."""
    root = tmp_path_factory.mktemp("site")
    file = write_checkpoint(root / "demo.ckpt", clip=clip_state())
    report = import_model("lseg", file, out=root / "models/demo")
    prepare = prepared(root, height=48, width=64)
    values = override(read_yaml("profiles/embedded.yaml"), SMALL)
    chosen = override(values, {**(report.settings or {}), "evaluate.protocol": "generic"})
    encode.run(parse_settings(chosen), {"prepare": prepare}, root / "encode")
    inputs = {"prepare": prepare, "encode": root / "encode"}
    return SimpleNamespace(root=root, model=root / "models/demo", inputs=inputs, values=chosen)


def trained(site, out, **changes):
    chosen = parse_settings(override(site.values, {f"lseg.{key.replace('__', '.')}": v for key, v in changes.items()}))
    train(View(chosen, ["seed", "threads", "lseg.model", "lseg.train"]), site.inputs, out)
    return hash_tree(out)


def picture():
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def test_the_graph_evaluates_and_registers_it_as_it_is(site, tmp_path):
    chosen, outputs = parse_settings(site.values), {**site.inputs, **validated(tmp_path)}
    trained(site, tmp_path / "train")
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == ["model.json", "model.safetensors"]
    weights = {where: load_tensors(where / "model.safetensors") for where in (site.model, tmp_path / "train")}
    for name, tensor in weights[site.model].items():
        assert torch.equal(tensor, weights[tmp_path / "train"][name]), name
    outputs["lseg/train"] = tmp_path / "train"
    predict.run(chosen, outputs, tmp_path / "predict", method="lseg")
    outputs["lseg/predict"] = tmp_path / "predict"
    evaluate.run(chosen, outputs, tmp_path / "evaluate", method="lseg")
    metrics = read_json(tmp_path / "evaluate/metrics.json")
    assert metrics["protocol"]["card"]["templates"] == ["{}"]  # bare, as the official code embeds labels
    assert 0 <= metrics["splits"]["test"]["miou"] <= 1
    outputs["lseg/evaluate/metrics.json"] = tmp_path / "evaluate/metrics.json"
    register.run(chosen, outputs, tmp_path / "register", method="lseg")
    imported, registered = (lexiseg.load(folder) for folder in (site.model, tmp_path / "register"))
    expected, found = (model.segment(picture(), ["ring", "grass", "a word"]) for model in (imported, registered))
    np.testing.assert_array_equal(found.scores, expected.scores)
    card = read_json(tmp_path / "register/card.json")
    assert "isl-org/lang-seg" in card["licences"]["backbone"]
    assert "OpenAI CLIP" in card["licences"]["text"]
    assert card["imported"] == read_json(site.model / "card.json")["imported"]


def test_the_baseline_is_the_clip_in_it(site, tmp_path):
    chosen = parse_settings(site.values)
    assert chosen.baselines == ("maskclip",)
    baseline.run(chosen, site.inputs, tmp_path, name="maskclip")
    assert (tmp_path / "index.json").is_file()


def test_it_can_be_trained_further(site, tmp_path):
    files = trained(site, tmp_path / "a", train__steps=2, model__freeze_norm=True)
    assert "curve.csv" in files
    assert files == trained(site, tmp_path / "b", train__steps=2, model__freeze_norm=True)
    before, after = (load_tensors(folder / "model.safetensors") for folder in (site.model, tmp_path / "a"))
    assert before.keys() == after.keys()
    assert not torch.equal(before["head.weight"], after["head.weight"])


def test_no_step_needs_no_training_pictures(site, tmp_path):
    prepare = prepared(tmp_path, height=48, width=64, counts={"test": 1})
    other = SimpleNamespace(inputs={**site.inputs, "prepare": prepare}, values=site.values)
    assert "model.safetensors" in trained(other, tmp_path / "train")


def test_settings_that_describe_another_network(site, tmp_path):
    with pytest.raises(SettingsError) as caught:
        trained(site, tmp_path, model__features=64, model__block="none")
    assert caught.value.allowed == "lseg.model.features: 32, lseg.model.block: bottleneck"


def test_its_card_is_not_part_of_what_it_is(site, tmp_path):
    shutil.copytree(site.model, tmp_path / "demo")
    (tmp_path / "demo/card.json").write_text("{}")
    (tmp_path / "demo/notes.txt").write_text("mine")
    assert model_identity(tmp_path / "demo") == model_identity(site.model)
    (tmp_path / "demo/text/text.json").write_text("{}")
    assert model_identity(tmp_path / "demo") != model_identity(site.model)


def test_another_folder_than_the_hash_says(site, tmp_path):
    assert site.values["lseg"]["model"]["sha256"] == model_identity(site.model)
    for changes, match in (({"model__sha256": "0" * 64}, "lseg.model.sha256"), ({"model__init": "a/b"}, "model.json")):
        with pytest.raises(ModelError, match=match):
            trained(site, tmp_path, **changes)


def test_a_text_encoder_of_another_size(site, tmp_path):
    folder = encoded(tmp_path / "encode", vocabulary=vocabulary_of(site.inputs["prepare"]))
    other = SimpleNamespace(inputs={**site.inputs, "encode": folder}, values=site.values)
    with pytest.raises(ModelError, match="label vectors of 24 numbers"):
        trained(other, tmp_path / "train")


def test_a_model_folder_without_a_clip(site, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.json").write_text("{}")
    clip = {"weights": str(tmp_path / "model"), "sha256": model_identity(tmp_path / "model")}
    chosen = parse_settings(override(site.values, {f"encode.clip.{key}": value for key, value in clip.items()}))
    with pytest.raises(ModelError, match="holds no CLIP"):
        encode.run(chosen, site.inputs, tmp_path / "encode")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"lseg.train.steps": 0}, "trains nothing"),
        ({"lseg.model.init": "demo"}, "backbone, random, or a model folder"),
        ({"lseg.model.init": "models/demo"}, "needs `model.sha256`"),
        ({"encode.clip.source": "model"}, "needs `weights`"),
    ],
)
def test_settings_that_lack_something(changes, fault):
    with pytest.raises(SettingsError, match=fault):
        settings(changes)
