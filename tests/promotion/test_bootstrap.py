"""The interval of a difference: what it covers, and how often two equal models look different."""

import numpy as np
import pytest

from lexiseg.evaluation.image_counts import ImageCounts
from lexiseg.promotion.bootstrap import paired_difference, pooled_iou

CLASSES = ("sky", "grass", "star", "ring")
HOW = {"absent_class": "exclude", "confidence": 0.95, "resamples": 500}


def counts(rng, images):
    """Pictures of some classes each; how hard a picture is differs, and a model gets its pixels right by its skill."""
    true = rng.integers(0, 200, (images, len(CLASSES))) * (rng.random((images, len(CLASSES))) < 0.6)
    hard = rng.beta(4, 2, (images, 1))
    return true, hard


def answer(rng, true, hard, *, skill):
    right = rng.binomial(true, np.clip(skill * hard + rng.normal(0, 0.1, true.shape), 0, 1))
    wrong = rng.permuted(true - right, axis=1)  # the same number of pixels, at other classes
    return right, right + wrong


def model(true, intersection, predicted):
    return ImageCounts(tuple(map(str, range(len(true)))), CLASSES, intersection, true, predicted)


def test_the_estimate_is_the_difference_of_the_pooled_means():
    rng = np.random.default_rng(0)
    true, hard = counts(rng, 40)
    ours, theirs = (model(true, *answer(rng, true, hard, skill=skill)) for skill in (0.9, 0.6))
    found = paired_difference(ours, theirs, **HOW)
    assert found.estimate == pytest.approx(pooled_iou(ours).mean() - pooled_iou(theirs).mean())
    assert 0 < found.low < found.estimate < found.high
    back = paired_difference(theirs, ours, **HOW)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    assert paired_difference(ours, ours, **HOW).high == 0


def test_few_pictures_are_seldom_enough():
    def sure(images):
        rng, found = np.random.default_rng(1), 0
        for pair in range(20):
            true, hard = counts(rng, images)
            ours, theirs = (model(true, *answer(rng, true, hard, skill=skill)) for skill in (0.73, 0.70))
            found += paired_difference(ours, theirs, **HOW, seed=pair).low > 0
        return found

    assert sure(20) < 10 < 18 < sure(600)


def test_a_class_that_a_resample_lacks_is_left_out_or_counts_as_zero():
    # "ring" is in one picture of three, and nobody finds it.
    true = np.array([[9, 0, 0, 0], [9, 0, 0, 0], [9, 0, 0, 9]])
    right = np.array([[9, 0, 0, 0], [9, 0, 0, 0], [9, 0, 0, 0]])
    ours, theirs = model(true, right, right), model(true, 0 * right, 0 * right)
    left_out = paired_difference(ours, theirs, **HOW)
    as_zero = paired_difference(ours, theirs, **{**HOW, "absent_class": "zero"})
    assert (left_out.estimate, left_out.low, left_out.high) == (0.5, 0.5, 1.0)
    assert (as_zero.estimate, as_zero.low, as_zero.high) == (0.25, 0.25, 0.25)


def test_other_pictures_are_refused():
    rng = np.random.default_rng(0)
    true, hard = counts(rng, 4)
    one = model(true, *answer(rng, true, hard, skill=0.5))
    with pytest.raises(ValueError, match="same pictures"):
        paired_difference(one, one.ordered(["3", "2", "1", "0"]), **HOW)


@pytest.mark.parametrize("images", [40, 200])
def test_equal_models_are_seldom_called_better(images):
    """The error that promotion must not make: at most 5 % of the pairs; one side of the interval promotes (2.5 %)."""
    rng = np.random.default_rng(images)
    promoted = 0
    for pair in range(200):
        true, hard = counts(rng, images)
        ours, theirs = (model(true, *answer(rng, true, hard, skill=0.7)) for _ in range(2))
        promoted += paired_difference(ours, theirs, **HOW, seed=pair).low > 0
    assert promoted <= 0.05 * 200, f"{promoted} of 200"


def test_a_better_model_is_found():
    rng = np.random.default_rng(5)
    found = 0
    for pair in range(20):
        true, hard = counts(rng, 200)
        ours, theirs = (model(true, *answer(rng, true, hard, skill=skill)) for skill in (0.75, 0.65))
        found += paired_difference(ours, theirs, **HOW, seed=pair).low > 0
    assert found == 20
