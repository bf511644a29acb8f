import pytest
import torch
from helpers.tiny import (
    CAPTIONS,
    encoded,
    prepare_again,
    prepared,
    prepared_photos,
    settings,
    text_table,
    vocabulary_of,
)

from lexiseg.data.dataset import PreparedSplit
from lexiseg.encoders.clip import load_clip
from lexiseg.encoders.pretrain import retrieval_recall
from lexiseg.errors import DataError
from lexiseg.settings import View
from lexiseg.stages import encode_evaluate
from lexiseg.stages.encode_evaluate import retrieval, run
from lexiseg.storage import hash_tree, read_json

DECLARED = ["threads", "evaluate.splits"]  # as in dvc.yaml


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    prepare = prepared(root, counts={"train": 4, "test": 4, "val": 6})
    return {"prepare": prepare, "encode": encoded(root / "encode", vocabulary=vocabulary_of(prepare))}


def measured(inputs, out, **changes):
    run(View(settings({f"evaluate.{key}": value for key, value in changes.items()}), DECLARED), inputs, out)
    return read_json(out / "metrics.json")


def test_retrieval_on_every_evaluated_split(inputs, tmp_path):
    result = measured(inputs, tmp_path, splits=["test", "val"])
    assert sorted(result) == ["retrieval", "stand_ins"]
    assert result["stand_ins"] == {}
    assert sorted(result["retrieval"]) == ["test", "val"]
    assert result["retrieval"]["val"]["pairs"] == 6
    assert sorted(result["retrieval"]["test"]) == [
        "image_to_text_r1",
        "image_to_text_r5",
        "pairs",
        "text_to_image_r1",
        "text_to_image_r5",
    ]
    assert all(0 <= value <= 1 for name, value in result["retrieval"]["test"].items() if name != "pairs")


def test_the_numbers_are_those_of_the_pairs(inputs):
    clip, split = load_clip(inputs["encode"] / "clip"), PreparedSplit(inputs["prepare"], "test")
    images = torch.stack([torch.from_numpy(split.image(index)).permute(2, 0, 1) for index in range(4)])
    expected = retrieval_recall(clip.embed_images(images), clip.embed_texts(CAPTIONS), CAPTIONS)
    assert retrieval(clip, split) == {"pairs": 4, **expected}


def test_twice_gives_equal_bytes(inputs, tmp_path):
    for name in "ab":
        measured(inputs, tmp_path / name)
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b")


def test_only_the_first_pairs(inputs, monkeypatch):
    monkeypatch.setattr(encode_evaluate, "PAIRS", 3)
    found = retrieval(load_clip(inputs["encode"] / "clip"), PreparedSplit(inputs["prepare"], "val"))
    assert found is not None
    assert found["pairs"] == 3


def test_pictures_of_another_size_are_resized(tmp_path):
    prepare = prepared(tmp_path, height=30, width=20, counts={"test": 2})
    found = retrieval(load_clip(encoded(tmp_path / "encode") / "clip"), PreparedSplit(prepare, "test"))
    assert found is not None
    assert found["pairs"] == 2


def test_without_captions_there_is_no_number(tmp_path):
    prepared(tmp_path, counts={"test": 2})
    (tmp_path / "raw/captions.jsonl").unlink()
    inputs = {"prepare": prepare_again(tmp_path), "encode": encoded(tmp_path / "encode")}
    assert measured(inputs, tmp_path / "out")["retrieval"] == {"test": None}


def test_without_a_clip_stand_ins_are_left(inputs, tmp_path):
    changes = {
        "encode.clip.source": "none",
        **text_table(tmp_path, ["grass", "sky", "hoop"]),
        "encode.text.stand_ins": {"ring": "hoop"},
        "encode.backbone.source": "random",
        "encode.backbone.name": "resnet18",
    }
    encode = encoded(tmp_path / "encode", changes=changes, vocabulary=vocabulary_of(inputs["prepare"]))
    result = measured({**inputs, "encode": encode}, tmp_path / "out")
    assert result == {"retrieval": {"test": None}, "stand_ins": {"ring": "hoop"}}


def test_without_words(tmp_path):
    sources = {f"encode.{part}.source": "none" for part in ("clip", "text", "backbone")}
    inputs = {"prepare": prepared_photos(tmp_path), "encode": encoded(tmp_path / "encode", changes=sources)}
    assert measured(inputs, tmp_path / "out", splits=["train"]) == {"retrieval": {"train": None}, "stand_ins": {}}


def test_an_unknown_split(inputs, tmp_path):
    with pytest.raises(DataError, match="stress"):
        measured(inputs, tmp_path / "out", splits=["stress"])
    assert not (tmp_path / "out").exists()
