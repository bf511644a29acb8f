import itertools
import json

import numpy as np
import pytest
import torch
from helpers.micro import save
from helpers.tiny import encoded, settings
from PIL import Image

import lexiseg
from lexiseg.encoders.text import copy_text
from lexiseg.errors import DataError, LabelError, ModelError
from lexiseg.inference import load, parse_labels, predict_files
from lexiseg.methods.lseg.build import new_model, save_model
from lexiseg.segmentation import upsample_argmax
from lexiseg.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A self-contained model folder with random weights."""
    root = tmp_path_factory.mktemp("model")
    encode = encoded(root / "encode")
    torch.manual_seed(0)
    save_model(root / "register", *new_model(encode, settings().lseg.model, text_dim=24))
    copy_text(encode, root / "register")
    return root / "register"


@pytest.fixture
def model(folder):
    return load(folder)


def pixels(height=16, width=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- segment -----------------------------------------------------------------------------------------------------


def test_a_picture_divided_among_labels(model):
    result = model.segment(pixels(), ["grass", "red ring", "sky"], protocol="abc")
    assert result.labels == ("grass", "red ring", "sky")
    assert (result.label_map.shape, result.label_map.dtype) == ((16, 24), np.int32)
    assert (result.scores.shape, result.scores.dtype) == ((3, 8, 12), np.float32)
    assert result.protocol == "abc"
    expected = upsample_argmax(torch.from_numpy(result.scores)[None], height=16, width=24)[0]
    assert (result.label_map == expected.numpy()).all()
    assert sum(result.area(label) for label in result.labels) == pytest.approx(1)


def test_arrays_files_and_pil_pictures_are_alike(model, tmp_path):
    path = save(tmp_path / "a.png", pixels())
    results = [model.segment(image, ["sky", "ring"]) for image in (pixels(), path, str(path), Image.open(path))]
    assert all((result.scores == results[0].scores).all() for result in results)


def test_a_pil_picture_is_read_as_its_file_is(model, tmp_path):
    deep = np.random.default_rng(0).integers(0, 1 << 16, (16, 24), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    one, other = (model.segment(image, ["sky", "ring"]) for image in (tmp_path / "deep.png", Image.fromarray(deep)))
    assert (one.scores == other.scores).all()


def test_a_pil_picture_that_cannot_be_used(model, tmp_path, monkeypatch):
    Image.fromarray(pixels(64, 64)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:1000])
    with Image.open(tmp_path / "cut.jpg") as cut, pytest.raises(DataError) as caught:
        model.segment(cut, ["sky", "ring"])
    assert caught.value.found.startswith("the picture is damaged")
    monkeypatch.setattr("lexiseg.inference.MAX_PIXELS", 100)
    with Image.open(tmp_path / "whole.jpg") as large, pytest.raises(DataError) as caught:
        model.segment(large, ["sky", "ring"])
    assert caught.value.found == "the picture has 64 x 64 pixels"


def test_the_order_of_labels_is_free(model):
    one, other = model.segment(pixels(), ["sky", "ring", "grass"]), model.segment(pixels(), ["grass", "ring", "sky"])
    assert np.allclose(one.scores, other.scores[::-1], atol=1e-5)
    assert (one.label_map == 2 - other.label_map).mean() > 0.99


def test_one_label_covers_all(model):
    result = model.segment(pixels(), ["ring"])
    assert result.area("ring") == 1
    assert result.mean_score("ring") == pytest.approx(1)


def test_a_vocabulary_as_labels(model):
    assert model.segment(pixels(), Vocabulary(names=("sky", "ring"))).labels == ("sky", "ring")


def test_words_of_any_script(model):
    for label in ("草地", "Gemüse", "🙂", "a {} b"):
        assert model.segment(pixels(), [label, "the sky, at night"]).labels == (label, "the sky, at night")
    assert model.unknown_words(["ring", "草地"]) == {"草地": ["草地"]}


def test_words_that_are_the_same_to_the_encoder(model):
    """It has seen neither; the second would be given no pixel, whatever is in the picture."""
    with pytest.raises(LabelError) as caught:
        model.segment(pixels(), ["sea", "ring", "lawn"])
    assert caught.value.found == "the labels sea, lawn have one and the same text vector"
    assert caught.value.allowed.endswith("it has never seen sea, lawn")
    assert caught.value.fix == "keep one of them"
    assert model.segment(pixels(), ["sea", "ring"]).labels == ("sea", "ring")


@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (64, 3)])
def test_pictures_of_any_shape(model, shape):
    assert model.segment(pixels(*shape), ["sky", "ring"]).label_map.shape == shape


@pytest.mark.parametrize(
    ("labels", "found"),
    [([], "no labels"), (["sky", "sky"], "more than once: sky"), (["sky", " "], "empty"), ("sky, ring", "one string")],
)
def test_labels_that_cannot_be_used(model, labels, found):
    with pytest.raises(LabelError) as caught:
        model.segment(pixels(), labels)
    assert found in caught.value.found
    assert caught.value.allowed
    assert caught.value.fix


@pytest.mark.parametrize(
    "image",
    [
        pixels().astype(np.float32) / 255,
        pixels()[..., 0],
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
    ],
)
def test_arrays_that_are_no_picture(model, image):
    with pytest.raises(DataError) as caught:
        model.segment(image, ["sky"])
    assert str(image.shape) in caught.value.found
    assert str(image.dtype) in caught.value.found
    assert "uint8 RGB" in caught.value.allowed
    assert "PIL" in caught.value.fix


@pytest.mark.parametrize(
    ("content", "found"),
    [(None, "cannot be opened"), (b"", "0 bytes"), (b"hello", "not a picture")],
)
def test_files_that_are_no_picture(model, tmp_path, content, found):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        model.segment(path, ["sky"])
    assert found in caught.value.found
    assert caught.value.allowed
    assert caught.value.fix


def test_a_decompression_bomb(model, tmp_path, monkeypatch):
    monkeypatch.setattr("lexiseg.inference.MAX_PIXELS", 100)
    with pytest.raises(DataError) as caught:
        model.segment(save(tmp_path / "a.png", pixels()), ["sky"])
    assert "24 x 16" in caught.value.found
    assert "at most 100" in caught.value.allowed


# ---- load --------------------------------------------------------------------------------------------------------


def test_the_package_loads_a_model(folder):
    assert lexiseg.load(str(folder)).segment(pixels(), ["sky"]).labels == ("sky",)


def test_a_wrong_folder(tmp_path):
    with pytest.raises(ModelError) as caught:
        load(tmp_path / "nowhere")
    assert "nowhere" in caught.value.found
    assert "model folder" in caught.value.allowed
    assert "--model" in caught.value.fix


def test_the_output_of_training_is_no_whole_model(folder, tmp_path):
    for name in ("model.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    assert "text/text.json" in caught.value.found
    assert "register stage" in caught.value.allowed
    assert caught.value.fix


# ---- files -------------------------------------------------------------------------------------------------------


def test_what_is_written(model, tmp_path):
    path, out = save(tmp_path / "photo.png", pixels()), tmp_path / "out"
    labels = ["grass", "purple ring", "sky"]
    (content,) = predict_files(model, [path], labels, out=out)
    assert sorted(file.name for file in out.iterdir()) == ["photo.json", "photo.png", "photo_overlay.png"]
    assert json.loads((out / "photo.json").read_text()) == content
    result = model.segment(path, labels)
    with Image.open(out / "photo.png") as picture:
        assert picture.mode == "L"
        assert (np.asarray(picture) == result.label_map).all()
    with Image.open(out / "photo_overlay.png") as picture:
        assert picture.mode == "RGB"
        assert picture.width >= 24
    assert content["image"] == str(path)
    assert content["size"] == {"height": 16, "width": 24}
    assert content["model"] == str(model.folder)
    assert [row["label"] for row in content["labels"]] == labels
    assert [row["index"] for row in content["labels"]] == [0, 1, 2]
    for row in content["labels"]:
        assert row["area"] == result.area(row["label"])
        assert row["score"] == result.mean_score(row["label"])
        assert (row["score"] is None) == (row["area"] == 0)
    assert content["unknown_words"] == {"purple ring": ["purple"]}


def test_twice_gives_equal_files(model, tmp_path):
    path = save(tmp_path / "photo.png", pixels())
    for name in "ab":
        list(predict_files(model, [path], ["sky", "ring"], out=tmp_path / name))
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_more_labels_than_a_byte_can_name(model, tmp_path):
    words = ["small", "red", "ring", "grass", "sky", "over"]
    labels = [" ".join(order) for order in itertools.permutations(words, 4)][:300]
    list(predict_files(model, [save(tmp_path / "a.png", pixels())], labels, out=tmp_path / "out"))
    with Image.open(tmp_path / "out/a.png") as picture:
        assert picture.mode.startswith("I;16")
        assert (np.asarray(picture) == model.segment(pixels(), labels).label_map).all()


def test_pictures_of_one_name_are_numbered(model, tmp_path):
    paths = [
        save(tmp_path / name, pixels(seed=k)) for k, name in enumerate(["a/x.png", "b/x.png", "c/x.bmp", "x_2.png"])
    ]
    contents = list(predict_files(model, paths, ["sky", "ring"], out=tmp_path / "out"))
    names = sorted(file.name for file in (tmp_path / "out").glob("*.json"))
    assert names == ["x.json", "x_2.json", "x_2_2.json", "x_3.json"]
    for content, name in zip(contents, ["x", "x_2", "x_3", "x_2_2"], strict=True):
        assert json.loads((tmp_path / f"out/{name}.json").read_text()) == content


def test_a_name_like_that_of_an_overlay(model, tmp_path):
    paths = [save(tmp_path / name, pixels()) for name in ("a.png", "a_overlay.png")]
    list(predict_files(model, paths, ["sky", "ring"], out=tmp_path / "out"))
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == [
        "a.json",
        "a.png",
        "a_overlay.png",
        "a_overlay_2.json",
        "a_overlay_2.png",
        "a_overlay_2_overlay.png",
    ]
    with Image.open(tmp_path / "out/a_overlay.png") as picture:
        assert picture.mode == "RGB"


def test_a_picture_is_never_overwritten(model, tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", pixels())
    before = path.read_bytes()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        list(predict_files(model, [path], ["sky"], out=tmp_path / "x" / ".."))
    assert "a.png" in caught.value.found
    assert "none of the pictures" in caught.value.allowed
    assert "--out" in caught.value.fix
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_missing_picture_stops_before_the_first(model, tmp_path, place):
    paths = [save(tmp_path / "a.png", pixels()), tmp_path / "b.png"]
    with pytest.raises(DataError) as caught:
        list(predict_files(model, paths if place == "last" else paths[::-1], ["sky"], out=tmp_path / "out"))
    assert "b.png" in caught.value.found
    assert not (tmp_path / "out").exists()


def test_a_damaged_picture_leaves_nothing_half_written(model, tmp_path):
    paths = [save(tmp_path / "a.png", pixels()), tmp_path / "b.png"]
    paths[1].write_bytes(paths[0].read_bytes()[:60])
    with pytest.raises(DataError, match=r"b\.png is damaged"):
        list(predict_files(model, paths, ["sky"], out=tmp_path / "out"))
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.json", "a.png", "a_overlay.png"]


@pytest.mark.parametrize(("labels", "found"), [([], "no labels"), (["sky", "sky"], "more than once")])
def test_wrong_labels_stop_before_the_first(model, tmp_path, labels, found):
    with pytest.raises(LabelError, match=found):
        list(predict_files(model, [save(tmp_path / "a.png", pixels())], labels, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# ---- labels as one text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("grass, sky", ("grass", "sky")),
        ("  ring ", ("ring",)),
        ("a small ring,草地", ("a small ring", "草地")),
        ("Sky,Big sky", ("Sky", "Big sky")),
    ],
)
def test_labels_of_a_command(text, labels):
    assert parse_labels(text) == labels


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "no labels"),
        ("  ", "no labels"),
        ("a,,b", "empty label"),
        (",", "empty label"),
        ("a, b,a ", "more than once: a"),
    ],
)
def test_a_text_that_is_no_list_of_labels(text, found):
    with pytest.raises(LabelError) as caught:
        parse_labels(text)
    assert found in caught.value.found
    assert caught.value.allowed
    assert caught.value.fix


def test_a_model_that_is_made_anew_while_it_is_read_is_an_error_that_says_so(tmp_path, monkeypatch):
    def gone(folder):
        raise FileNotFoundError(2, "No such file or directory", str(folder / "model.json"))

    monkeypatch.setattr("lexiseg.inference.Model", gone)
    with pytest.raises(ModelError, match=r"model\.json went away while the model was read") as caught:
        load(tmp_path)
    assert "dvc repro" in caught.value.fix
