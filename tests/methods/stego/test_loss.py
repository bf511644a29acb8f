"""The correspondence loss against plain formulas, and what its options are for."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lexiseg.methods.stego.loss import (
    centred,
    correspondence_terms,
    correspondences,
    pair_losses,
    random_points,
    sample_points,
    super_permutation,
    unit_rows,
)

SHIFTS = (0.18, 0.12, 0.46)


def batch(*, size=4, points=9, seed=0) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(size, generator=rng) for _ in range(2)]
    return {
        "features": torch.randn(size, 6, 5, 7, generator=rng),
        "codes": torch.randn(size, 3, 5, 7, generator=rng).requires_grad_(),
        "neighbour_features": torch.randn(size, 6, 5, 7, generator=rng),
        "neighbour_codes": torch.randn(size, 3, 5, 7, generator=rng).requires_grad_(),
        "points": random_points(size, points, generator=rng),
        "partner_points": random_points(size, points, generator=rng),
        "partners": torch.stack([super_permutation(order) for order in orders]),
    }


def test_points_are_sampled_as_by_grid_sample():
    maps, points = torch.randn(3, 4, 5, 7), 1.2 * random_points(3, 20)  # a few beyond the border
    expected = F.grid_sample(maps, points[:, :, None], padding_mode="border", align_corners=True)[..., 0]
    torch.testing.assert_close(sample_points(maps, points), expected.transpose(1, 2))
    chosen = torch.tensor([2, 0, 2])
    expected = F.grid_sample(maps[chosen], points[:, :, None], padding_mode="border", align_corners=True)[..., 0]
    torch.testing.assert_close(sample_points(maps, points, pictures=chosen), expected.transpose(1, 2))


def test_a_map_of_one_cell_has_one_value_everywhere():
    maps = torch.randn(2, 4, 1, 1)
    found = sample_points(maps, random_points(2, 5))
    torch.testing.assert_close(found, maps.flatten(2).transpose(1, 2).expand(2, 5, 4))


def test_terms_are_means_over_the_pairs_of_each_kind():
    given = batch()
    terms = correspondence_terms(**given, shifts=SHIFTS, centring="paper")

    def term(features, codes, shift):
        here = [unit_rows(sample_points(given[name], given["points"])) for name in ("features", "codes")]
        alike = correspondences(here[0], unit_rows(features))
        close = correspondences(here[1], unit_rows(codes))
        return (-close.clamp(min=0) * (alike - alike.mean(dim=2, keepdim=True) - shift)).mean()

    own = [sample_points(given[name], given["points"]) for name in ("features", "codes")]
    near = [sample_points(given[f"neighbour_{name}"], given["partner_points"]) for name in ("features", "codes")]
    torch.testing.assert_close(terms.self_, term(own[0], own[1], SHIFTS[0]))
    torch.testing.assert_close(terms.knn, term(near[0], near[1], SHIFTS[1]))
    places = given["partner_points"]
    random = [
        term(sample_points(given["features"][row], places), sample_points(given["codes"][row], places), SHIFTS[2])
        for row in given["partners"]
    ]
    torch.testing.assert_close(terms.random, sum(random) / 2)


def test_the_gradient_is_that_of_the_terms():
    given = batch(size=2, points=3, seed=1)
    codes = given.pop("codes").detach().double()
    others = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    others["neighbour_codes"] = others["neighbour_codes"].detach()

    def loss(values):
        terms = correspondence_terms(codes=values, **others, shifts=SHIFTS, clamp=False)
        return terms.self_ + 2 * terms.knn + 3 * terms.random

    assert torch.autograd.gradcheck(loss, codes.requires_grad_())


def test_no_gradient_flows_into_features():
    given = batch()
    given["features"].requires_grad_()
    terms = correspondence_terms(**given, shifts=SHIFTS)
    (terms.self_ + terms.knn + terms.random).backward()
    assert given["features"].grad is None
    assert float(given["codes"].grad.abs().sum()) > 0


def test_centring_of_the_paper_and_of_the_code():
    values = torch.rand(2, 3, 4)
    paper = centred(values, "paper")
    torch.testing.assert_close(paper.mean(dim=2), torch.zeros(2, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(centred(values, "code"), paper + values.mean())
    assert centred(values, "none") is values


def test_clamp_and_stabilise_bound_the_codes():
    codes, features = torch.tensor([[[-0.5, 0.3, 0.95]]]), torch.tensor([[[1.0, 1.0, 1.0]]])
    how: Any = {"shift": 0.5, "centring": "none"}
    torch.testing.assert_close(pair_losses(features, codes, **how), torch.tensor([[[0.0, -0.15, -0.475]]]))
    free = pair_losses(features, codes, clamp=False, **how)
    torch.testing.assert_close(free, torch.tensor([[[0.25, -0.15, -0.475]]]))
    both = pair_losses(features, codes, stabilise=True, **how)
    torch.testing.assert_close(both, torch.tensor([[[0.0, -0.15, -0.4]]]))


def test_features_without_length_give_finite_terms():
    given = batch()
    given["features"] = torch.zeros_like(given["features"])
    terms = correspondence_terms(**given, shifts=SHIFTS)
    assert all(bool(torch.isfinite(term)) for term in (terms.self_, terms.knn, terms.random))


@pytest.mark.parametrize("size", [2, 3, 7])
def test_no_picture_is_its_own_random_partner(size):
    for seed in range(20):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        partners = super_permutation(order)
        assert not bool((partners == torch.arange(size)).any())
        moved = order == torch.arange(size)
        assert torch.equal(partners[~moved], order[~moved])


def test_a_batch_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2 pictures in a batch, got 1"):
        super_permutation(torch.tensor([0]))
