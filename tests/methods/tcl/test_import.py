"""Official checkpoints: from a file to a model folder that answers to words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.official_lseg import write_checkpoint
from helpers.official_tcl import CLIP, officially_named, random_state
from helpers.tiny import encoded, settings

import lexiseg
from lexiseg.encoders.clip import load_clip
from lexiseg.errors import ModelError, SettingsError
from lexiseg.importing import import_model
from lexiseg.methods.tcl.build import learned, new_model
from lexiseg.methods.tcl.checkpoint import TEMPLATES
from lexiseg.storage import load_tensors, read_json


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model folder of a checkpoint that carries its CLIP, and the report."""
    root = tmp_path_factory.mktemp("tcl")
    state, rng = random_state(), torch.Generator().manual_seed(1)
    # As many words and places as OpenAI's tokenizer needs.
    for name, rows in (("token_embedding.weight", 49408), ("positional_embedding", 77)):
        width = state[f"clip_text_encoder.{name}"].shape[1]
        state[f"clip_text_encoder.{name}"] = torch.randn(rows, width, generator=rng)
    torch.save(state, root / "tcl.pth")
    return import_model("tcl", root / "tcl.pth", out=root / "model", classes=["sky", "ring"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A released file, which has no CLIP in it, the encode folder that it belongs to, and what it was made of."""
    root = tmp_path_factory.mktemp("alone")
    encode = encoded(root / "encode")
    torch.manual_seed(0)
    model, _, _ = new_model(encode, settings({"tcl.model.gate": 0.4}).tcl.model)
    torch.save({"model": officially_named(learned(model), block=1)}, root / "tcl.pth")
    return root / "tcl.pth", encode, model


def picture(height=32, width=48):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_the_folder_answers_to_words(whole):
    model = lexiseg.load(whole.folder)
    result = model.segment(picture(), ["red ring", "ring", "sky"])
    assert result.overlapping
    assert result.label_map.shape == (32, 48)
    assert 0 <= result.scores.min() <= result.scores.max() <= 1
    assert read_json(whole.folder / "vocabulary.json")["names"] == ["sky", "ring"]


def test_pictures_are_scaled_and_refined_as_the_authors_do(whole):
    config = read_json(whole.folder / "model.json")
    assert config["predict"] == {"short_side": 448, "max_side": 2048, "window": 448, "stride": 224}
    assert config["refine"] == {"pamr_iterations": 10, "knowledge_weight": 0.3}
    assert config["mean"] == [0.485, 0.456, 0.406]


def test_the_mean_over_the_templates_is_taken_of_raw_vectors(whole):
    text = read_json(whole.folder / "text/text.json")
    assert (tuple(text["templates"]), text["average"]) == (TEMPLATES, "raw")
    clip = load_clip(whole.folder / "clip", visual=False)
    raw = torch.stack([clip.embed_texts([one.replace("{}", "ring")], normalise=False)[0] for one in TEMPLATES])
    expected = F.normalize(raw.mean(dim=0), dim=0)
    found = lexiseg.load(whole.folder)._scorer.text.embed(["ring"])[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    of_unit = F.normalize(F.normalize(raw, dim=1).mean(dim=0), dim=0)
    assert (expected - of_unit).abs().max() > 1e-5


def test_the_report(whole):
    lines = "\n".join(whole.lines())
    assert "none missing" in lines
    assert f"the CLIP in the checkpoint ({CLIP['embed_dim']} numbers per label)" in lines
    changes = whole.settings
    assert changes["tcl"]["model"]["init"].endswith("model")
    assert changes["tcl"]["train"] == {"steps": 0}
    assert changes["tcl"]["refine"]["pamr_iterations"] == 10


def test_a_released_file_needs_its_clip(alone, tmp_path):
    file, encode, model = alone
    with pytest.raises(ModelError, match="carries no CLIP") as caught:
        import_model("tcl", file, out=tmp_path / "none")
    assert "--text" in caught.value.fix
    assert not (tmp_path / "none").exists()
    report = import_model("tcl", file, out=tmp_path / "model", text=encode)
    kept = load_tensors(report.folder / "model.safetensors")
    for name, value in learned(model).items():
        assert torch.equal(kept[name], value), name
    # The CLIP of that folder, with the authors' templates.
    assert tuple(read_json(report.folder / "text/text.json")["templates"]) == TEMPLATES
    assert lexiseg.load(report.folder).segment(picture(), ["ring"]).overlapping


def test_another_clip_than_that_of_the_training(alone, tmp_path):
    file, _, _ = alone
    torch.save(random_state(clip=False), tmp_path / "other.pth")
    with pytest.raises(ModelError, match="24 numbers"):
        import_model("tcl", tmp_path / "other.pth", out=tmp_path / "model", text=alone[1])
    assert file.is_file()


def test_a_checkpoint_of_another_method(tmp_path):
    with pytest.raises(ModelError, match=r"is no TCL checkpoint: no masker\.sim2mask\.w"):
        import_model("tcl", write_checkpoint(tmp_path / "demo.ckpt"), out=tmp_path / "model")


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ("masker.image_encoder.decoder.image_proj.ln.weight", "1 tensors missing"),
        ("masker.image_encoder.decoder.decoder.net.0.conv.gate.gate", "1 tensors missing"),
        ("masker.image_encoder.decoder.image_proj.proj", "no complete grounder"),
    ],
)
def test_a_checkpoint_with_a_hole(tmp_path, lacking, message):
    state = random_state()
    del state[lacking]
    torch.save(state, tmp_path / "tcl.pth")
    with pytest.raises(ModelError, match=message):
        import_model("tcl", tmp_path / "tcl.pth", out=tmp_path / "model")


def test_what_is_not_known_is_named(tmp_path):
    torch.save({**random_state(), "masker.extra": torch.zeros(2)}, tmp_path / "tcl.pth")
    report = import_model("tcl", tmp_path / "tcl.pth", out=tmp_path / "model")
    assert "unexpected, not used: masker.extra" in report.lines()


def test_a_wrong_option(tmp_path):
    torch.save(random_state(), tmp_path / "tcl.pth")
    with pytest.raises(SettingsError, match="statistics"):
        import_model("tcl", tmp_path / "tcl.pth", out=tmp_path / "model", options={"statistics": "coco"})
