from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lexiseg.methods.lseg.decoder import FusionBlock, FusionDecoder, ResidualConvUnit


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def with_statistics(module: Any) -> Any:
    """Batch norms that are no identity."""
    norms: list[Any] = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
    return module.eval()


@torch.inference_mode()
def test_the_residual_is_not_activated():
    unit, x = with_statistics(ResidualConvUnit(4)), torch.randn(1, 4, 5, 6)
    expected = x + unit.bn2(unit.conv2(F.relu(unit.bn1(unit.conv1(F.relu(x))))))
    before = x.clone()
    assert torch.equal(unit(x), expected)
    assert torch.equal(x, before)
    assert unit.conv1.bias is None
    assert unit.conv2.bias is None


@torch.inference_mode()
def test_order_of_a_fusion_block():
    block = with_statistics(FusionBlock(4, has_skip=True))
    path, skip = torch.randn(1, 4, 3, 5), torch.randn(1, 4, 3, 5)
    merged = block.unit2(path + block.unit1(skip))
    # The 1x1 convolution comes after upsampling.
    expected = block.out_conv(F.interpolate(merged, scale_factor=2, mode="bilinear", align_corners=True))
    assert torch.allclose(block(path, skip, size=(6, 10)), expected, atol=1e-6)
    assert block.out_conv.bias is not None


@torch.inference_mode()
def test_the_coarsest_block_has_no_skip():
    block = with_statistics(FusionBlock(4, has_skip=False))
    path = torch.randn(1, 4, 3, 5)
    expected = block.out_conv(F.interpolate(block.unit2(path), size=(6, 10), mode="bilinear", align_corners=True))
    assert torch.allclose(block(path, None, size=(6, 10)), expected, atol=1e-6)
    assert not any(name.startswith("unit1") for name in block.state_dict())


def maps(height, width, *, channels=(3, 5, 7, 9), strides=(4, 8, 16, 32)):
    return [torch.randn(1, c, -(-height // s), -(-width // s)) for c, s in zip(channels, strides, strict=True)]


@torch.inference_mode()
def test_the_whole_decoder():
    decoder = with_statistics(FusionDecoder((3, 5, 7, 9), features=4))
    given = maps(64, 96)
    skips = [layer(x) for layer, x in zip(decoder.layer_rn, given, strict=True)]
    path = decoder.refinenet[3](skips[3], None, size=(4, 6))
    for level, size in ((2, (8, 12)), (1, (16, 24)), (0, (32, 48))):
        path = decoder.refinenet[level](path, skips[level], size=size)
    found = decoder(given, image_size=(64, 96))
    assert torch.equal(found, path)
    assert found.shape == (1, 4, 32, 48)
    assert all(layer.bias is None for layer in decoder.layer_rn)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 160), (61, 75), (100, 36), (33, 31), (1, 1)])
def test_half_of_any_size(height, width):
    decoder = FusionDecoder((3, 5, 7, 9), features=4).eval()
    found = decoder(maps(height, width), image_size=(height, width))
    assert found.shape == (1, 4, -(-height // 2), -(-width // 2))


def test_maps_of_one_stride():
    # The tiny CLIP gives strides 2, 4, 8 and 8.
    decoder = FusionDecoder((3, 5, 7, 9), features=4).eval()
    assert decoder(maps(32, 32, strides=(2, 4, 8, 8)), image_size=(32, 32)).shape == (1, 4, 16, 16)


def test_every_weight_has_a_gradient():
    decoder = FusionDecoder((3, 5, 7, 9), features=4)
    decoder(maps(64, 64), image_size=(64, 64)).sum().backward()
    assert [name for name, value in decoder.named_parameters() if value.grad is None] == []
