"""The shortcut through the head gives the cosines of the embeddings, and their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lexiseg.methods.lseg.correlation import correlate, correlate_through_head


def test_the_shortcut_equals_the_embeddings():
    torch.manual_seed(0)
    features = torch.randn(2, 6, 5, 7, dtype=torch.float64, requires_grad=True)
    head = nn.Conv2d(6, 40, 1).double()
    text = F.normalize(torch.randn(3, 40, dtype=torch.float64), dim=-1)
    long = correlate(F.normalize(head(features), dim=1), text)
    short = correlate_through_head(features, head, text)
    torch.testing.assert_close(short, long)
    assert short.abs().max() <= 1
    goal = torch.randn_like(long)
    inputs = [features, *head.parameters()]
    wanted = torch.autograd.grad((long * goal).sum(), inputs)
    found = torch.autograd.grad((short * goal).sum(), inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_head_of_zeros_gives_zeros_and_no_nan():
    head = nn.Conv2d(4, 8, 1)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    features = torch.randn(1, 4, 2, 2, requires_grad=True)
    cosines = correlate_through_head(features, head, F.normalize(torch.randn(2, 8), dim=-1))
    cosines.sum().backward()
    assert torch.equal(cosines, torch.zeros(1, 2, 2, 2))
    assert features.grad is not None
    assert bool(torch.isfinite(features.grad).all())


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("size", "error"), [(0.1, 1e-4), (0.03, 1e-3), (0.001, 0.2)])
def test_terms_that_cancel_do_not_blow_up(mixed, size, error):
    """Where W f and -b nearly meet, the norm is what rounding left of it; in bfloat16 nothing would be left."""
    torch.manual_seed(0)
    head, middle = nn.Conv2d(16, 64, 1), torch.randn(16)
    assert head.bias is not None
    head.bias.data.copy_(-(head.weight.data[:, :, 0, 0] @ middle))
    features = middle[None, :, None, None] + size * torch.randn(1, 16, 8, 8)
    text = F.normalize(torch.randn(5, 64), dim=-1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        found = correlate_through_head(features, head, text)
        exact = correlate(F.normalize(head.double()(features.double()), dim=1), text.double())
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max()) < error
