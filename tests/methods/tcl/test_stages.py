"""TCL through its nodes: train, predict, evaluate, register; and the model folder in use."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.shards import pair, shard
from helpers.tiny import encoded, prepared, prepared_photos, settings, validated, vocabulary_of
from PIL import Image

import lexiseg
from lexiseg.errors import DataError, ModelError, SettingsError
from lexiseg.evaluation.predictions import read_predictions
from lexiseg.inference import predict_files
from lexiseg.methods.tcl.ablations import PARTS, TABLES
from lexiseg.methods.tcl.build import learned, new_model
from lexiseg.methods.tcl.stages import train
from lexiseg.settings import View
from lexiseg.stages import evaluate, predict, register
from lexiseg.storage import hash_tree, load_tensors, read_json
from lexiseg.workspace import model_identity

DECLARED = ["seed", "threads", "tcl.loss", "tcl.model", "tcl.train"]  # as in dvc.yaml
NAMED = {"evaluate.protocol": "generic"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What comes before TCL in the graph, and TCL's own folders after one run."""
    root = tmp_path_factory.mktemp("site")
    prepare = prepared(root, counts={"train": 5, "iconic": 3, "test": 3})
    inputs = {"prepare": prepare, "encode": encoded(root / "encode", vocabulary=vocabulary_of(prepare))}
    inputs |= validated(root)
    chosen = settings({**NAMED, "tcl.model.gate": 0.2})
    train(View(chosen, DECLARED), inputs, root / "train")
    inputs["tcl/train"] = root / "train"
    predict.run(chosen, inputs, root / "predict", method="tcl")
    inputs["tcl/predict"] = root / "predict"
    evaluate.run(chosen, inputs, root / "evaluate", method="tcl")
    inputs["tcl/evaluate/metrics.json"] = root / "evaluate/metrics.json"
    register.run(chosen, inputs, root / "register", method="tcl")
    return SimpleNamespace(root=root, inputs=inputs)


def trained(site, out, **changes):
    train(View(settings({f"tcl.train.{key}": value for key, value in changes.items()}), DECLARED), site.inputs, out)
    return hash_tree(out)


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def test_a_training_repeats_itself(site, tmp_path):
    first = trained(site, tmp_path / "a")
    assert first == trained(site, tmp_path / "b")
    assert first.keys() == {"curve.csv", "model.json", "model.safetensors"}
    assert first["model.safetensors"] != trained(site, tmp_path / "c", text="noun")["model.safetensors"]
    header = (tmp_path / "a/curve.csv").read_text().splitlines()[0]
    for name in ("image", "feature", "area_positive", "area_negative", "smooth_masks", "smooth_embedding"):
        assert name in header


def test_without_steps_the_grounder_is_clips_own(site, tmp_path):
    assert trained(site, tmp_path / "a", steps=0, warmup=0).keys() == {"model.json", "model.safetensors"}
    model, _, _ = new_model(site.inputs["encode"], settings().tcl.model)
    untrained, kept = learned(model), load_tensors(tmp_path / "a/model.safetensors")
    for name, value in untrained.items():
        if "decoder" not in name or "gate" in name:  # the decoder's convolutions are drawn at random behind shut gates
            assert (value == kept[name]).all(), name


def test_labels_are_never_read(site, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "lexiseg.data.dataset.PreparedSplit.__getitem__", lambda *_: pytest.fail("a label map was decoded")
    )
    trained(site, tmp_path / "a")


def test_saved_masks_are_soft_and_of_two_kinds(site):
    names, found = read_predictions(site.inputs["tcl/predict"], "test")
    scores = dict(found)
    assert names == ("grass", "sky", "ring")
    assert {value.shape for value in scores.values()} == {(2, 3, 4, 4)}
    assert all(value.min() >= 0 and value.max() <= 1 for value in scores.values())


def test_inference_knobs_are_scored_without_the_model(site, tmp_path, monkeypatch):
    monkeypatch.setattr("lexiseg.methods.load_scorer", lambda *_, **__: pytest.fail("the model was loaded"))
    cards = set()
    for changes in (
        {},
        {"tcl.refine.pamr_iterations": 10},
        {"tcl.refine.knowledge_weight": 0.5},
    ):
        out = tmp_path / f"{len(cards)}"
        evaluate.run(settings({**NAMED, **changes}), site.inputs, out, method="tcl")
        cards.add(read_json(out / "metrics.json")["protocol"]["hash"])
    assert len(cards) == 3


def test_episodes_are_refined_too(site, tmp_path):
    changes = {"evaluate.protocol": "episodes", "evaluate.episodes": [16, 16], "baselines": ["maskclip"]}
    inputs = dict(site.inputs)
    predict.run(settings(changes), inputs, tmp_path / "predict", method="tcl")
    inputs["tcl/predict"] = tmp_path / "predict"
    for number, more in enumerate(({}, {"tcl.refine.pamr_iterations": 2, "tcl.refine.knowledge_weight": 0.5})):
        evaluate.run(settings({**changes, **more}), inputs, tmp_path / f"{number}", method="tcl")
        assert read_json(tmp_path / f"{number}/metrics.json")["splits"]["test"]["fb_iou"] is not None


def test_without_refinement_the_card_is_the_one_of_the_other_methods(site):
    card = read_json(site.inputs["tcl/evaluate/metrics.json"])["protocol"]["card"]
    assert card["refinement"] == "none"
    assert not {"short_side", "window_stride", "class_list"} & card.keys()


def test_the_registered_model_gives_what_was_evaluated(site, tmp_path):
    config = read_json(site.root / "register/model.json")
    assert config["refine"] == {"pamr_iterations": 0, "knowledge_weight": 0.0, "background_threshold": None}
    model = lexiseg.load(site.root / "register")
    split_names, found = read_predictions(site.inputs["tcl/predict"], "test")
    from lexiseg.data.dataset import PreparedSplit

    split = PreparedSplit(site.inputs["prepare"], "test")
    id, scores = next(iter(found))
    result = model.segment(split.image(split.ids.index(id)), split_names)
    assert result.overlapping
    assert np.abs(result.scores - scores[0]).max() < 1e-3  # saved with 16 bits


def test_phrases_may_overlap(site, tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(picture()).save(path)
    model = lexiseg.load(site.root / "register")
    labels = ["red ring", "ring", "grass"]
    (content,) = predict_files(model, [path], labels, out=tmp_path / "out")
    written = sorted(str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.*"))
    assert written == [
        *("photo.json", "photo.png", "photo_masks.png"),
        *(f"photo_masks/{number}.png" for number in range(3)),
        "photo_overlay.png",
    ]
    result = model.segment(path, labels)
    for row in content["labels"]:
        with Image.open(tmp_path / "out" / row["mask"]) as mask:
            assert np.abs(np.asarray(mask) / 255 - result.mask(row["label"])).max() <= 0.5 / 255 + 1e-6
        assert row["mask_area"] == pytest.approx((result.mask(row["label"]) > 0.5).mean())
    # Asked alone, a phrase has the mask that it has beside others.
    assert np.allclose(model.segment(path, ["ring"]).mask("ring"), result.mask("ring"), atol=1e-6)
    assert json.loads((tmp_path / "out/photo.json").read_text()) == content


def test_shards_beside_the_data_set(site, tmp_path, capsys):
    folder = tmp_path / "data"
    (folder / "pairs").mkdir(parents=True)
    files = [file for number in range(8) for file in pair(number, caption="a red ring on grass")]
    files[4] = ("00002.png", b"damaged")
    shard(folder / "pairs/0.tar", [*files, ("lonely.png", b"")])
    inputs = {**site.inputs, "data": folder}
    chosen = settings(
        {"tcl.train.splits": [], "tcl.train.shards": "pairs/*.tar", "tcl.train.batch": 4, "tcl.train.size": [16, 16]}
    )
    train(View(chosen, DECLARED), inputs, tmp_path / "out")
    said = capsys.readouterr().out
    assert "8 pairs in 1 shards; left out: 1 pictures without a text" in said
    assert "1 damaged pairs passed over" in said  # both steps are the first epoch, which visits it once
    last = (tmp_path / "out/curve.csv").read_text().splitlines()
    assert float(dict(zip(last[0].split(","), last[-1].split(","), strict=True))["skipped"]) == 1


@pytest.mark.parametrize(
    ("pattern", "found"), [("pairs/*.tar", r"no file pairs/\*\.tar"), ("../*.tar", r"\.\./"), ("/x/*.tar", "/x/")]
)
def test_no_shards_there(site, tmp_path, pattern, found):
    chosen = settings({"tcl.train.splits": [], "tcl.train.shards": pattern})
    with pytest.raises(DataError, match=found):
        train(View(chosen, DECLARED), {**site.inputs, "data": tmp_path}, tmp_path / "out")


# ---- a model folder to start from ----------------------------------------------------------------------------------


def test_a_data_set_without_classes(site, tmp_path):
    with pytest.raises(DataError) as error:
        train(settings(), {**site.inputs, "prepare": prepared_photos(tmp_path)}, tmp_path / "out")
    assert error.value.found == "TCL on a data set without classes"
    assert "classes.txt" in error.value.fix
    assert "`tcl.run: false`" in error.value.fix
    assert not (tmp_path / "out").exists()


def from_folder(site, out, folder, **changes):
    start = {"tcl.model.init": str(folder), "tcl.model.sha256": model_identity(folder), "tcl.train.steps": 0}
    train(View(settings({**start, "tcl.train.warmup": 0, **changes}), DECLARED), site.inputs, out)


def test_a_model_folder_is_taken_as_it_is(site, tmp_path):
    from_folder(site, tmp_path / "out", site.root / "register")
    before, after = (load_tensors(folder / "model.safetensors") for folder in (site.root / "train", tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert (value == after[name]).all(), name


def test_a_model_folder_of_other_settings_or_another_clip(site, tmp_path):
    with pytest.raises(SettingsError, match=r"another network than `tcl\.model` describes") as caught:
        from_folder(site, tmp_path / "a", site.root / "register", **{"tcl.model.statistics": "imagenet"})
    assert "tcl.model.statistics: clip" in caught.value.allowed
    other = tmp_path / "encode"
    encoded(other)
    tensors = other / "clip/model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ModelError, match="another CLIP in the graph"):
        from_folder(SimpleNamespace(inputs={**site.inputs, "encode": other}), tmp_path / "b", site.root / "register")


# ---- ablations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "name"), [(table, name) for table in TABLES for name in TABLES[table]])
def test_every_variant_is_a_setting(table, name):
    assert settings(TABLES[table][name]).tcl


def test_each_row_of_the_papers_table_adds_one_part():
    rows = [settings(changes).tcl for changes in PARTS.values()]
    assert [tcl.train.steps > 0 for tcl in rows] == [False, True, True, True, True, True, True]
    learned_by = [[name for name in ("image", "feature", "area", "smooth") if getattr(tcl.loss, name)] for tcl in rows]
    every = ["image", "feature", "area", "smooth"]
    assert learned_by[1:] == [every[:1], every[:2], every[:3], every, every, every]
    assert [(tcl.refine.pamr_iterations, tcl.refine.knowledge_weight) for tcl in rows] == [
        *[(0, 0.0)] * 5,
        (10, 0.0),
        (10, 0.3),
    ]
