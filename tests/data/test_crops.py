"""Centre squares and five crops."""

from typing import Any

import numpy as np
import pytest
from helpers.micro import picture
from PIL import Image
from torchvision.transforms import functional as torchvision

from lexiseg.data.crops import centre_square, five_crops

SIZES = [(21, 30), (30, 21), (7, 7), (16, 37), (9, 8)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["bilinear", "nearest"])
def test_pictures_are_scaled_and_cut_as_by_torchvision(size, kind):
    """STEGO's transforms are torchvision's, of Pillow pictures."""
    image = picture(0, height=size[0], width=size[1])
    found = centre_square(image, 8, nearest=kind == "nearest")
    given: Any = Image.fromarray(image)
    scaled = torchvision.resize(given, [8], torchvision.InterpolationMode(kind))
    assert np.array_equal(found, np.asarray(torchvision.center_crop(scaled, [8, 8])))
    assert found.dtype == np.uint8


@pytest.mark.parametrize("size", SIZES)
def test_class_ids_are_those_of_the_nearest_pixels(size):
    image = picture(0, height=size[0], width=size[1])
    chosen = centre_square(image, 8, nearest=True)
    for dtype in (np.uint8, np.int64):
        ids = image[..., 1].astype(dtype)
        square = centre_square(ids, 8, nearest=False)
        assert square.dtype == dtype
        assert np.array_equal(square, chosen[..., 1])
        assert np.array_equal(square, centre_square(ids, 8, nearest=True))
    assert np.array_equal(centre_square(image[..., 1].astype(np.int64) - 100, 8, nearest=True), square - 100)


def test_a_picture_of_that_height_is_only_cut():
    image = picture(1, height=8, width=14)
    assert np.array_equal(centre_square(image, 8, nearest=False), image[:, 3:11])
    square = picture(1, height=8, width=8)
    assert np.array_equal(centre_square(square, 8, nearest=True), square)


@pytest.mark.parametrize("size", [(8, 12), (9, 13)])
def test_five_crops_are_corners_and_the_centre(size):
    image = picture(0, height=size[0], width=size[1])
    crops = five_crops(image)
    assert [crop.shape for crop in crops] == [(4, 6, 3)] * 5
    assert np.array_equal(crops[0], image[:4, :6])
    assert np.array_equal(crops[1], image[:4, -6:])
    assert np.array_equal(crops[2], image[-4:, :6])
    assert np.array_equal(crops[3], image[-4:, -6:])
    top, left = (round((side - part) / 2) for side, part in zip(size, (4, 6), strict=True))
    assert np.array_equal(crops[4], image[top : top + 4, left : left + 6])


def test_five_crops_of_labels_match_those_of_the_picture():
    image = picture(0, height=9, width=13)
    for crop, labels in zip(five_crops(image), five_crops(image[..., 0]), strict=True):
        assert np.array_equal(crop[..., 0], labels)


def test_a_single_pixel_is_each_of_its_crops():
    crops = five_crops(picture(0, height=1, width=1))
    assert [crop.shape for crop in crops] == [(1, 1, 3)] * 5
