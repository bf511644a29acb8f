"""The backbone of an encode folder, and timm's names."""

import pytest

from lexiseg.encoders.backbone import check_name, read_backbone
from lexiseg.errors import ModelError
from lexiseg.storage import write_json


@pytest.mark.parametrize(
    ("name", "timms"),
    [
        ("ViT-L/16", "vit_large_patch16_384"),
        ("ViT-B/16", "vit_base_patch16_384"),
        ("ViT-B/32", "vit_base_patch32_384"),
        ("ResNet-101", "resnet101.tv_in1k"),
        ("resnet18", "resnet18"),
        ("resnet18.a1_in1k", "resnet18.a1_in1k"),
    ],
)
def test_names(name, timms):
    assert check_name(name) == timms


@pytest.mark.parametrize("name", ["mobilnetv2_100", "resnet18.nobody", "hf-hub:someone/model", "ViT-H/9"])
def test_an_unknown_name(name):
    with pytest.raises(ModelError) as caught:
        check_name(name)
    assert f"`{name}`" in caught.value.found
    assert "ViT-L/16" in caught.value.allowed
    assert "timm.list_models" in caught.value.fix


def test_near_names_are_offered():
    with pytest.raises(ModelError, match="mobilenetv2_"):
        check_name("mobilenetv2")


def test_a_folder_without_a_backbone(tmp_path):
    with pytest.raises(ModelError) as caught:
        read_backbone(tmp_path)
    assert "backbone/backbone.json" in caught.value.found
    assert "encode stage" in caught.value.allowed
    assert "dvc repro encode" in caught.value.fix


def test_a_folder_that_says_there_is_no_backbone(tmp_path):
    write_json(tmp_path / "backbone/backbone.json", {"source": "none"})
    with pytest.raises(ModelError) as caught:
        read_backbone(tmp_path)
    assert "`encode.backbone.source` is none" in caught.value.found
    assert "timm" in caught.value.allowed
    assert "params.yaml" in caught.value.fix
