import numpy as np
import pytest
import torch
from helpers.tiny import encoded, prepared, prepared_photos, settings, vocabulary_of

from lexiseg.data.dataset import PreparedSplit
from lexiseg.errors import DataError, ModelError
from lexiseg.evaluation.predictions import read_predictions
from lexiseg.methods import load_scorer
from lexiseg.methods.lseg.build import new_model, save_model
from lexiseg.settings import View
from lexiseg.stages import baseline, predict
from lexiseg.stages.predict import write_predictions
from lexiseg.storage import hash_tree, read_json

DECLARED = ["threads", "evaluate.episodes", "evaluate.splits", "lseg.predict"]  # as in dvc.yaml


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    prepare = prepared(root, counts={"train": 4, "val": 2, "test": 3})
    encode = encoded(root / "encode", vocabulary=vocabulary_of(prepare))
    torch.manual_seed(0)
    save_model(root / "train", *new_model(encode, settings().lseg.model, text_dim=24))
    return {"prepare": prepare, "encode": encode, "lseg/train": root / "train"}


def predicted(inputs, out, changes=None):
    predict.run(View(settings(changes), DECLARED), inputs, out, method="lseg")
    return hash_tree(out)


class Recorder:
    """A scorer that remembers the shapes of what it was given."""

    def __init__(self):
        self.calls = []

    def scores(self, images, labels):
        self.calls.append([image.shape[:2] for image in images])
        return [np.full((len(labels), 1, 1), image[0, 0, 0], np.float32) for image in images]


def test_the_scores_of_the_model_on_every_picture(inputs, tmp_path):
    predicted(inputs, tmp_path, {"evaluate.splits": ["test", "val"]})
    scorer = load_scorer(inputs["lseg/train"], encode=inputs["encode"])
    for name in ("test", "val"):
        split = PreparedSplit(inputs["prepare"], name)
        labels, rows = read_predictions(tmp_path, name)
        found = dict(rows)
        assert labels == split.vocabulary.names == ("grass", "sky", "ring")
        assert list(found) == split.ids
        for index, identifier in enumerate(split.ids):
            expected = scorer.scores([split.image(index)], labels)[0]
            assert found[identifier].shape == (3, 8, 8)
            assert np.allclose(found[identifier], expected, atol=0.02)  # kept as float16


def test_twice_gives_equal_bytes(inputs, tmp_path):
    assert predicted(inputs, tmp_path / "a") == predicted(inputs, tmp_path / "b")
    assert str(tmp_path) not in (tmp_path / "a/index.json").read_text()


def test_the_size_of_the_settings_is_used(inputs, tmp_path):
    predicted(inputs, tmp_path, {"lseg.predict.resize": [32, 8]})
    _, rows = read_predictions(tmp_path, "test")
    assert [scores.shape for _, scores in rows] == [(3, 16, 4)] * 3


def test_pictures_of_one_size_are_computed_together(tmp_path, monkeypatch):
    prepare = prepared(tmp_path, counts={"test": 7})
    scorer = Recorder()
    monkeypatch.setattr(predict, "BATCH_PIXELS", 3 * 16 * 16)
    write_predictions(scorer, prepare, tmp_path / "out", splits=["test"])
    assert [len(call) for call in scorer.calls] == [3, 3, 1]
    split = PreparedSplit(prepare, "test")
    _, rows = read_predictions(tmp_path / "out", "test")
    assert [int(scores[0, 0, 0]) for _, scores in rows] == [split.image(i)[0, 0, 0] for i in range(7)]


def test_a_large_picture_is_computed_alone(tmp_path, monkeypatch):
    scorer = Recorder()
    monkeypatch.setattr(predict, "BATCH_PIXELS", 10)
    write_predictions(scorer, prepared(tmp_path, counts={"test": 2}), tmp_path / "out", splits=["test"])
    assert scorer.calls == [[(16, 16)], [(16, 16)]]


def test_splits_do_not_mix(inputs, tmp_path):
    scorer = Recorder()
    write_predictions(scorer, inputs["prepare"], tmp_path, splits=["val", "test"])
    assert [len(call) for call in scorer.calls] == [2, 3]
    assert list(read_json(tmp_path / "index.json")["test"]["ids"]) == PreparedSplit(inputs["prepare"], "test").ids


@pytest.mark.parametrize("name", ["maskclip", "linear"])
def test_baselines(inputs, tmp_path, name):
    declared = ["seed", "threads", "baseline", "evaluate.episodes", "evaluate.splits"]
    for folder in "ab":
        baseline.run(View(settings(), declared), inputs, tmp_path / folder, name=name)
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b")
    labels, rows = read_predictions(tmp_path / "a", "test")
    size = {"maskclip": 2, "linear": 4}[name]
    assert labels == ("grass", "sky", "ring")
    assert [scores.shape for _, scores in rows] == [(3, size, size)] * 3


@pytest.mark.parametrize("name", ["maskclip", "linear"])
def test_baselines_need_classes(inputs, tmp_path, name):
    with pytest.raises(DataError) as error:
        baseline.run(settings(), {**inputs, "prepare": prepared_photos(tmp_path)}, tmp_path / "out", name=name)
    assert error.value.found == f"the baseline {name} on a data set without classes"
    assert "classes.txt" in error.value.fix
    assert "take it out of `baselines`" in error.value.fix
    assert not (tmp_path / "out").exists()


def test_no_model(inputs, tmp_path):
    with pytest.raises(ModelError, match=r"no model\.json"):
        predicted({**inputs, "lseg/train": tmp_path}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_split(inputs, tmp_path):
    with pytest.raises(DataError, match="stress"):
        predicted(inputs, tmp_path / "out", {"evaluate.splits": ["stress"]})
    assert not (tmp_path / "out/index.json").exists()
