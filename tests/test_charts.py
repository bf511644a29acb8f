"""Charts as pixels."""

import warnings

import numpy as np
import pytest

from lexiseg.pictures.charts import bars, histograms

BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)


def painted(image, colour):
    """bool (H, W): where a colour is, antialiasing aside."""
    return np.abs(image.astype(int) - colour).max(axis=-1) < 12


def warm(image, sign):
    """bool (H, W): more red than blue (sign 1), or the other way round (-1)."""
    return sign * (image[..., 0].astype(int) - image[..., 2]) > 80


def samples():
    rng = np.random.default_rng(0)
    return {"self": rng.normal(0.4, 0.1, (4, 9, 9)), "random": rng.normal(0.0, 0.1, 300)}


def test_equal_values_give_equal_pixels():
    first, again = (histograms({"features": samples()}, marks={"features": {"self": 0.2}}) for _ in range(2))
    assert first.dtype == np.uint8
    assert first.ndim == 3
    assert first.shape[2] == 3
    assert np.array_equal(first, again)
    assert np.array_equal(bars([1, 2], ["a", "b"], title="t", unit="u"), bars([1, 2], ["a", "b"], title="t", unit="u"))


def test_other_values_give_other_pixels():
    changed = {**samples(), "self": samples()["self"] ** 2}
    assert not np.array_equal(histograms({"features": samples()}), histograms({"features": changed}))


def test_a_panel_per_title():
    one, two = histograms({"a": samples()}), histograms({"a": samples(), "b": samples()})
    assert two.shape[0] == one.shape[0]
    assert two.shape[1] == pytest.approx(2 * one.shape[1], abs=2)


@pytest.mark.parametrize(("name", "sign"), [("self", -1), ("random", 1)])
def test_a_mark_stands_in_its_panel_in_the_colour_of_its_sample(name, sign):
    panels = {"a": samples(), "b": samples()}
    plain, marked = histograms(panels), histograms(panels, marks={"b": {name: 0.6}})
    half = plain.shape[1] // 2
    assert np.array_equal(plain[:, :half], marked[:, :half])
    # A thin dashed line, blended with the white beside it, so counted by hue.
    assert warm(marked, sign).sum() > warm(plain, sign).sum() + len(plain) / 3
    assert warm(marked, -sign).sum() < warm(plain, -sign).sum() + len(plain) / 3


def test_a_sample_has_one_colour_in_all_panels():
    values = samples()
    alone = histograms({"first": values, "second": {"random": values["random"]}})
    right = alone[:, alone.shape[1] // 2 :]
    assert painted(right, ORANGE).any()
    assert not painted(right, BLUE).any()


def test_a_constant_sample_is_drawn_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = histograms({"features": {"self": np.zeros((2, 3, 3), np.float32), "random": np.zeros(4, np.float32)}})
    assert painted(image, BLUE).any() or painted(image, ORANGE).any()


def test_bars_stand_from_top_to_bottom_as_long_as_their_values():
    image = painted(bars([1.0, 3.0, 0.0], ["one", "three", "none"], title="use", unit="%"), BLUE)
    lengths = image.sum(axis=1)
    rows = np.flatnonzero(lengths)
    upper, lower = lengths[rows[0] + 2], lengths[rows[-1] - 2]
    assert lower == pytest.approx(3 * upper, rel=0.05)
    # The bar of length 0 has its place below them.
    assert len(image) - rows[-1] > rows[0]


def test_more_bars_make_a_higher_picture():
    few, many = (bars([1.0] * count, [f"{n}" for n in range(count)], title="t", unit="u") for count in (3, 27))
    assert many.shape[0] > 2 * few.shape[0]
    assert many.shape[1] == few.shape[1]
