"""Cluster centres, the linear layer and projections."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA

from lexiseg.errors import DataError
from lexiseg.methods.stego.probes import ClusterProbe, Project, cluster_cosines, kmeans, linear_loss


def blobs(count=60, *, noise=0.05, seed=0):
    """Tokens around five directions, and which."""
    rng = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(5, 8, generator=rng), dim=1)
    owner = torch.arange(5).repeat_interleave(count)
    return centres[owner] + noise * torch.randn(len(owner), 8, generator=rng), owner


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_kmeans_finds_the_directions_whatever_the_lengths():
    tokens, owner = blobs()
    tokens = tokens * (0.1 + 5 * torch.rand(len(tokens), 1, generator=rng(1)))
    centres, objective = kmeans(tokens, clusters=5, restarts=8, generator=rng())
    found = (F.normalize(tokens, dim=1) @ centres.T).argmax(dim=1)
    groups = [set(found[owner == number].tolist()) for number in range(5)]
    assert all(len(group) == 1 for group in groups)
    assert len(set.union(*groups)) == 5
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(5))
    assert objective == pytest.approx(float((F.normalize(tokens, dim=1) @ centres.T).amax(dim=1).mean()))


def test_the_best_of_more_restarts_is_no_worse():
    tokens, _ = blobs(noise=0.6)
    few = kmeans(tokens, clusters=7, restarts=1, generator=rng())[1]
    assert kmeans(tokens, clusters=7, restarts=10, generator=rng())[1] >= few


def test_a_centre_that_loses_its_tokens_begins_anew():
    tokens = torch.eye(6).repeat(10, 1)
    centres, objective = kmeans(tokens, clusters=6, restarts=4, generator=rng())
    assert objective == pytest.approx(1.0)
    assert len((tokens @ centres.T).argmax(dim=1).unique()) == 6


def test_the_same_seed_gives_the_same_centres():
    tokens, _ = blobs(noise=0.6)
    first = kmeans(tokens, clusters=5, restarts=3, generator=rng(4))[0]
    assert torch.equal(first, kmeans(tokens, clusters=5, restarts=3, generator=rng(4))[0])


def test_more_clusters_than_different_tokens_are_refused():
    with pytest.raises(DataError) as error:
        kmeans(torch.ones(100, 4), clusters=3, restarts=1)
    assert error.value.found == "1 different feature vectors for 3 clusters"
    assert "at least as many as clusters" in error.value.allowed
    assert "stego.probe.clusters" in error.value.fix


def test_the_gradient_probe_finds_the_directions_too():
    tokens, owner = blobs()
    codes = tokens.T[None, :, :, None]
    torch.manual_seed(1)
    probe = ClusterProbe(8, 5)
    optimiser = torch.optim.Adam(probe.parameters(), lr=0.05)
    losses = []
    for _ in range(200):
        optimiser.zero_grad()
        loss = probe.loss(codes)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    found = probe.cosines(codes)[0, :, :, 0].argmax(dim=0)
    assert all(len(found[owner == number].unique()) == 1 for number in range(5))


def test_shares_make_the_soft_loss():
    codes = torch.randn(2, 4, 3, 3)
    probe = ClusterProbe(4, 6)
    cosines = cluster_cosines(codes, probe.centres)
    expected = -((2 * cosines).softmax(1) * cosines).sum(1).mean()
    torch.testing.assert_close(probe.loss(codes, alpha=2.0), expected)


def test_only_labelled_pixels_teach_the_linear_layer():
    probe, codes = torch.nn.Conv2d(4, 3, 1), torch.randn(2, 4, 2, 2)
    labels = torch.full((2, 8, 8), -100)
    labels[0, :4] = 1
    labels[1, 4:] = 7  # beyond the classes
    loss = linear_loss(probe, codes, labels, classes=3)
    logits = F.interpolate(probe(codes), size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(loss, F.cross_entropy(logits[:1, :, :4], labels[:1, :4]))
    nothing = linear_loss(probe, codes, torch.full((2, 8, 8), -100), classes=3)
    assert float(nothing) == 0.0
    nothing.backward()


@pytest.mark.parametrize("kind", ["pca", "whitened"])
def test_projections_are_those_of_scikit_learn(kind):
    tokens = torch.randn(400, 6, generator=rng()) @ torch.diag(torch.tensor([5.0, 3, 2, 1, 0.5, 0.1])) + 3
    project = Project.fit(tokens, kind=kind, dim=4)
    found = project(tokens.T[None, :, :, None])[0, :, :, 0].T
    expected = torch.from_numpy(PCA(4, whiten=kind == "whitened").fit_transform(tokens.double().numpy()))
    torch.testing.assert_close(found.abs().double(), expected.abs(), rtol=1e-3, atol=1e-3)


def test_axes_along_which_nothing_varies_are_left_out():
    tokens = torch.cat([torch.randn(100, 2), torch.ones(100, 3)], dim=1)
    project = Project.fit(tokens, kind="whitened", dim=5)
    assert project(tokens.T[None, :, :, None]).shape == (1, 2, 100, 1)
