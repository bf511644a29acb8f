import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import distance_transform_edt

from lexiseg.pictures import enlarged, legend, overlay, palette, side_by_side, stack, write_png
from lexiseg.pictures.overlay import _depth, _places
from lexiseg.pictures.text import text_size
from lexiseg.storage import sha256_of_file

# Full protanopia and deuteranopia after Machado, Oliveira and Fernandes (2009), for linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.119192, 0.9503041]]
)


def cielab(colours: np.ndarray, vision: str) -> np.ndarray:
    part = colours / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(VISIONS[vision]).T, 0, 1)
    xyz = seen @ TO_XYZ.T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize(("count", "distance"), [(11, 17), (20, 14), (32, 12)])
def test_colours_are_apart_for_every_eye(vision, count, distance):
    # A difference of about 2.3 in CIELAB is just noticeable.
    lab = cielab(palette([f"{number:02d}" for number in range(count)]), vision)
    gaps = np.linalg.norm(lab[:, None] - lab[None], axis=2)[~np.eye(count, dtype=bool)]
    assert gaps.min() >= distance


def test_colours_follow_names_not_order():
    one, other = palette(["sky", "grass", "ring"]), palette(["ring", "sky", "grass"])
    assert one[2].tolist() == other[0].tolist()
    assert one[0].tolist() == other[1].tolist()


def test_many_labels_have_many_colours():
    assert len(np.unique(palette([f"{number:03d}" for number in range(133)]), axis=0)) == 133
    assert palette([]).shape == (0, 3)


def scene(size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    label_map = np.zeros((size, size), dtype=np.int32)
    label_map[size // 2 :] = 1
    return image, label_map


def test_small_pictures_are_enlarged_by_a_whole_factor():
    image, label_map = scene()
    assert overlay(image, label_map, ["sky", "grass"]).shape == (384, 384, 3)
    assert enlarged(image).shape == (384, 384, 3)
    assert np.array_equal(enlarged(image)[::6, ::6], image)
    large = np.zeros((300, 400, 3), dtype=np.uint8)
    assert overlay(large, np.zeros((300, 400), dtype=int), ["sky"]).shape == large.shape


def test_tint_is_the_labels_colour():
    image, label_map = scene(400)
    flat = overlay(image, label_map, ["sky", "grass"], alpha=1.0, names=False)
    assert flat[10, 10].tolist() == palette(["sky", "grass"])[0].tolist()
    assert flat[390, 390].tolist() == palette(["sky", "grass"])[1].tolist()
    assert flat[199, 10].min() > 170  # the border


def test_ignored_pixels_are_grey():
    image, label_map = scene(400)
    label_map[:] = -100
    picture = overlay(image, label_map, ["sky"])
    assert (picture.max(axis=2) == picture.min(axis=2)).all()


def test_names_change_the_picture_and_are_deterministic():
    image, label_map = scene()
    written = overlay(image, label_map, ["sky", "grass"])
    assert not np.array_equal(written, overlay(image, label_map, ["sky", "grass"], names=False))
    assert np.array_equal(written, overlay(image, label_map, ["sky", "grass"]))


def test_names_stay_inside_apart_and_on_their_region():
    label_map = np.zeros((360, 480), dtype=np.int32)
    label_map[:40, 430:] = 1  # a corner smaller than its name
    label_map[200:, :240] = 2
    label_map[100:104, 100:104] = 3  # too small for a name
    labels = ["background of the picture", "corner thing", "left", "speck"]
    places = _places(label_map, labels, size=14, rim=1)
    assert {name for name, _, _ in places} == {"background of the picture", "left", "corner thing"}
    boxes = [(left, top, *text_size(name, size=14, outline=1)) for name, left, top in places]
    covered = np.zeros(label_map.shape, dtype=int)
    for (name, _, _), (left, top, width, height) in zip(places, boxes, strict=True):
        assert left >= 0
        assert top >= 0
        assert left + width <= 480
        assert top + height <= 360
        covered[top : top + height, left : left + width] += 1
        if name == "left":
            assert (label_map[top : top + height, left : left + width] == 2).all()
            assert abs(left + width / 2 - 120) < 50
    assert covered.max() == 1


def test_depth_is_the_distance_to_the_outline():
    region = np.random.default_rng(0).random((40, 30)) < 0.8
    region[:, :6], region[25:] = False, False
    region[3, 0] = True  # at the picture's edge
    whole = np.asarray(distance_transform_edt(np.pad(region, 1)))[1:-1, 1:-1]
    np.testing.assert_array_equal(_depth(region), whole)
    assert whole[3, 0] == 1.0


def test_a_name_too_long_for_the_picture_is_left_out():
    assert _places(np.zeros((40, 40), dtype=np.int32), ["a very long name of a class"], size=14, rim=1) == []


def test_one_pixel_can_be_drawn():
    picture = overlay(np.zeros((1, 1, 3), dtype=np.uint8), np.zeros((1, 1), dtype=int), ["x"])
    assert picture.shape == (384, 384, 3)


def test_legend_wraps_and_shows_colours():
    labels = [f"class {number}" for number in range(20)]
    wide, narrow = legend(labels, width=1000), legend(labels, width=200)
    assert wide.shape[1] == 1000
    assert narrow.shape[0] > wide.shape[0]
    shown = legend(labels, width=300, shown=["class 3"], notes={"class 3": "never labelled"}, unlabelled=True)
    pixels = {tuple(pixel) for pixel in shown.reshape(-1, 3).tolist()}
    assert tuple(palette(labels)[3].tolist()) in pixels
    assert tuple(palette(labels)[4].tolist()) not in pixels


def test_rows_and_columns():
    tall, small = np.zeros((40, 30, 3), dtype=np.uint8), np.full((20, 50, 3), 7, dtype=np.uint8)
    row = side_by_side([tall, small])
    assert row.shape == (40, 88, 3)
    assert np.array_equal(row[:20, 38:], small)
    titled = side_by_side([tall, small], ["a", "a title much wider than the picture"])
    assert titled.shape[0] > 40
    assert titled.shape[1] == 88
    assert stack([tall, small]).shape == (40 + 20 + 8 + 16, 50 + 16, 3)


def test_png_bytes_are_reproducible(tmp_path):
    image, label_map = scene()
    picture = overlay(image, label_map, ["sky", "grass"])
    for name in ("a", "b"):
        write_png(tmp_path / name / "picture.png", picture)
    assert sha256_of_file(tmp_path / "a/picture.png") == sha256_of_file(tmp_path / "b/picture.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a/picture.png")), picture)
