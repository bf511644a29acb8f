import numpy as np
import pytest
import torch

from lexiseg.errors import DataError, LexisegError, ModelError
from lexiseg.evaluation import predictions
from lexiseg.evaluation.predictions import PredictionWriter, prediction_index, read_predictions
from lexiseg.storage import hash_tree

LABELS = ["sky", "ring"]


def write(folder, *, count=5):
    rng = np.random.default_rng(0)
    with PredictionWriter(folder) as writer:
        for number in range(count):
            for split in ("val", "test"):
                writer.add(split, LABELS, f"{split}-{number}", rng.standard_normal((2, 3, 4)))


def test_round_trip_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "_SHARD_IMAGES", 2)
    write(tmp_path)
    assert prediction_index(tmp_path)["test"]["shards"] == [f"test-0000{k}.safetensors" for k in range(3)]
    labels, images = read_predictions(tmp_path, "test")
    assert labels == ("sky", "ring")
    images = dict(images)
    assert list(images) == [f"test-{number}" for number in range(5)]
    rng = np.random.default_rng(0)
    for number in range(5):
        rng.standard_normal((2, 3, 4))
        expected = rng.standard_normal((2, 3, 4)).astype(np.float16).astype(np.float32)
        assert images[f"test-{number}"].dtype == np.float32
        assert np.array_equal(images[f"test-{number}"], expected)


def test_large_scores_make_more_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "_SHARD_BYTES", 2 * 3 * 4 * 2)
    write(tmp_path, count=2)
    assert len(prediction_index(tmp_path)["val"]["shards"]) == 2


def test_equal_predictions_give_equal_bytes(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b")


def test_images_may_differ_in_size(tmp_path):
    with PredictionWriter(tmp_path) as writer:
        writer.add("test", LABELS, "wide", torch.zeros(2, 3, 9))
        writer.add("test", LABELS, "high", torch.zeros(2, 9, 3))
    assert [scores.shape for _, scores in read_predictions(tmp_path, "test")[1]] == [(2, 3, 9), (2, 9, 3)]


def interrupted(folder):
    with PredictionWriter(folder) as writer:
        writer.add("test", LABELS, "one", torch.zeros(2, 3, 4))
        raise KeyboardInterrupt


def test_an_interrupted_prediction_is_not_readable(tmp_path):
    write(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path)
    with pytest.raises(DataError, match=r"no index\.json") as caught:
        read_predictions(tmp_path, "test")
    assert "finished predictions" in caught.value.allowed
    assert "dvc repro" in caught.value.fix


@pytest.mark.parametrize(
    ("arguments", "kind", "found", "allowed"),
    [
        (("test", LABELS, "one", torch.zeros(2, 3, 4)), DataError, "second prediction for test/one", "one prediction"),
        (("test", ["sky", "hoop"], "two", torch.zeros(2, 3, 4)), DataError, "labels of test/two", "sky, ring"),
        (("test", LABELS, "two", torch.zeros(3, 3, 4)), ModelError, "shape (3, 3, 4)", "(2, h, w)"),
        (("test", LABELS, "two", torch.full((2, 3, 4), torch.nan)), ModelError, "NaN", "finite"),
        (("test", LABELS, "two", torch.full((2, 3, 4), 1e6)), ModelError, "65504", "finite"),
    ],
)
def test_wrong_predictions_are_refused(tmp_path, arguments, kind, found, allowed):
    writer = PredictionWriter(tmp_path)
    writer.add("test", LABELS, "one", torch.zeros(2, 3, 4))
    with pytest.raises(LexisegError) as caught:
        writer.add(*arguments)
    assert type(caught.value) is kind
    assert found in caught.value.found
    assert allowed in caught.value.allowed
    assert caught.value.fix


def test_unknown_split_names_those_there_are(tmp_path):
    write(tmp_path)
    with pytest.raises(DataError, match="'train'") as caught:
        read_predictions(tmp_path, "train")
    assert "test, val" in caught.value.allowed
    assert "params.yaml" in caught.value.fix


@pytest.mark.parametrize("damage", ["cut", "gone", "short"])
def test_damaged_shards_are_noticed(tmp_path, damage, monkeypatch):
    monkeypatch.setattr(predictions, "_SHARD_IMAGES", 3)
    write(tmp_path)
    first, last = (tmp_path / f"test-0000{number}.safetensors" for number in (0, 1))
    if damage == "cut":
        last.write_bytes(last.read_bytes()[:40])
    elif damage == "gone":
        last.unlink()
    else:
        first.write_bytes(last.read_bytes())
    with pytest.raises(DataError, match="cannot be read") as caught:
        list(read_predictions(tmp_path, "test")[1])
    assert "as the predict stage wrote them" in caught.value.allowed
    assert "dvc repro --force" in caught.value.fix
