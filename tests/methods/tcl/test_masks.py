import pytest
import torch
import torch.nn.functional as F

from lexiseg.methods.tcl.masks import SimToMask, hard_mask, pixel_text_cosines, unit


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_cosines_of_pixels_and_texts():
    embedding, text = noise(2, 6, 3, 4), noise(5, 6, seed=1)
    found = pixel_text_cosines(embedding, text)
    expected = F.cosine_similarity(embedding[:, None], text[None, :, :, None, None], dim=2)
    torch.testing.assert_close(found, expected)
    assert found.shape == (2, 5, 3, 4)


def test_embeddings_without_length():
    zero = torch.zeros(1, 6, 2, 2, requires_grad=True)
    cosines = pixel_text_cosines(zero, noise(3, 6))
    (gradient,) = torch.autograd.grad(cosines.sum(), zero)
    assert not cosines.any()
    assert torch.isfinite(gradient).all()
    assert unit(torch.full((1, 4), 1e-8)).max() == pytest.approx(1e-2)  # 1e-8 over the smallest norm, 1e-6


def test_a_half_is_at_a_cosine_of_a_quarter():
    to_mask = SimToMask()
    assert to_mask(torch.tensor(0.25)).sigmoid().item() == pytest.approx(0.5)
    assert to_mask(torch.tensor(0.5)).sigmoid().item() == pytest.approx(1 / (1 + torch.e**-2.5))


def test_a_hard_mask_is_zeros_and_ones_with_a_soft_gradient():
    logits = noise(4, 1, 5, 5).requires_grad_()
    uniform = torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(2))
    mask = hard_mask(logits, uniform, temperature=0.5)
    assert set(mask.detach().round(decimals=6).unique().tolist()) == {0.0, 1.0}
    mask.sum().backward()
    soft = ((logits + uniform.log() - (1 - uniform).log()) / 0.5).sigmoid()
    torch.testing.assert_close(logits.grad, (soft * (1 - soft) / 0.5).detach())


def test_how_often_a_pixel_is_on_is_its_probability():
    logits = torch.tensor([-2.0, 0.0, 1.0])[:, None].expand(3, 20_000)
    uniform = torch.rand(3, 20_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hard_mask(logits, uniform).mean(dim=1), logits[:, 0].sigmoid(), atol=0.01, rtol=0)


def test_draws_at_the_ends_give_no_nan():
    logits = torch.zeros(2, requires_grad=True)
    mask = hard_mask(logits, torch.tensor([0.0, 1.0]))
    (gradient,) = torch.autograd.grad(mask.sum(), logits)
    assert mask.tolist() == [0.0, 1.0]
    assert torch.isfinite(gradient).all()


def test_without_noise_there_is_no_gradient():
    logits = noise(3, 3).requires_grad_()
    mask = hard_mask(logits, None)
    assert not mask.requires_grad
    assert torch.equal(mask, (logits > 0).float())


def test_the_gradient_of_the_cosines():
    rng = torch.Generator().manual_seed(0)
    embedding = torch.randn(2, 4, 3, 2, generator=rng).double().requires_grad_()
    text = torch.randn(3, 4, generator=rng).double().requires_grad_()
    assert torch.autograd.gradcheck(pixel_text_cosines, (embedding, text))
    # A pixel of nothing: its norm is the smallest one, a constant.
    with torch.no_grad():
        embedding[0, :, 0, 0] = 0
    weight = torch.randn(2, 3, 3, 2, generator=rng).double()
    plain = F.normalize(embedding, dim=1, eps=1e-6), F.normalize(text, dim=1, eps=1e-6)
    expected = torch.autograd.grad((torch.einsum("bchw,nc->bnhw", *plain) * weight).sum(), (embedding, text))
    found = torch.autograd.grad((pixel_text_cosines(embedding, text) * weight).sum(), (embedding, text))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_cosines_learn_in_mixed_precision():
    weight, pixels, text = noise(8, 8).requires_grad_(), noise(2, 8, 3, 3, seed=1), noise(4, 8, seed=2).requires_grad_()

    def gradients():
        embedding = torch.einsum("bchw,cd->bdhw", pixels, weight)
        return torch.autograd.grad(pixel_text_cosines(embedding, text).square().sum(), (weight, text))

    expected = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients()
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.05 * other.norm()
