from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import encode_settings, open_clip_model, prepared, prepared_photos, text_table, timm_backbone
from safetensors.torch import save_file

from lexiseg.encoders.clip import load_clip
from lexiseg.encoders.text import load_text
from lexiseg.errors import DataError, LabelError, ModelError, SettingsError
from lexiseg.settings import View
from lexiseg.stages.encode import run
from lexiseg.storage import hash_tree, read_json, sha256_of_file

DECLARED = ["seed", "threads", "encode.backbone", "encode.clip", "encode.pretrain", "encode.text"]  # as in dvc.yaml


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return {"prepare": prepared(tmp_path_factory.mktemp("data"))}


def encode(inputs, out, changes=None):
    block = SimpleNamespace(seed=0, threads=1, encode=encode_settings(changes))
    run(View(block, DECLARED), inputs, out)
    return hash_tree(out)


def open_clip_settings(folder, **changes):
    """A model of open_clip, and settings that name the file it was saved to."""
    original = open_clip_model(folder)
    save_file(original.state_dict(), folder / "weights.safetensors")
    path = str(folder / "weights.safetensors")
    clip = {"source": "open_clip", "model": "lexiseg-test", "weights": path, "sha256": sha256_of_file(path)}
    clip = {**clip, "licence": "MIT", **changes}
    return original, {f"encode.clip.{key}": value for key, value in clip.items()}


def test_pretrained_on_the_captions(inputs, tmp_path):
    files = encode(inputs, tmp_path)
    assert sorted(files) == [
        "backbone/backbone.json",
        "clip/clip.json",
        "clip/curve.csv",
        "clip/model.safetensors",
        "clip/tokenizer.json",
        "text/text.json",
    ]
    assert (tmp_path / "clip/curve.csv").read_text().startswith("step,loss\n1,")
    assert load_clip(tmp_path / "clip").kind == "tiny"
    assert load_text(tmp_path).embed(["ring"]).shape == (1, 128)


def test_twice_gives_equal_bytes(inputs, tmp_path):
    assert encode(inputs, tmp_path / "a") == encode(inputs, tmp_path / "b")


def test_open_clip_by_name_and_local_file(inputs, tmp_path):
    original, changes = open_clip_settings(tmp_path)
    encode(inputs, tmp_path / "out", changes)
    clip = load_clip(tmp_path / "out/clip")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        expected = F.normalize(original.encode_image(clip.normalise(images)), dim=-1)
        assert torch.equal(clip.embed_images(images), expected)
        tokens = open_clip.get_tokenizer("lexiseg-test")(["a ring"])
        assert torch.equal(clip.model.encode_text(tokens), original.encode_text(tokens))  # type: ignore[operator]
        assert torch.equal(clip.tokenize(["a ring"]), tokens)
    assert read_json(tmp_path / "out/clip/clip.json")["licence"] == "MIT"
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "out").rglob("*.json"))


def test_weights_beside_the_repository(inputs, tmp_path, monkeypatch):
    original, changes = open_clip_settings(tmp_path / "tree/weights")
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / "tree" / name).touch()
    (tmp_path / "tree/below").mkdir()
    monkeypatch.chdir(tmp_path / "tree/below")
    encode(inputs, tmp_path / "out", {**changes, "encode.clip.weights": "weights/weights.safetensors"})
    assert torch.equal(load_clip(tmp_path / "out/clip").model.visual.proj, original.visual.proj)  # type: ignore[union-attr]


def test_a_table_and_a_backbone_without_a_clip(inputs, tmp_path):
    changes = {
        "encode.clip.source": "none",
        **text_table(tmp_path, ["Lawn", "sky", "hoop"]),
        "encode.text.stand_ins": {"ring": "hoop"},
        **timm_backbone(tmp_path),
    }
    files = encode(inputs, tmp_path / "a", changes)
    assert files == encode(inputs, tmp_path / "b", changes)
    assert sorted(files) == [
        "backbone/backbone.json",
        "backbone/model.safetensors",
        "text/text.json",
        "text/vectors.safetensors",
    ]
    text = load_text(tmp_path / "a")
    # "grass" has no row, its synonym "lawn" has
    assert torch.equal(text.embed(["grass"]), text.embed(["lawn"]))
    assert [text.stand_in(name) for name in ("grass", "sky", "ring")] == [None, None, "hoop"]


@pytest.mark.parametrize("which", ["timm", "none"])
def test_without_words(tmp_path, which):
    changes = {"encode.clip.source": "none", "encode.text.source": "none", "encode.backbone.source": "none"}
    if which == "timm":
        changes |= timm_backbone(tmp_path)
    files = encode({"prepare": prepared_photos(tmp_path)}, tmp_path / "a", changes)
    weights = ["backbone/model.safetensors"] if which == "timm" else []
    assert sorted(files) == ["backbone/backbone.json", *weights]
    assert read_json(tmp_path / "a/backbone/backbone.json")["source"] == which


def test_a_class_without_a_row_is_refused(inputs, tmp_path):
    changes = {"encode.clip.source": "none", **text_table(tmp_path, ["grass", "sky"]), **timm_backbone(tmp_path)}
    with pytest.raises(LabelError, match="ring"):
        encode(inputs, tmp_path / "out", changes)
    assert not (tmp_path / "out/text/text.json").exists()


@pytest.mark.parametrize(
    ("changes", "kind", "found", "allowed"),
    [
        ({"encode.clip.source": "none"}, SettingsError, "`encode.clip.source: none`", "a CLIP"),
        ({"encode.pretrain.scenes": "scenes"}, DataError, "`scenes`", "iconic, test, train"),
    ],
)
def test_what_cannot_be_encoded(inputs, tmp_path, changes, kind, found, allowed):
    with pytest.raises(kind) as caught:
        encode(inputs, tmp_path / "out", changes)
    assert found in caught.value.found
    assert allowed in caught.value.allowed
    assert caught.value.fix
    assert not (tmp_path / "out").exists()


def test_another_weight_file_than_the_settings_say(inputs, tmp_path):
    _, changes = open_clip_settings(tmp_path, sha256="0" * 64)
    with pytest.raises(ModelError, match="0" * 64):
        encode(inputs, tmp_path / "out", changes)
    assert not (tmp_path / "out/clip").exists()


def test_the_seed_counts(inputs, tmp_path):
    one = encode(inputs, tmp_path / "a")
    block = SimpleNamespace(seed=1, threads=1, encode=encode_settings())
    run(View(block, DECLARED), inputs, tmp_path / "b")
    assert hash_tree(tmp_path / "b")["clip/model.safetensors"] != one["clip/model.safetensors"]
    assert np.isfinite(load_text(tmp_path / "b").embed(["ring"]).numpy()).all()
