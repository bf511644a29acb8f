import numpy as np
import pytest
import torch

from lexiseg.errors import SettingsError
from lexiseg.layers.pamr import pamr
from lexiseg.methods.tcl.refine import refine, refiner
from lexiseg.methods.tcl.settings import RefineSettings


@pytest.fixture
def saved():
    """Saved masks (2, 3, 6, 8) and a picture (12, 16, 3)."""
    rng = np.random.default_rng(0)
    return rng.random((2, 3, 6, 8), dtype=np.float32), rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)


def test_the_defaults_are_the_authors():
    assert RefineSettings().model_dump() == {
        "pamr_iterations": 10,
        "knowledge_weight": 0.3,
        "background_threshold": None,
    }


def test_nothing_but_the_grounders_masks(saved):
    scores, image = saved
    assert np.array_equal(refiner({"pamr_iterations": 0, "knowledge_weight": 0.0})(scores, image), scores[0])


def test_the_knowledge_branch_is_mixed_in_after_pamr(saved):
    scores, image = saved
    masks, knowledge = torch.from_numpy(scores)[:, None]
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    guidance = torch.nn.functional.interpolate(pixels, size=(6, 8), mode="bilinear", align_corners=True)
    expected = 0.25 * knowledge + 0.75 * pamr(guidance, masks, iterations=4)
    found = refiner({"pamr_iterations": 4, "knowledge_weight": 0.25})(scores, image)
    assert np.allclose(found, expected[0].numpy(), atol=1e-6)
    assert found.shape == (3, 6, 8)


def test_the_normalisation_of_the_picture_does_not_matter(saved):
    scores, image = saved
    masks, knowledge = torch.from_numpy(scores)[:, None]
    pixels = (torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 - 0.4) / torch.tensor([0.2, 0.3, 0.25]).view(
        3, 1, 1
    )
    expected = refine(masks, knowledge, pixels, iterations=10, knowledge_weight=0.3)[0].numpy()
    assert np.allclose(refiner({})(scores, image), expected, atol=1e-5)


def test_wrong_settings():
    with pytest.raises(SettingsError, match="knowledge_weight"):
        refiner({"knowledge_weight": 1.5})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pamr_iterations": 0, "knowledge_weight": 0.0}, "none"),
        ({}, {"pamr_iterations": 10, "knowledge_weight": 0.3}),
        ({"pamr_iterations": 0}, {"pamr_iterations": 0, "knowledge_weight": 0.3}),
    ],
)
def test_what_a_card_says_of_it(changes, expected):
    assert RefineSettings(**changes).card()["refinement"] == expected
