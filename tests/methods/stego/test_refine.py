"""The dense CRF behind `stego.refine`: what it makes of saved logits, and which settings it refuses."""

import numpy as np
import pytest
import torch

from lexiseg.errors import SettingsError
from lexiseg.layers.crf import dense_crf
from lexiseg.methods.stego.refine import refiner


@pytest.fixture
def saved():
    """Logits (3, 6, 8) and a picture (12, 16, 3)."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, 6, 8)).astype(np.float32), rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)


def test_no_iterations_are_no_refiner():
    assert refiner({"crf_iterations": 0}) is None


def test_logarithms_of_the_shares_at_the_picture_s_size(saved):
    logits, image = saved
    larger = torch.nn.functional.interpolate(torch.from_numpy(logits)[None], size=(12, 16), mode="bilinear")
    expected = dense_crf(torch.from_numpy(image).permute(2, 0, 1)[None], larger.softmax(dim=1))[0]
    refine = refiner({})
    assert refine is not None
    found = refine(logits, image)
    assert found.shape == (3, 12, 16)
    np.testing.assert_allclose(np.exp(found), expected.numpy(), atol=1e-6)


def test_wrong_settings():
    with pytest.raises(SettingsError, match="bilateral_width"):
        refiner({"bilateral_width": 0.0})


@pytest.mark.parametrize(
    ("values", "found", "allowed"),
    [
        (
            {"bilateral_width": 0.01, "bilateral_colour": 0.001},
            "`stego.refine.bilateral_width: 0.01` and `stego.refine.bilateral_colour: 0.001`, too narrow",
            "wider kernels; the authors' are `bilateral_width: 67.0`, `bilateral_colour: 3.0`",
        ),
        (
            {"bilateral_weight": 1e6},
            "`stego.refine.gaussian_weight: 3.0` and `stego.refine.bilateral_weight: 1000000.0`, too large",
            "smaller weights; the authors' are `gaussian_weight: 3.0`, `bilateral_weight: 4.0`",
        ),
    ],
)
def test_kernels_that_cannot_be_computed_name_their_keys(saved, values, found, allowed):
    refine = refiner(values)
    assert refine is not None
    with pytest.raises(SettingsError) as caught:
        refine(*saved)
    assert caught.value.found == f"{found} for a picture of 12 x 16 pixels"
    assert caught.value.allowed == allowed
    assert "stego.refine.crf_iterations: 0" in caught.value.fix
