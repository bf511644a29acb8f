import json

import pytest
import torch
from helpers.tiny import encoded, open_clip_model, settings, timm_backbone
from safetensors.torch import save_file

from lexiseg.encoders.clip import save_open_clip
from lexiseg.encoders.pyramid import CnnBackbone, TinyBackbone
from lexiseg.errors import ModelError, SettingsError
from lexiseg.methods.lseg.build import build_model, load_model, new_model, save_model
from lexiseg.storage import hash_tree, load_tensors, write_json


def made(encode, **changes):
    torch.manual_seed(0)
    return new_model(encode, settings({f"lseg.model.{k}": v for k, v in changes.items()}).lseg.model, text_dim=24)


def cnn_encode(folder):
    return encoded(folder / "encode", changes=timm_backbone(folder / "weights"))


def test_the_tiny_clips_tower(tmp_path):
    encode = encoded(tmp_path / "encode")
    model, config = made(encode)
    assert isinstance(model.backbone, TinyBackbone)
    towers = load_tensors(encode / "clip/model.safetensors")
    for name, value in model.backbone.visual.state_dict().items():
        assert torch.equal(value, towers[f"visual.{name}"])
    assert (config["method"], config["text_dim"], config["mean"]) == ("lseg", 24, [0.5] * 3)
    assert model.clip_residual


def test_from_scratch(tmp_path):
    encode = encoded(tmp_path / "encode")
    model, _ = made(encode, init="random", clip_residual=False)
    trained, _ = made(encode, clip_residual=False)
    one, other = (network.state_dict()["backbone.visual.proj"] for network in (model, trained))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("init", ["backbone", "random"])
def test_a_timm_backbone(tmp_path, init):
    encode = cnn_encode(tmp_path)
    model, config = made(encode, init=init, clip_residual=False)
    assert isinstance(model.backbone, CnnBackbone)
    file = load_tensors(encode / "backbone/model.safetensors")
    same = torch.equal(model.backbone.cnn.conv_stem.weight, file["conv_stem.weight"])
    assert same == (init == "backbone")
    assert config["backbone"]["licence"] == "Apache-2.0"


@pytest.mark.parametrize("block", ["none", "bottleneck", "depthwise"])
def test_to_a_folder_and_back(tmp_path, block):
    model, config = made(encoded(tmp_path / "encode"), block=block, block_depth=2)
    model.head.weight.data.normal_()
    save_model(tmp_path / "model", model, config)
    again, other = load_model(tmp_path / "model")
    assert other == json.loads(json.dumps(config))
    images, text = torch.randn(1, 3, 16, 16), torch.nn.functional.normalize(torch.randn(3, 24), dim=1)
    assert not again.training
    with torch.inference_mode():
        assert torch.equal(again(images, text), model.eval()(images, text))
    assert (model.regularisation is None) == (block == "none")
    assert not any(
        "scale" in name and "logit" not in name for name in load_tensors(tmp_path / "model/model.safetensors")
    )


def test_equal_models_give_equal_bytes(tmp_path):
    encode = encoded(tmp_path / "encode")
    for name in "ab":
        save_model(tmp_path / name, *made(encode))
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b")
    assert sorted(hash_tree(tmp_path / "a")) == ["model.json", "model.safetensors"]
    assert str(tmp_path) not in (tmp_path / "a/model.json").read_text()


def test_channels_last_weights_are_saved_alike(tmp_path):
    model, config = made(encoded(tmp_path / "encode"))
    save_model(tmp_path / "a", model, config)
    save_model(tmp_path / "b", model.to(memory_format=torch.channels_last), config)  # type: ignore[call-overload]
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b")


def test_another_clip_as_the_backbone_is_refused(tmp_path):
    open_clip = open_clip_model(tmp_path / "configs")
    save_file(open_clip.state_dict(), tmp_path / "weights.safetensors")
    encode = encoded(tmp_path / "encode")
    weights = str(tmp_path / "weights.safetensors")
    save_open_clip(encode / "clip", name="lexiseg-test", pretrained=weights, sha256=None, licence="MIT")
    with pytest.raises(ModelError) as caught:
        made(encode)
    assert "VisionTransformer" in caught.value.found
    assert "tiny CLIP" in caught.value.allowed
    assert "encode.backbone.source: timm" in caught.value.fix


def test_a_residual_needs_the_clips_tower(tmp_path):
    with pytest.raises(ModelError, match="clip_residual"):
        made(cnn_encode(tmp_path), clip_residual=True)


def test_weights_of_another_network(tmp_path):
    encode = encoded(tmp_path / "encode")
    save_model(tmp_path / "model", *made(encode))
    _, config = made(encode, features=4)
    write_json(tmp_path / "model/model.json", config)
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path / "model")
    assert "does not fit model.json" in caught.value.found
    assert "size mismatch" in caught.value.found
    assert "one training wrote" in caught.value.allowed
    assert "whole model folder" in caught.value.fix


def test_a_config_without_an_entry(tmp_path):
    model, config = made(encoded(tmp_path / "encode"))
    save_model(tmp_path / "model", model, config)
    config.pop("text_dim")
    write_json(tmp_path / "model/model.json", config)
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path / "model")
    assert "'text_dim'" in caught.value.found
    assert "this version" in caught.value.allowed
    assert caught.value.fix


def test_unknown_settings_in_a_config(tmp_path):
    _, config = made(encoded(tmp_path / "encode"))
    config["model"]["widehead"] = True
    with pytest.raises(SettingsError) as caught:
        build_model(config)
    assert "`widehead`: unknown key" in caught.value.found
    assert "model.json" in caught.value.found


def test_truncated_weights(tmp_path):
    save_model(tmp_path / "model", *made(encoded(tmp_path / "encode")))
    path = tmp_path / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load_model(tmp_path / "model")
