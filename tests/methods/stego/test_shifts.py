"""Shifts of the loss without labels."""

import pytest
import torch

from lexiseg.methods.stego.shifts import exceeded_by, otsu, suggest_shifts


def two_groups(low, high, *, share=0.5, count=4000, seed=0):
    rng = torch.Generator().manual_seed(seed)
    small = int(count * share)
    return torch.cat(
        [low + 0.05 * torch.randn(small, generator=rng), high + 0.05 * torch.randn(count - small, generator=rng)]
    )


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_border_lies_between_two_groups(share):
    assert 0.2 < otsu(two_groups(0.0, 0.8, share=share)) < 0.6


def test_a_flat_sample_has_its_value_for_border():
    assert otsu(torch.full((50,), 0.4)) == pytest.approx(0.4)


def test_the_share_of_values_that_exceed_a_quantile():
    values = torch.arange(1000.0)
    assert float((values > exceeded_by(values, 0.02)).float().mean()) == pytest.approx(0.02, abs=2e-3)
    assert exceeded_by(torch.tensor([3.0]), 0.5) == 3.0


def test_the_rules_and_their_reasons():
    self_, knn = two_groups(0.1, 0.7), two_groups(0.0, 0.5, seed=1)
    random = torch.rand(5000, generator=torch.Generator().manual_seed(2))
    found = suggest_shifts(self_, knn, random)
    assert found.self_ == pytest.approx(otsu(self_) - 0.05)
    assert found.knn == pytest.approx(otsu(knn) - 0.05)
    assert found.random == pytest.approx(0.98, abs=0.01)
    assert found.reason[0] == "0.05 below the border of the self pairs' two groups"
    assert found.reason[2] == "2 % of the random pairs exceed it"
    other = suggest_shifts(self_, knn, random, rule="quantile")
    assert float((self_ > other.self_).float().mean()) == pytest.approx(0.7, abs=0.01)
    assert other.reason[1] == "70 % of the neighbour pairs exceed it"


def test_groups_that_are_farther_apart_move_the_border():
    random = torch.zeros(100)
    near = suggest_shifts(two_groups(0.0, 0.4), two_groups(0.0, 0.4), random)
    far = suggest_shifts(two_groups(0.3, 0.9), two_groups(0.3, 0.9), random)
    assert far.self_ > near.self_ + 0.2
