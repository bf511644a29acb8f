from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.tiny import open_clip_model, small_vit, tiny_clip
from torch import nn

from lexiseg.encoders.clip import dense_embeddings
from lexiseg.encoders.pyramid import (
    CnnBackbone,
    Reassemble,
    TinyBackbone,
    VitBackbone,
    build_timm_backbone,
    resize_positions,
)
from lexiseg.errors import ModelError

# ---- the tables of the paper, on networks without memory ---------------------------------------------------------


def on_meta(name):
    with torch.device("meta"):
        return build_timm_backbone(name, options={"img_size": 384}, readout="project", weights=None)


@pytest.mark.parametrize(
    ("name", "taps", "channels"),
    [
        ("vit_large_patch16_384", (5, 11, 17, 23), (256, 512, 1024, 1024)),
        ("vit_base_patch16_384", (2, 5, 8, 11), (96, 192, 384, 768)),
        ("vit_base_patch32_384", (2, 5, 8, 11), (96, 192, 384, 768)),
    ],
)
def test_taps_channels_and_strides(name, taps, channels):
    backbone = on_meta(name)
    assert isinstance(backbone, VitBackbone)
    assert backbone.taps == taps
    assert backbone.channels == channels
    maps = backbone(torch.empty(1, 3, 384, 480, device="meta"))
    sizes = [(384 // stride, 480 // stride) for stride in (4, 8, 16, 32)]
    assert [tuple(x.shape) for x in maps] == [(1, c, *size) for c, size in zip(channels, sizes, strict=True)]


def resampler(layer):
    if isinstance(layer, nn.Identity):
        return "none"
    return (type(layer).__name__, layer.kernel_size[0], layer.stride[0], layer.padding[0])


@pytest.mark.parametrize(
    ("name", "table"),
    [
        (
            "vit_large_patch16_384",
            [("ConvTranspose2d", 4, 4, 0), ("ConvTranspose2d", 2, 2, 0), "none", ("Conv2d", 3, 2, 1)],
        ),
        (
            "vit_base_patch16_384",
            [("ConvTranspose2d", 4, 4, 0), ("ConvTranspose2d", 2, 2, 0), "none", ("Conv2d", 3, 2, 1)],
        ),
        (
            "vit_base_patch32_384",
            [("ConvTranspose2d", 8, 8, 0), ("ConvTranspose2d", 4, 4, 0), ("ConvTranspose2d", 2, 2, 0), "none"],
        ),
    ],
)
def test_resamplers(name, table):
    backbone = on_meta(name)
    assert [resampler(part.resample) for part in backbone.reassemble] == table  # type: ignore[union-attr]


def test_vit_l16_is_the_network_of_the_paper():
    backbone = on_meta("vit_large_patch16_384")
    shapes = {name: tuple(value.shape) for name, value in backbone.state_dict().items()}
    assert shapes["vit.pos_embed"] == (1, 577, 1024)
    assert shapes["vit.blocks.23.attn.qkv.weight"] == (3072, 1024)
    assert shapes["vit.blocks.0.mlp.fc1.weight"] == (4096, 1024)
    assert shapes["reassemble.3.project.0.weight"] == (1024, 2048)
    assert shapes["reassemble.0.reduce.weight"] == (256, 1024, 1, 1)
    assert shapes["reassemble.0.resample.weight"] == (256, 256, 4, 4)
    assert shapes["reassemble.3.resample.weight"] == (1024, 1024, 3, 3)
    assert "vit.head.weight" not in shapes
    assert backbone.vit.blocks[0].norm1.eps == 1e-6  # type: ignore[union-attr, index]


# ---- positions ---------------------------------------------------------------------------------------------------


def test_positions_are_resized_bilinearly_without_the_class():
    positions = torch.randn(1, 1 + 3 * 3, 5)
    resized = resize_positions(positions, height=4, width=6)
    assert resized.shape == (1, 25, 5)
    assert torch.equal(resized[:, 0], positions[:, 0])
    grid = positions[0, 1:].T.reshape(1, 5, 3, 3)
    expected = F.interpolate(grid, size=(4, 6), mode="bilinear", align_corners=False)
    assert torch.equal(resized[0, 1:], expected[0].flatten(1).T)
    other = F.interpolate(grid, size=(4, 6), mode="bilinear", align_corners=True)
    assert not torch.allclose(resized[0, 1:], other[0].flatten(1).T)


def test_positions_of_the_same_size_stay():
    positions = torch.randn(1, 10, 5)
    assert torch.equal(resize_positions(positions, height=3, width=3), positions)


def test_rows_before_columns():
    positions = torch.arange(5.0).view(1, 5, 1)  # class 0, then the grid [[1, 2], [3, 4]]
    resized = resize_positions(positions, height=2, width=4)[0, 1:, 0].view(2, 4)
    assert (resized.diff(dim=1) >= 0).all()
    assert torch.allclose(resized[1] - resized[0], torch.full((4,), 2.0))


# ---- the ViT -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_taps_are_raw_block_outputs():
    vit = small_vit()
    backbone = VitBackbone(vit, readout="project").eval()
    assert backbone.taps == (0, 1, 2, 3)
    seen = []
    for part in backbone.reassemble:
        part.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    images = torch.randn(2, 3, 64, 64)
    backbone(images)
    tokens = vit._pos_embed(vit.patch_embed(images))
    for block, tapped in zip(vit.blocks, seen, strict=True):
        tokens = block(tokens)
        assert torch.allclose(tapped, tokens, atol=1e-5)
    assert not torch.allclose(vit.norm(tokens), seen[-1], atol=1e-2)


@torch.inference_mode()
def test_the_final_norm_has_no_effect():
    vit = small_vit()
    backbone, images = VitBackbone(vit, readout="project").eval(), torch.randn(1, 3, 64, 64)
    before = backbone(images)
    vit.norm.weight.mul_(3)
    assert all(torch.equal(a, b) for a, b in zip(before, backbone(images), strict=True))


@torch.inference_mode()
def test_a_norm_before_the_blocks_is_applied():
    vit = small_vit()
    plain = VitBackbone(vit, readout="ignore").eval()
    images = torch.randn(1, 3, 64, 64)
    before = plain(images)
    vit.norm_pre = nn.LayerNorm(32)  # as in the ViTs of CLIP
    assert not torch.allclose(before[0], plain(images)[0])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 96), (16, 16), (48, 80)])
def test_any_multiple_of_the_patch(height, width):
    backbone = VitBackbone(small_vit(), readout="project").eval()
    maps = backbone(torch.randn(1, 3, height, width))
    expected = [(-(-height // stride), -(-width // stride)) for stride in (4, 8, 16, 32)]
    assert [tuple(x.shape[-2:]) for x in maps] == expected


def test_no_multiple_of_the_patch_is_refused():
    with pytest.raises(ModelError) as caught:
        VitBackbone(small_vit(), readout="project")(torch.randn(1, 3, 64, 72))
    assert "64 x 72" in caught.value.found
    assert "multiples of 16" in caught.value.allowed
    assert "`lseg.train.crop`" in caught.value.fix


# ---- reassemble --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_readouts():
    tokens = torch.randn(1, 1 + 6, 8)
    first, rest = tokens[:, :1], tokens[:, 1:]
    for readout in ("project", "add", "ignore"):
        part = Reassemble(dim=8, channels=3, patch=16, stride=16, readout=readout)
        if readout == "project":
            linear = part.project[0]  # type: ignore[index]
            expected = F.gelu(linear(torch.cat([rest, first.expand(-1, 6, -1)], dim=-1)))
        else:
            expected = rest + first if readout == "add" else rest
        grid = expected[0].T.reshape(1, 8, 2, 3)  # row by row
        assert torch.allclose(part(tokens, height=2, width=3), part.reduce(grid), atol=1e-6)


def test_resampling_comes_after_the_reduction():
    part = Reassemble(dim=8, channels=3, patch=16, stride=4, readout="ignore")
    assert part.reduce.weight.shape == (3, 8, 1, 1)
    assert part.resample.weight.shape == (3, 3, 4, 4)
    assert part(torch.randn(1, 7, 8), height=2, width=3).shape == (1, 3, 8, 12)


# ---- the tiny CLIP's tower ---------------------------------------------------------------------------------------


@torch.inference_mode()
def test_the_tiny_tower_as_a_pyramid():
    visual = tiny_clip(vision_layers=3)[0].visual
    backbone = TinyBackbone(visual)
    assert (backbone.channels, backbone.multiple) == ((32, 64, 32, 32), 8)
    images = torch.randn(2, 3, 16, 24)
    maps, embedded = backbone.maps_and_embeddings(images)
    assert [tuple(x.shape[1:]) for x in maps] == [(32, 8, 12), (64, 4, 6), (32, 2, 3), (32, 2, 3)]
    assert torch.allclose(embedded, dense_embeddings(visual, images), atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(maps, backbone(images), strict=True))
    tokens, mask = visual.tokens(visual.conv1(images))
    for number, block in enumerate(visual.transformer.resblocks):
        tokens = block(tokens, attn_mask=mask)
        if number in (1, 2):
            expected = tokens[:, 1:].transpose(1, 2).unflatten(2, (2, 3))
            assert torch.allclose(maps[number + 1], expected, atol=1e-6)


def test_another_clips_tower_is_refused(tmp_path):
    with pytest.raises(ModelError) as caught:
        TinyBackbone(open_clip_model(tmp_path).visual)
    assert "VisionTransformer" in caught.value.found
    assert "tiny CLIP" in caught.value.allowed
    assert "encode.backbone.source: timm" in caught.value.fix


# ---- by name -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mobilenetv2_035", "resnet10t", "convnext_atto"])
def test_any_cnn_with_the_weights_of_its_file(name):
    torch.manual_seed(0)
    full: Any = timm.create_model(name, pretrained=False, num_classes=0)
    backbone = build_timm_backbone(name, options={}, readout="ignore", weights=full.state_dict()).eval()
    assert isinstance(backbone, CnnBackbone)
    images = torch.randn(1, 3, 64, 96)
    maps = backbone(images)
    assert [x.shape[1] for x in maps] == list(backbone.channels)
    assert [x.shape[-1] for x in maps] == [24, 12, 6, 3]
    with torch.inference_mode():
        full.eval()
        expected = full.forward_intermediates(images, indices=1, intermediates_only=True)[0]
        assert torch.allclose(maps[-1], expected, atol=1e-4)


def test_weights_that_lack_something():
    state = timm.create_model("mobilenetv2_035", num_classes=0).state_dict()
    state.pop("conv_stem.weight")
    with pytest.raises(ModelError) as caught:
        build_timm_backbone("mobilenetv2_035", options={}, readout="ignore", weights=state)
    assert "lack 1 tensors (conv_stem.weight)" in caught.value.found
    assert "encode stage" in caught.value.allowed
    assert "dvc repro encode" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("swin_tiny_patch4_window7_224", "NHWC"),
        ("deit_tiny_patch16_224", "strides 16, 16, 16"),
        ("vit_small_patch16_36x1_224", None),  # a plain one
        ("vit_base_patch16_rpn_224", "not a ViT with one class token"),
        ("vit_small_r26_s32_224", "not a ViT with one class token"),
        ("vit_small_patch14_reg4_dinov2", "not a ViT with one class token"),
        ("vit_medium_patch16_gap_256", "not a ViT with one class token"),
        ("vit_relpos_small_patch16_224", "not a ViT with one class token"),
    ],
)
def test_what_gives_no_pyramid(name, found):
    with torch.device("meta"):
        if found is None:
            build_timm_backbone(name, options={}, readout="ignore", weights=None)
            return
        with pytest.raises(ModelError) as caught:
            build_timm_backbone(name, options={}, readout="ignore", weights=None)
    assert name in caught.value.found
    assert found in caught.value.found
    assert "CNN" in caught.value.allowed
    assert "`encode.backbone.name`" in caught.value.fix
