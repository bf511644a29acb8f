"""Exact neighbours, in blocks or by faiss."""

import sys
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors

from lexiseg.errors import DataError, SettingsError
from lexiseg.methods.stego.neighbours import nearest_neighbours, pool, read_neighbours, save_neighbours


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


@pytest.mark.parametrize("shape", [(50, 6), (300, 40)])
def test_faiss_finds_the_same(shape):
    pytest.importorskip("faiss")
    vectors = F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(1)), dim=1)
    exact, faiss = (nearest_neighbours(vectors, count=7, backend=backend) for backend in ("exact", "faiss"))
    assert torch.equal(faiss[0], exact[0])
    assert faiss[0].dtype == exact[0].dtype
    torch.testing.assert_close(faiss[1], exact[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("copies", "count"), [(2, 1), (2, 3), (5, 2), (5, 4)])
def test_with_faiss_too_a_picture_comes_before_its_copies(copies, count):
    """With more copies than neighbours it is not even among those that faiss finds."""
    pytest.importorskip("faiss")
    vectors = pooled(6).repeat(copies, 1)
    exact, faiss = (nearest_neighbours(vectors, count=count, backend=backend) for backend in ("exact", "faiss"))
    torch.testing.assert_close(faiss[1], exact[1], rtol=0, atol=1e-5)
    own = torch.arange(len(vectors))
    assert torch.equal(faiss[0][:, 0], own)
    assert all(len(set(row)) == count + 1 for row in faiss[0].tolist())
    # Which of several copies comes first is open; that they come before all others is not.
    near = min(count, copies - 1)
    assert torch.equal(faiss[0][:, : near + 1] % 6, (own % 6)[:, None].expand(-1, near + 1))


def test_constant_pictures_have_finite_neighbours_with_faiss():
    pytest.importorskip("faiss")
    numbers, cosines = nearest_neighbours(pool(torch.zeros(9, 4, 2, 2)), count=3, backend="faiss")
    assert bool(torch.isfinite(cosines).all())
    assert torch.equal(numbers[:, 0], torch.arange(9))
    assert all(len(set(row)) == 4 for row in numbers.tolist())


def test_faiss_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(SettingsError) as error:
        nearest_neighbours(pooled(9), count=3, backend="faiss")
    assert "faiss is not installed" in error.value.found
    assert "exact" in error.value.allowed
    assert ".[faiss]" in error.value.fix


def test_saved_neighbours_are_read(tmp_path):
    numbers, cosines = nearest_neighbours(pooled(9), count=3)
    save_neighbours(tmp_path, numbers[:, 1:], cosines[:, 1:])
    found = read_neighbours(tmp_path)
    assert found.dtype == torch.int64
    assert torch.equal(found, numbers[:, 1:])
    with pytest.raises(DataError) as error:
        read_neighbours(tmp_path / "nowhere")
    assert "no neighbours.safetensors" in error.value.found
    assert error.value.allowed == "finished neighbours"
    assert "dvc repro stego-neighbours" in error.value.fix
