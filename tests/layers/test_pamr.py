"""PAMR against its definition, pixel by pixel, and what it promises."""

import numpy as np
import pytest
import torch

from lexiseg.layers import pamr as module
from lexiseg.layers.pamr import local_std, pamr, pamr_affinity


def by_definition(image, mask, *, iterations, dilations):
    """Masks (N, H, W) of a picture (3, H, W), in loops."""
    _, height, width = image.shape
    around = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    where = [
        [(min(max(y + d * r, 0), height - 1), min(max(x + d * c, 0), width - 1)) for d in dilations for r, c in around]
        for y in range(height)
        for x in range(width)
    ]
    centres = [number for number, (r, c) in enumerate(around * len(dilations)) if (r, c) == (0, 0)]
    for _ in range(iterations):
        result = np.zeros_like(mask)
        for y in range(height):
            for x in range(width):
                samples = np.array([image[:, row, column] for row, column in where[y * width + x]])
                spread = 1e-8 + 0.1 * samples.std(axis=0, ddof=1)
                likeness = -(np.abs(samples - image[:, y, x]) / spread).mean(axis=1)
                likeness = np.delete(likeness, centres)
                weight = np.exp(likeness - likeness.max())
                values = np.array([mask[:, row, column] for row, column in where[y * width + x]])
                result[:, y, x] = (weight / weight.sum()) @ np.delete(values, centres, axis=0)
        mask = result
    return mask


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("iterations", "dilations"), [(1, (1,)), (2, (1, 2)), (3, (3, 1, 7))])
def test_by_definition(iterations, dilations):
    image, masks = noise(1, 3, 6, 7), noise(1, 2, 6, 7, seed=1)
    expected = by_definition(image[0].numpy(), masks[0].numpy(), iterations=iterations, dilations=dilations)
    found = pamr(image, masks, iterations=iterations, dilations=dilations)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-10)


def test_pictures_of_a_batch_and_masks_do_not_mix():
    image, masks = noise(2, 3, 12, 9), noise(2, 3, 12, 9, seed=1)
    together = pamr(image, masks, iterations=2)
    for one in range(2):
        for mask in range(3):
            alone = pamr(image[one : one + 1], masks[one : one + 1, mask : mask + 1], iterations=2)
            torch.testing.assert_close(together[one : one + 1, mask : mask + 1], alone)


def test_masks_in_parts(monkeypatch):
    image, masks = noise(1, 3, 10, 10), noise(1, 7, 10, 10, seed=1)
    whole = pamr(image, masks, iterations=2)
    monkeypatch.setattr(module, "_CACHED_VALUES", 250)  # two masks at a time
    torch.testing.assert_close(pamr(image, masks, iterations=2), whole)


def test_smaller_masks_are_brought_to_the_picture():
    image, masks = noise(1, 3, 12, 16), noise(1, 2, 3, 4, seed=1)
    larger = torch.nn.functional.interpolate(masks, size=(12, 16), mode="bilinear", align_corners=True)
    torch.testing.assert_close(pamr(image, masks, iterations=0), larger)
    torch.testing.assert_close(pamr(image, masks, iterations=3), pamr(image, larger, iterations=3))


def test_weights_are_a_mean():
    affinity = pamr_affinity(noise(2, 3, 9, 8))
    assert affinity.shape == (2, 48, 9, 8)
    torch.testing.assert_close(affinity.sum(dim=1), torch.ones(2, 9, 8, dtype=torch.float64))
    refined = pamr(noise(1, 3, 9, 8), torch.full((1, 1, 9, 8), 0.3, dtype=torch.float64))
    torch.testing.assert_close(refined, torch.full_like(refined, 0.3))


def test_flat_areas_are_smoothed_and_give_no_nan():
    image = torch.ones(1, 3, 9, 9)
    assert not local_std(image).any()
    mask = torch.zeros(1, 1, 9, 9)
    mask[..., 4, 4] = 1
    refined = pamr(image, mask, iterations=1, dilations=(1,))
    assert refined[0, 0, 4, 5] == pytest.approx(1 / 8)
    assert refined[0, 0, 4, 4] == 0  # the centre has no weight of its own


def test_half_precision():
    image, mask = torch.ones(1, 3, 9, 9, dtype=torch.float16), torch.rand(1, 1, 9, 9).half()
    refined = pamr(image, mask, iterations=2)
    assert refined.dtype == torch.float16
    assert torch.isfinite(refined).all()


def test_a_mask_follows_an_edge():
    # Left half dark, right half bright; the mask ends two pixels beside the edge.
    image = torch.zeros(1, 3, 16, 32)
    image[..., 16:] = 1
    image += 0.01 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 16, 32)
    mask[..., :13] = 1
    refined = pamr(image, mask)[0, 0]
    assert (refined[:, 13:16] > 0.5).all()
    assert (refined[:, 17:] < 0.2).all()


def test_gradients_flow_into_the_masks():
    masks = noise(1, 2, 6, 6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pamr(noise(1, 3, 6, 6), x, iterations=2, dilations=(1, 2)), masks)
