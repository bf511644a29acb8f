"""The grounder and the network around it, on small towers of open_clip and on the tiny CLIP."""

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import open_clip_model, tiny_clip

from lexiseg.encoders.clip import dense_embeddings
from lexiseg.methods.tcl.masks import unit
from lexiseg.methods.tcl.model import TCL


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["tiny", "open_clip"])
def visual(request, tmp_path):
    """An image tower for 32 x 32 pixels in patches of eight."""
    if request.param == "tiny":
        return tiny_clip(image_size=32)[0].visual
    return open_clip_model(tmp_path).visual


def test_untrained_it_is_the_dense_clip_four_times_as_fine(visual):
    images = noise(2, 3, 32, 32)
    model = TCL(visual)
    found = unit(model.embed(images), dim=1)
    expected = dense_embeddings(visual, images)
    assert found.shape == (2, 24, 16, 16)
    torch.testing.assert_close(found, F.interpolate(expected, scale_factor=4, mode="nearest"))


def test_pictures_of_any_sides(visual):
    model, text = TCL(visual), noise(3, 24)
    embedding = model.embed(noise(1, 3, 24, 48))
    assert embedding.shape == (1, 24, 12, 24)
    assert model.grounder.mask_logits(embedding, text).shape == (1, 3, 12, 24)
    assert model.knowledge(*model.tokens(noise(1, 3, 24, 48)), text).shape == (1, 3, 3, 6)


def test_the_knowledge_is_that_of_the_untrained_tower(visual):
    images, text, model = noise(1, 3, 32, 32), noise(3, 24, seed=1), TCL(visual)
    before = model.knowledge(*model.tokens(images), text)
    cosines = torch.einsum("bchw,nc->bnhw", dense_embeddings(visual, images), F.normalize(text, dim=1))
    torch.testing.assert_close(before, (10 * (cosines - 0.25)).sigmoid())
    with torch.no_grad():
        for parameter in model.grounder.parameters():
            parameter.add_(1.0)
    assert torch.equal(model.knowledge(*model.tokens(images), text), before)


def test_what_learns(visual):
    model = TCL(visual).train()
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(name.startswith("grounder.") or name.endswith("_log_scale") for name in learning)
    assert {"grounder.proj", "grounder.sim_to_mask.scale", "image_log_scale"} <= learning
    assert any(name.startswith("grounder.block.") for name in learning)
    assert not model.visual.training
    assert model.grounder.training


def test_the_tower_stays_as_it_is(visual):
    before = {name: value.clone() for name, value in visual.state_dict().items()}
    model = TCL(visual).train()
    images, text = noise(2, 3, 32, 32), noise(2, 24, seed=1)
    logits = model.grounder.mask_logits(model.embed(images), text)[[0, 1], [0, 1], None]
    uniform = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1))
    loss = model.embed_masked(images, logits, uniform).sum()
    # Through the frozen tower, and through the straight-through mask, into the grounder.
    assert torch.autograd.grad(loss, model.grounder.proj, retain_graph=True)[0].any()
    loss.backward()
    assert all(parameter.grad is None for parameter in model.visual.parameters())
    torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0).step()
    after = model.visual.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_masked_out_pixels_are_the_mean_colour(visual):
    model, images = TCL(visual), noise(1, 3, 32, 32)
    logits = torch.full((1, 1, 4, 4), -5.0)
    logits[..., :2] = 5.0
    half = images.clone()
    half[..., 16:] = 0
    torch.testing.assert_close(model.embed_masked(images, logits, None), visual(half))
    larger = torch.full((1, 1, 6, 6), 5.0)  # positions are resized
    assert torch.isfinite(model.embed_masked(noise(1, 3, 48, 48), larger, None)).all()
