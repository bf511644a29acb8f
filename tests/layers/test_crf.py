"""The dense CRF against the same inference with whole kernel matrices."""

from dataclasses import replace

import pytest
import torch

from benchmarks.plain import plain_crf
from lexiseg.layers.crf import (
    CrfSettings,
    GaussianFilter,
    HeavyKernelError,
    LatticeFilter,
    NarrowKernelError,
    dense_crf,
)


def scene(height, width, *, labels=4, seed=0):
    """A picture of two flat halves with noise, and shares that are noisy around one label per half."""
    rng = torch.Generator().manual_seed(seed)
    image = torch.full((3, height, width), 60.0)
    image[:, :, width // 2 :] = 180
    image = (image + 3 * torch.randn(image.shape, generator=rng)).clamp(0, 255).to(torch.uint8)
    logits = torch.randn(labels, height, width, generator=rng)
    logits[0, :, : width // 2] += 1
    logits[1, :, width // 2 :] += 1
    return image[None], logits.softmax(dim=0)[None]


def test_agrees_with_exact_inference():
    image, shares = scene(36, 44)
    settings = CrfSettings(bilateral_width=20)
    expected = plain_crf(image, shares, settings)
    found = dense_crf(image, shares, settings)
    assert float((found.argmax(1) == expected.argmax(1)).float().mean()) > 0.99
    assert float((found - expected).abs().mean()) < 0.01
    # Without it, a good part of the pixels has another label.
    assert float((shares.argmax(1) == expected.argmax(1)).float().mean()) < 0.9


@pytest.mark.parametrize("lacking", ["gaussian_weight", "bilateral_weight"])
def test_each_kernel_alone_agrees_with_exact_inference(lacking):
    image, shares = scene(24, 30, seed=3)
    settings = replace(CrfSettings(bilateral_width=20), **{lacking: 0.0})
    found, expected = dense_crf(image, shares, settings), plain_crf(image, shares, settings)
    assert float((found.argmax(1) == expected.argmax(1)).float().mean()) > 0.985


def test_the_gaussian_filter_is_exact():
    rows = torch.rand(2 * 9 * 11, 3)
    total = torch.ones_like(rows)
    GaussianFilter(9, 11, spread=1.3, weight=2.0, device=rows.device).add_to(total, rows)
    place = torch.stack(torch.meshgrid(torch.arange(9.0), torch.arange(11.0), indexing="ij"), dim=-1).reshape(-1, 2)
    kernel = torch.exp(-((place[:, None] - place) ** 2).sum(-1) / (2 * 1.3**2))
    norm = kernel.sum(1).rsqrt()
    pairs = norm[:, None] * kernel * norm
    expected = 1 + 2 * torch.cat([pairs @ part for part in rows.split(99)])
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


def test_the_lattice_filter_is_near_the_kernel_and_keeps_pictures_apart():
    rng = torch.Generator().manual_seed(0)
    places = 4 * torch.rand(2, 300, 5, generator=rng)
    rows = torch.rand(600, 2, generator=rng)
    total = torch.zeros_like(rows)
    LatticeFilter(places).add_to(total, rows)
    for index, (points, values) in enumerate(zip(places, rows.split(300), strict=True)):
        kernel = torch.exp(-((points[:, None] - points) ** 2).sum(-1) / 2)
        norm = kernel.sum(1).rsqrt()
        expected = (norm[:, None] * kernel * norm) @ values
        assert float((total[300 * index : 300 * index + 300] - expected).abs().mean() / expected.mean()) < 0.1
    alone = torch.zeros_like(rows[:300])
    LatticeFilter(places[:1]).add_to(alone, rows[:300])
    torch.testing.assert_close(total[:300], alone, rtol=2e-3, atol=2e-3)


def test_a_batch_gives_what_each_picture_gives():
    both = [scene(20, 26, seed=seed) for seed in (1, 2)]
    together = dense_crf(torch.cat([image for image, _ in both]), torch.cat([shares for _, shares in both]))
    for index, (image, shares) in enumerate(both):
        torch.testing.assert_close(together[index : index + 1], dense_crf(image, shares), rtol=0, atol=5e-3)


def test_the_same_bits_twice():
    image, shares = scene(33, 21)
    assert torch.equal(dense_crf(image, shares), dense_crf(image, shares))


def test_labels_that_are_nowhere_cost_nothing_and_change_nothing():
    image, shares = scene(24, 24, labels=3)
    padded = torch.cat([shares, torch.full((1, 5, 24, 24), 1e-9)], dim=1)
    found = dense_crf(image, padded)
    torch.testing.assert_close(found[:, :3], dense_crf(image, shares), rtol=0, atol=2e-3)
    assert float(found[:, 3:].max()) < 1e-3


def test_no_iterations_only_bring_shares_to_sum_1():
    image, shares = scene(8, 8)
    torch.testing.assert_close(dense_crf(image, 5 * shares, CrfSettings(iterations=0)), shares, rtol=1e-4, atol=2e-5)


def test_flat_pictures_one_label_and_empty_shares_give_finite_shares():
    flat = torch.full((1, 3, 12, 12), 7, dtype=torch.uint8)
    assert torch.equal(dense_crf(flat, torch.rand(1, 1, 12, 12)), torch.ones(1, 1, 12, 12))
    assert bool(dense_crf(flat, torch.zeros(1, 3, 12, 12)).isfinite().all())


def test_of_thousands_of_labels_the_best_one_of_every_pixel_remains():
    flat = torch.full((1, 3, 4, 6), 7, dtype=torch.uint8)
    shares = torch.ones(1, 10_500, 4, 6)
    assert float(dense_crf(flat, shares).amin()) > 0
    # A little more than the others, and still below what is negligible among few labels.
    shares[:, 17, :, :3] = shares[:, 10_400, :, 3:] = 1.2
    best = dense_crf(flat, shares, CrfSettings(gaussian_weight=0, bilateral_weight=1e-3)).argmax(dim=1)
    assert best[0].tolist() == [[17] * 3 + [10_400] * 3] * 4


def test_other_sizes_are_refused():
    image, shares = scene(8, 8)
    with pytest.raises(ValueError, match=r"images must be \(1, 3, 8, 8\)"):
        dense_crf(image[..., :4], shares)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("iterations", [0, 10])
def test_shares_that_are_not_finite_are_refused(value, iterations):
    image, shares = scene(8, 8)
    shares[0, 1, 2, 3:5] = value
    with pytest.raises(ValueError, match="shares must be finite, got NaN or infinity at 2 of 64 pixels"):
        dense_crf(image, shares, CrfSettings(iterations=iterations))


@pytest.mark.parametrize("width", [1e-4, 1e-20, 1e-44])  # too many vertices; places beyond int64; beyond float32
def test_too_narrow_kernels_are_refused(width):
    image, shares = scene(8, 8)
    with pytest.raises(NarrowKernelError, match="take wider ones"):
        dense_crf(image, shares, CrfSettings(bilateral_colour=width, bilateral_width=width))


@pytest.mark.parametrize("iterations", [1, 10])
def test_too_heavy_kernels_are_refused(iterations):
    image, shares = scene(8, 8)
    with pytest.raises(HeavyKernelError, match="take smaller ones"):
        dense_crf(image, shares, CrfSettings(iterations=iterations, bilateral_weight=1e6))
