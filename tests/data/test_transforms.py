import numpy as np
import pytest
import torch
from helpers.micro import mask, picture

from lexiseg.data import transforms
from lexiseg.data.transforms import generator


def sample():
    return {
        "id": "a",
        "image": picture(1),
        "semantic": mask(1, classes=4).astype(np.int64),
        "panoptic": None,
        "captions": ["c"],
    }


def test_flip_mirrors_picture_and_mask_together():
    before = sample()
    after = transforms.random_flip(before, generator(0), chance=1.0)
    assert (after["image"] == before["image"][:, ::-1]).all()
    assert (after["semantic"] == before["semantic"][:, ::-1]).all()
    assert (after["panoptic"], after["captions"], after["id"]) == (None, ["c"], "a")
    same = transforms.random_flip(before, generator(0), chance=0.0)
    assert (same["image"] == before["image"]).all()


def test_scale_stays_in_its_range():
    sizes = {transforms.random_scale(sample(), generator(i), low=0.5, high=2.0)["image"].shape for i in range(50)}
    heights = [height for height, _, _ in sizes]
    assert 10 <= min(heights) < 14
    assert 34 < max(heights) <= 40
    assert all(abs(width / height - 24 / 20) < 0.1 for height, width, _ in sizes)


def test_scale_keeps_ids():
    after = transforms.random_scale(sample(), generator(3), low=1.7, high=1.7)
    assert after["semantic"].shape == after["image"].shape[:2] == (34, 41)
    assert set(np.unique(after["semantic"])) <= set(range(4))
    assert after["semantic"].dtype == np.int64


def test_crop_cuts_both_at_one_place():
    before = sample()
    before["image"][..., 0] = before["semantic"]
    after = transforms.random_crop(before, generator(5), height=8, width=9)
    assert after["image"].shape == (8, 9, 3)
    assert (after["image"][..., 0] == after["semantic"]).all()


def test_crop_pads_what_does_not_count():
    after = transforms.random_crop(sample(), generator(5), height=30, width=16)
    assert after["image"].shape == (30, 16, 3)
    assert (after["image"][20:] == 0).all()
    assert (after["semantic"][20:] == -100).all()
    assert (after["semantic"][:20] >= 0).all()


def test_crops_reach_every_place():
    offsets = set()
    for i in range(200):
        before = {"image": np.zeros((4, 4, 3), np.uint8), "semantic": np.arange(16).reshape(4, 4)}
        offsets.add(int(transforms.random_crop(before, generator(i), height=3, width=3)["semantic"][0, 0]))
    assert offsets == {0, 1, 4, 5}


def test_colour_changes_the_picture_alone():
    before = sample()
    after = transforms.random_colour(before, generator(1), strength=0.4)
    assert after["image"].dtype == np.uint8
    assert (after["image"] != before["image"]).any()
    assert after["semantic"] is before["semantic"]
    same = transforms.random_colour(before, generator(1), strength=0.0)
    assert np.abs(same["image"].astype(int) - before["image"]).max() <= 1


def augmented(rng):
    result = transforms.random_scale(sample(), rng, low=0.5, high=2.0)
    result = transforms.random_crop(result, rng, height=16, width=16)
    return transforms.random_colour(transforms.random_flip(result, rng), rng, strength=0.2)


def test_the_same_generator_gives_the_same_sample():
    one, two, other = augmented(generator(1, 2, 3)), augmented(generator(1, 2, 3)), augmented(generator(1, 2, 4))
    assert (one["image"] == two["image"]).all()
    assert (one["semantic"] == two["semantic"]).all()
    assert (one["image"] != other["image"]).any()


def test_inputs_are_not_changed():
    before = sample()
    augmented(generator(0))
    transforms.resize(before, height=7, width=9)
    assert (before["image"] == picture(1)).all()


def test_number_of_draws_does_not_depend_on_the_sample():
    def left(height):
        rng = generator(9)
        small = {"image": picture(1, height=height), "semantic": None}
        transforms.random_flip(small, rng)
        small = transforms.random_scale(small, rng, low=1, high=1)
        transforms.random_crop(small, rng, height=10, width=10)
        transforms.random_colour(small, rng, strength=0.1)
        return rng.random()

    assert left(5) == left(40)


def test_resize_image_keeps_the_corners():
    pixels = torch.tensor([[[0.0, 2.0], [4.0, 6.0]]])
    resized = transforms.resize_image(pixels, height=3, width=3)
    assert resized.tolist() == [[[0, 1, 2], [2, 3, 4], [4, 5, 6]]]
    assert transforms.resize_image(pixels[None], height=3, width=5).shape == (1, 1, 3, 5)


def test_resize_mask_takes_the_nearest():
    ids = torch.tensor([[1, 2], [3, -100]])
    assert transforms.resize_mask(ids, height=4, width=2).tolist() == [[1, 2], [1, 2], [3, -100], [3, -100]]
    large = torch.arange(16).view(4, 4)
    assert transforms.resize_mask(large, height=2, width=2).tolist() == [[5, 7], [13, 15]]


def test_normalise():
    pixels = np.array([[[0, 255, 51]]], np.uint8)
    result = transforms.normalise(pixels, mean=(0.5, 0.5, 0.0), std=(0.5, 0.25, 1.0))
    assert result.dtype == torch.float32
    assert result.shape == (3, 1, 1)
    assert result.flatten().tolist() == pytest.approx([-1.0, 2.0, 0.2])
