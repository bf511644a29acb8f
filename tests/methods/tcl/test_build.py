import pytest
import torch
from helpers.tiny import encoded

from lexiseg.errors import ModelError
from lexiseg.methods.tcl.build import learned, load_model, new_model, save_model
from lexiseg.methods.tcl.settings import ModelSettings
from lexiseg.storage import load_tensors, read_json, save_tensors, write_json

SETTINGS = ModelSettings(
    stages=1, units=1, kernel=3, gate=0.1, scale=10.0, bias=-2.5, temperature=0.07, statistics="imagenet"
)


@pytest.fixture
def folders(tmp_path):
    encode = encoded(tmp_path / "encode")
    model, _, config = new_model(encode, SETTINGS)
    save_model(tmp_path / "model", model, config)
    return tmp_path / "model", encode / "clip", model


def test_what_was_learned_comes_back_on_its_clip(folders):
    folder, clip, model = folders
    again, config = load_model(folder, clip=clip)
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.embed(images), model.eval().embed(images))
    assert config["mean"] == [0.485, 0.456, 0.406]
    assert load_tensors(folder / "model.safetensors").keys() == learned(model).keys()
    assert not any(name.startswith("visual.") for name in learned(model))


def test_weights_of_another_network(folders):
    folder, clip, model = folders
    tensors = learned(model)
    for wrong in ({**tensors, "grounder.proj": tensors["grounder.proj"][:, :5]}, {"image_log_scale": torch.ones(())}):
        save_tensors(folder / "model.safetensors", wrong)
        with pytest.raises(ModelError, match=r"does not fit model\.json: "):
            load_model(folder, clip=clip)


def test_another_clip(folders):
    folder, clip, _ = folders
    write_json(folder / "model.json", {**read_json(folder / "model.json"), "text_dim": 7})
    with pytest.raises(ModelError, match="a CLIP of 24 channels for a grounder of 7"):
        load_model(folder, clip=clip)
