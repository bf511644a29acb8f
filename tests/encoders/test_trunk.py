"""Frozen trunks: ViTs of timm, read out densely."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from lexiseg.encoders.trunk import Facet, Positions, VitTrunk, build_vit, dino_positions
from lexiseg.errors import ModelError

SMALL: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 3}
STATISTICS: dict[str, Any] = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def small(
    name: str = "vit_small_patch8_224.dino", *, facet: Facet = "features", positions: Positions = "timm", **options: Any
) -> VitTrunk:
    torch.manual_seed(0)
    vit = build_vit(name, {**SMALL, "img_size": 32, **options})
    return VitTrunk(vit, facet=facet, positions=positions, **STATISTICS)


def pictures(height=32, width=32):
    rng = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, height, width), generator=rng, dtype=torch.uint8)


@pytest.mark.parametrize("name", ["vit_small_patch8_224.dino", "vit_small_patch14_reg4_dinov2.lvd142m"])
def test_features_are_the_tokens_after_the_last_norm(name):
    trunk = small(name, img_size=56)
    side = 56 if trunk.multiple == 14 else 32
    images = pictures(side, side)
    mean, std = (torch.tensor(STATISTICS[part]).view(1, 3, 1, 1) for part in ("mean", "std"))
    tokens = trunk.vit.forward_features((images.float() / 255 - mean) / std)[:, trunk.vit.num_prefix_tokens :]
    cells = side // trunk.multiple
    assert trunk(images).shape == (2, 24, cells, cells)
    torch.testing.assert_close(trunk(images).flatten(2).transpose(1, 2), tokens)


@pytest.mark.parametrize("positions", ["timm", "dino"])
def test_pictures_of_any_size(positions):
    assert small(positions=positions)(pictures(24, 56)).shape == (2, 24, 3, 7)


def test_positions_of_dino_are_those_of_timm_at_the_trained_size_and_near_them_elsewhere():
    dino, plain = small(positions="dino"), small()
    torch.testing.assert_close(dino(pictures()), plain(pictures()))
    apart = (dino(pictures(40, 40)) - plain(pictures(40, 40))).abs().max()
    assert 0 < float(apart) < 0.5


def test_positions_are_read_a_little_apart():
    positions = torch.randn(1, 1 + 16, 8)
    assert dino_positions(positions, height=4, width=4) is positions
    found = dino_positions(positions, height=6, width=5)
    assert found.shape == (1, 31, 8)
    torch.testing.assert_close(found[:, 0], positions[:, 0])
    grid = positions[:, 1:].view(1, 4, 4, 8).permute(0, 3, 1, 2)
    exact = F.interpolate(grid, size=(6, 5), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    assert not torch.allclose(found[:, 1:], exact, atol=1e-4)
    assert float((found[:, 1:] - exact).abs().max()) < 0.3


def test_keys_are_those_of_the_last_block():
    trunk = small(facet="keys")
    images = pictures()
    kept = []
    trunk.vit.blocks[-1].norm1.register_forward_hook(lambda module, inputs, output: kept.append(output))
    found = trunk(images)
    keys = trunk.vit.blocks[-1].attn.qkv(kept[0])[:, 1:, 24:48]
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), keys)


def test_nothing_learns_or_drops():
    trunk = small()
    assert not trunk.training
    assert not any(parameter.requires_grad for parameter in trunk.parameters())


def test_sides_that_are_no_whole_patches_are_refused():
    with pytest.raises(ModelError) as error:
        small()(pictures(30, 32))
    assert error.value.found == "pictures of 30 x 32 pixels"
    assert "multiples of 8" in error.value.allowed
    with pytest.raises(ModelError, match="pictures of 4 x 4 pixels"):
        small()(pictures(4, 4))


def test_what_is_no_vit_is_refused():
    with pytest.raises(ModelError) as error:
        build_vit("resnet18", {})
    assert "the trunk resnet18" in error.value.found
    assert "encode.trunk.source: backbone" in error.value.fix
    with pytest.raises(ModelError, match="no backbone `vit_of_nobody`"):
        build_vit("vit_of_nobody", {})


def test_readings_that_a_vit_does_not_have_are_refused():
    registers = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=56, **SMALL)
    with pytest.raises(ModelError, match="positions: dino") as error:
        VitTrunk(registers, facet="features", positions="dino", **STATISTICS)
    assert "one class token" in error.value.allowed
