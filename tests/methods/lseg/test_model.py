from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import small_vit, tiny_clip

from lexiseg.encoders.clip import dense_embeddings
from lexiseg.encoders.pyramid import CnnBackbone, TinyBackbone, VitBackbone
from lexiseg.errors import ModelError
from lexiseg.methods.lseg.model import LSeg
from lexiseg.methods.lseg.regularisation import SpatialRegularisation

DIM = 24


def model(kind="vit", **changes):
    torch.manual_seed(0)
    if kind == "vit":
        backbone = VitBackbone(small_vit(), readout="project")
    elif kind == "cnn":
        backbone = CnnBackbone("mobilenetv3_small_050", options={})
    else:
        backbone = TinyBackbone(tiny_clip()[0].visual)
    return LSeg(backbone, **{"text_dim": DIM, "features": 8, "temperature": 0.07, **changes}).eval()


def vectors(count):
    generator = torch.Generator().manual_seed(1)
    return F.normalize(torch.randn(count, DIM, generator=generator), dim=1)


def pictures(height=64, width=64):
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(2))


def regularisation(block: Any = "bottleneck", depth=2):
    torch.manual_seed(3)
    return SpatialRegularisation(block, depth=depth, activation="lrelu")


@torch.inference_mode()
def test_unit_vectors_at_half_resolution():
    embedded = model().embed(pictures(64, 96))
    assert embedded.shape == (1, DIM, 32, 48)
    assert torch.allclose(embedded.norm(dim=1), torch.ones(1, 32, 48), atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("count", [2, 40])
def test_every_picture_may_have_labels_of_its_own(count):
    network = model(regularisation=regularisation())
    images, text = torch.cat([pictures(), pictures().flip(-1)]), torch.stack([vectors(count), vectors(count).flip(0)])
    together = network(images, text)
    for position in range(2):
        alone = network(images[position : position + 1], text[position])
        torch.testing.assert_close(together[position : position + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("block", [None, "bottleneck", "depthwise"])
def test_scores_are_the_same_with_and_without_gradients(block):
    network, text = model(regularisation=block and regularisation(block, 3)), vectors(9)
    with torch.inference_mode():
        in_place = network(pictures(), text)
    torch.testing.assert_close(in_place, network(pictures(), text).detach())


@torch.inference_mode()
def test_scores_are_scaled_cosines():
    network, text = model(), vectors(5)
    embedded = network.embed(pictures())
    scores = network.score(embedded, text)
    assert torch.allclose(scores, torch.einsum("bchw,nc->bnhw", embedded, text) / 0.07, atol=1e-5)
    assert scores.abs().max() <= 1 / 0.07 + 1e-4
    assert network.scale == pytest.approx(14.2857, abs=1e-4)


def test_the_temperature_is_a_constant():
    network = model(temperature=0.1)
    assert not [name for name in network.state_dict() if "scale" in name or "temperature" in name]
    assert network.scale == pytest.approx(10)
    warm, cold = model(temperature=0.1), model(temperature=0.05)
    assert torch.allclose(2 * warm(pictures(), vectors(3)), cold(pictures(), vectors(3)), atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("block", [None, "bottleneck", "depthwise"])
def test_scores_then_blocks_then_upsampling(block):
    blocks = regularisation(block) if block else None
    network, text, images = model(regularisation=blocks), vectors(4), pictures(32, 64)
    scores = network.scale * torch.einsum("bchw,nc->bnhw", network.embed(images), text)
    scores = scores if blocks is None else blocks(scores)
    expected = F.interpolate(scores, size=(32, 64), mode="bilinear", align_corners=True)
    assert torch.allclose(network(images, text), expected, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("block", [None, "bottleneck", "depthwise"])
def test_labels_may_change_their_order(block):
    network = model(regularisation=regularisation(block) if block else None)
    text, order = vectors(7), torch.tensor([3, 6, 0, 5, 1, 2, 4])
    assert torch.allclose(network(pictures(), text)[:, order], network(pictures(), text[order]), atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("block", [None, "depthwise"])
def test_a_label_scores_the_same_beside_any_others(block):
    network = model(regularisation=regularisation(block) if block else None)
    text = vectors(9)
    alone = network(pictures(), text[2:3])
    assert alone.shape == (1, 1, 64, 64)
    assert torch.allclose(network(pictures(), text)[:, 2:3], alone, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("count", [1, 2, 300])
def test_any_number_of_labels(count):
    network = model(regularisation=regularisation())
    assert network(pictures(), vectors(count)).shape == (1, count, 64, 64)
    assert sum(value.numel() for value in network.parameters()) == sum(
        value.numel() for value in model(regularisation=regularisation()).parameters()
    )


@pytest.mark.parametrize(
    ("kind", "height", "width"),
    [
        ("vit", 48, 80),
        ("vit", 16, 16),
        ("cnn", 64, 96),
        ("cnn", 75, 61),
        ("cnn", 33, 100),
        ("tiny", 24, 40),
        ("tiny", 20, 12),
    ],
)
def test_any_shape(kind, height, width):
    network, images = model(kind), pictures(height, width)
    assert network.embed(images).shape == (1, DIM, -(-height // 2), -(-width // 2))
    assert network(images, vectors(2)).shape == (1, 2, height, width)


@torch.inference_mode()
def test_pictures_of_a_batch_do_not_touch_each_other():
    network, text = model(), vectors(3)
    images = torch.cat([pictures(), -pictures()])
    assert torch.allclose(network(images, text)[1:], network(images[1:], text), atol=1e-5)


def test_only_what_the_paper_leaves_out_has_no_gradient():
    network = model(regularisation=regularisation()).train()
    network(torch.randn(2, 3, 64, 64), vectors(3)).square().sum().backward()
    unused = [name for name, value in network.named_parameters() if value.grad is None]
    assert unused == ["backbone.vit.norm.weight", "backbone.vit.norm.bias"]


# ---- the option of the tiny world --------------------------------------------------------------------------------


@torch.inference_mode()
def test_with_the_residual_training_starts_at_the_zero_shot_result():
    network, images = model("tiny", clip_residual=True), pictures(16, 24)
    assert (network.head.weight == 0).all()
    dense = dense_embeddings(network.backbone.visual, images)  # type: ignore[arg-type]
    expected = F.interpolate(dense, size=(8, 12), mode="bilinear", align_corners=False)
    assert torch.allclose(network.embed(images), F.normalize(expected, dim=1), atol=1e-5)


@torch.inference_mode()
def test_the_residual_weighs_three_times_the_head():
    network, images = model("tiny", clip_residual=True), pictures(16, 16)
    network.head.bias.fill_(0.5)  # type: ignore[union-attr]
    start = F.interpolate(dense_embeddings(network.backbone.visual, images), size=(8, 8), mode="bilinear")  # type: ignore[arg-type]
    expected = F.normalize(0.5 + 3 * F.normalize(start, dim=1), dim=1)
    assert torch.allclose(network.embed(images), expected, atol=1e-5)


def test_the_papers_network_has_no_residual():
    network = model("tiny")
    assert (network.head.weight != 0).any()
    assert not network.clip_residual


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_a_residual_needs_a_clip_tower(kind):
    with pytest.raises(ModelError) as caught:
        model(kind, clip_residual=True)
    assert "`lseg.model.clip_residual: true`" in caught.value.found
    assert "`encode.backbone.source` is clip" in caught.value.allowed
    assert caught.value.fix


def test_frozen_norms_of_the_backbone_stay_while_the_decoder_learns():
    backbone = CnnBackbone("resnet10t", options={})
    model = LSeg(backbone, text_dim=8, features=8, temperature=0.07, freeze_norm=True).train()
    norms = [part for part in backbone.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(part.training for part in norms)
    assert model.decoder.training
    before = {name: value.clone() for name, value in norms[0].named_buffers()}
    model(torch.randn(2, 3, 64, 64), torch.nn.functional.normalize(torch.randn(3, 8), dim=-1))
    assert all(torch.equal(value, before[name]) for name, value in norms[0].named_buffers())
