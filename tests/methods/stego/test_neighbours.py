"""Exact neighbours, in blocks."""

from unittest.mock import patch

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from lexiseg.errors import DataError
from lexiseg.methods.stego.neighbours import nearest_neighbours, pool


def pooled(count, *, seed=0):
    return pool(torch.randn(count, 6, 2, 3, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("block", [2**24, 100])
def test_neighbours_are_those_of_scikit_learn(block):
    vectors = pooled(50)
    with patch("lexiseg.methods.stego.neighbours._BLOCK_VALUES", block):
        numbers, cosines = nearest_neighbours(vectors, count=7)
    search = NearestNeighbors(n_neighbors=8, metric="cosine", algorithm="brute").fit(vectors.numpy())
    distances, expected = search.kneighbors(vectors.numpy())
    assert torch.equal(numbers, torch.from_numpy(expected))
    torch.testing.assert_close(cosines, 1 - torch.from_numpy(distances).float(), rtol=1e-4, atol=1e-5)


def test_a_picture_comes_before_its_copies():
    vectors = pooled(6).repeat(2, 1)
    numbers, cosines = nearest_neighbours(vectors, count=2)
    assert torch.equal(numbers[:, 0], torch.arange(12))
    assert torch.equal(numbers[:6, 1], torch.arange(6, 12))
    torch.testing.assert_close(cosines[:, :2], torch.ones(12, 2))


@pytest.mark.parametrize(("count", "found"), [(7, "7 pictures"), (1, "1 picture ")])
def test_fewer_pictures_than_neighbours_are_refused(count, found):
    with pytest.raises(DataError) as error:
        nearest_neighbours(pooled(count), count=7)
    assert found in error.value.found
    assert "at least 8 pictures" in error.value.allowed
    assert "stego.neighbours.count" in error.value.fix


def test_constant_pictures_have_finite_neighbours():
    numbers, cosines = nearest_neighbours(pool(torch.zeros(9, 4, 2, 2)), count=3)
    assert bool(torch.isfinite(cosines).all())
    assert torch.equal(numbers[:, 0], torch.arange(9))
