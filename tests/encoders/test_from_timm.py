from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.tiny import encode_settings
from pydantic import ValidationError
from safetensors.torch import save_file

from lexiseg.encoders import from_timm
from lexiseg.encoders.backbone import read_backbone
from lexiseg.encoders.from_timm import save_backbone, timm_weights
from lexiseg.encoders.pyramid import build_timm_backbone
from lexiseg.encoders.settings import BackboneSettings
from lexiseg.errors import ModelError
from lexiseg.storage import hash_tree, sha256_of_file

NAME = "mobilenetv2_035"


def block(**changes) -> BackboneSettings:
    return encode_settings({f"encode.backbone.{key}": value for key, value in changes.items()}).backbone


def timm_block(path, **changes):
    sha256 = sha256_of_file(path) if Path(path).is_file() else "0" * 64
    values = {"source": "timm", "name": NAME, "weights": str(path), "sha256": sha256, "licence": "Apache-2.0"}
    return block(**{**values, **changes})


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weight file with a classifier of another size than timm's."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_file(timm.create_model(NAME, pretrained=False, num_classes=3).state_dict(), path)
    return path


def test_weights_of_a_file_without_the_classifier(tmp_path, weights):
    save_backbone(tmp_path, timm_block(weights))
    config, tensors = read_backbone(tmp_path)
    assert tensors is not None
    expected = timm.create_model(NAME, num_classes=0).state_dict()
    assert tensors.keys() == expected.keys()
    assert config["name"] == NAME
    assert config["licence"] == "Apache-2.0"
    assert config["mean"] == pytest.approx([0.485, 0.456, 0.406])


def test_twice_gives_equal_bytes(tmp_path, weights):
    # Whatever is not in the file must not be made up from random numbers.
    for number, name in enumerate("ab"):
        torch.manual_seed(number)
        save_backbone(tmp_path / name, timm_block(weights))
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b")
    assert str(tmp_path) not in (tmp_path / "a/backbone/backbone.json").read_text()


def test_a_torch_pickle(tmp_path, weights):
    torch.save({"state_dict": timm.create_model(NAME, num_classes=0).state_dict()}, tmp_path / "net.pth")
    save_backbone(tmp_path, timm_block(tmp_path / "net.pth"))
    assert read_backbone(tmp_path)[1]


def test_torchvisions_own_file_of_the_papers_resnet(tmp_path):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    net = models.resnet101(weights=None).eval()
    for norm in (module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        torch.nn.init.normal_(norm.bias, std=0.1)
    torch.save(net.state_dict(), tmp_path / "resnet101.pth")
    save_backbone(tmp_path, timm_block(tmp_path / "resnet101.pth", name="ResNet-101"))
    config, state = read_backbone(tmp_path)
    assert config["mean"] == [0.485, 0.456, 0.406]
    ours = build_timm_backbone(config["name"], options={}, readout="ignore", weights=state).eval()
    images = torch.randn(1, 3, 64, 32)
    with torch.inference_mode():
        x, maps = net.maxpool(net.relu(net.bn1(net.conv1(images)))), []
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            maps.append(x := layer(x))
        torch.testing.assert_close(ours(images), maps)
    assert ours.channels == (256, 512, 1024, 2048)


def test_statistics_of_the_settings_win(tmp_path, weights):
    save_backbone(tmp_path, timm_block(weights, mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25]))
    config, _ = read_backbone(tmp_path)
    assert (config["mean"], config["std"]) == ([0.5] * 3, [0.25] * 3)


@pytest.mark.parametrize("name", ["ViT-L/16", "ViT-B/16", "ViT-B/32"])
def test_the_papers_vits_are_normalised_by_one_half(tmp_path, name):
    save_backbone(tmp_path, block(source="random", name=name))
    config, tensors = read_backbone(tmp_path)
    assert (config["mean"], config["std"], tensors) == ([0.5] * 3, [0.5] * 3, None)


def test_the_clips_own_tower(tmp_path):
    save_backbone(tmp_path, block(source="clip"))
    config, tensors = read_backbone(tmp_path)
    assert (config["source"], tensors) == ("clip", None)


def test_no_backbone_wanted(tmp_path):
    save_backbone(tmp_path, block(source="none"))
    assert sorted(hash_tree(tmp_path)) == ["backbone/backbone.json"]
    with pytest.raises(ModelError) as caught:
        read_backbone(tmp_path)
    assert caught.value.found == "no backbone, since `encode.backbone.source` is none"
    assert "clip, timm or random" in caught.value.allowed
    assert "dvc repro" in caught.value.fix


def _lacking(state):
    state.pop("conv_stem.weight")


def _reshaped(state):
    state["conv_stem.weight"] = state["conv_stem.weight"][:, :1].contiguous()


@pytest.mark.parametrize(
    ("damage", "found"),
    [(_lacking, "lacks 1 tensors (conv_stem.weight)"), (_reshaped, "1 of another shape (conv_stem")],
)
def test_weights_that_do_not_fit(tmp_path, damage, found):
    state = timm.create_model(NAME).state_dict()
    damage(state)
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(ModelError) as caught:
        save_backbone(tmp_path, timm_block(tmp_path / "net.safetensors"))
    assert found in caught.value.found
    assert f"timm's {NAME}" in caught.value.allowed
    assert "`encode.backbone.weights`" in caught.value.fix
    assert not (tmp_path / "backbone/backbone.json").exists()


def test_another_hash(tmp_path, weights):
    with pytest.raises(ModelError, match=sha256_of_file(weights)):
        save_backbone(tmp_path, timm_block(weights, sha256="0" * 64))


def test_no_file(tmp_path):
    with pytest.raises(ModelError) as caught:
        save_backbone(tmp_path, timm_block(tmp_path / "nowhere.safetensors"))
    assert "nowhere.safetensors" in caught.value.found


def test_the_hub_without_a_network(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("cannot reach\nthe hub")

    monkeypatch.setattr(from_timm.timm, "create_model", offline)
    with pytest.raises(ModelError) as caught:
        save_backbone(tmp_path, timm_block("hub"))
    assert "cannot reach the hub" in caught.value.found
    assert "network" in caught.value.allowed
    assert "HF_HUB_OFFLINE=0" in caught.value.fix


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "timm"}, "source timm needs"),
        ({"source": "timm", "name": "x", "weights": "x.pth", "licence": "x"}, "needs its `sha256`"),
        ({"source": "random"}, "source random needs"),
    ],
)
def test_settings_say_what_a_source_needs(values, message):
    plain = block().model_dump()
    with pytest.raises(ValidationError, match=message):
        BackboneSettings(**{**plain, "name": None, **values})


# ---- files of self-supervised trainings --------------------------------------------------------------------------

VIT = "vit_tiny_patch16_224"
SIZES: dict[str, Any] = {"embed_dim": 24, "depth": 1, "num_heads": 3, "img_size": 32, "num_classes": 0}


def vit_state():
    torch.manual_seed(0)
    return timm.create_model(VIT, **SIZES).state_dict()


def read(path):
    return timm_weights(VIT, weights=str(path), sha256=sha256_of_file(path), options=SIZES, block="encode.trunk")


def prefixed(state, prefix, **more):
    return {**{f"{prefix}{key}": value for key, value in state.items()}, **more}


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.", "module.backbone.", "teacher.", "teacher.backbone."])
def test_names_of_the_file_may_have_a_prefix(tmp_path, prefix):
    state, head = vit_state(), {f"{prefix}head.weight": torch.ones(3)}
    torch.save(prefixed(state, prefix, **head), tmp_path / "a.pth")
    found = read(tmp_path / "a.pth")
    assert list(found) == list(state)
    assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("together", [False, True])
def test_of_student_and_teacher_the_teacher_is_taken(tmp_path, together):
    teacher, student = vit_state(), {key: value + 1 for key, value in vit_state().items()}
    parts = {"student": prefixed(student, "module.backbone."), "teacher": prefixed(teacher, "backbone.")}
    content = {"epoch": 3, "args": Namespace(arch="vit"), **parts}
    if together:
        content = {f"{part}.{key}": value for part, state in parts.items() for key, value in state.items()}
    torch.save(content, tmp_path / "full.pth")
    found = read(tmp_path / "full.pth")
    assert all(torch.equal(found[key], teacher[key]) for key in teacher)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"depth": 2}, "lacks 12 tensors (blocks.1.attn.proj.bias"),
        ({"embed_dim": 48}, "of another shape (blocks.0.attn.proj.bias"),
        ({"img_size": 64}, "has 1 of another shape (pos_embed)"),
    ],
)
def test_weights_of_another_vit(tmp_path, changes, found):
    save_file(vit_state(), tmp_path / "a.safetensors")
    with pytest.raises(ModelError) as caught:
        timm_weights(
            VIT,
            weights=str(tmp_path / "a.safetensors"),
            sha256=None,
            options={**SIZES, **changes},
            block="encode.trunk",
        )
    assert found in caught.value.found
    assert caught.value.allowed == f"the weights of timm's {VIT}"
    assert caught.value.fix == "check `encode.trunk.name`, `encode.trunk.options` and `encode.trunk.weights`"


def test_code_in_a_weight_file_is_not_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"teacher": vit_state(), "more": Payload()}, tmp_path / "a.pth")
    with pytest.raises(ModelError, match="open"):
        read(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


def test_the_hash_comes_before_the_file_is_opened(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"no checkpoint at all")
    with pytest.raises(ModelError) as caught:
        timm_weights(VIT, weights=str(tmp_path / "a.pth"), sha256="0" * 64, options=SIZES, block="encode.trunk")
    assert caught.value.allowed == f"sha256 {'0' * 64}, as the settings say"
