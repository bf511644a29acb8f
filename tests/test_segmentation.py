import numpy as np
import pytest
import torch
from torch.nn import functional

from lexiseg import segmentation
from lexiseg.errors import LabelError
from lexiseg.segmentation import Segmentation, check_labels, upsample_argmax
from lexiseg.vocabulary import Vocabulary


def test_labels_keep_their_order_and_may_come_from_a_vocabulary():
    assert check_labels(["sky", "grass"]) == ("sky", "grass")
    assert check_labels(Vocabulary(names=("sky", "grass"))) == ("sky", "grass")


@pytest.mark.parametrize(
    ("labels", "found", "allowed", "fix"),
    [
        ([], "no labels", "one or more", "grass, sky"),
        ("grass, sky", "one string", "list of strings", "['grass', 'sky']"),
        (["grass", " "], "empty label", "visible character", "two commas"),
        (["grass", "\u200b"], "empty label", "visible character", "two commas"),
        (["grass", "sky", "grass"], "more than once: grass", "each label once", "remove the repetitions"),
        (["grass", "Grass"], "more than once: grass, Grass", "each label once", "remove the repetitions"),
    ],
)
def test_bad_labels_say_what_to_do(labels, found, allowed, fix):
    with pytest.raises(LabelError) as caught:
        check_labels(labels)
    assert found in caught.value.found
    assert allowed in caught.value.allowed
    assert fix in caught.value.fix


def test_chunks_of_labels_do_not_change_the_result(monkeypatch):
    scores = torch.randn(2, 7, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = functional.interpolate(scores, size=(9, 11), mode="bilinear", align_corners=True).argmax(1)
    assert torch.equal(upsample_argmax(scores, height=9, width=11).long(), expected)
    monkeypatch.setattr(segmentation, "_CHUNK_VALUES", 2 * 9 * 11 * 2)
    assert torch.equal(upsample_argmax(scores, height=9, width=11).long(), expected)


def test_first_of_equal_labels_wins_across_chunks(monkeypatch):
    monkeypatch.setattr(segmentation, "_CHUNK_VALUES", 1)
    assert int(upsample_argmax(torch.ones(1, 3, 1, 1), height=2, width=2).max()) == 0


def test_the_two_ways_of_upsampling():
    scores = torch.randn(1, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = functional.interpolate(scores, size=(9, 11), mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(upsample_argmax(scores, height=9, width=11, align_corners=False).long(), expected)
    assert not torch.equal(upsample_argmax(scores, height=9, width=11).long(), expected)


def test_soft_masks_of_labels_that_overlap():
    scores = torch.tensor([[[0.9, 0.9], [0.2, 0.2]], [[0.8, 0.8], [0.6, 0.6]]])
    result = Segmentation.from_scores(labels=["red ring", "ring"], scores=scores, height=2, width=2, overlapping=True)
    assert result.label_map.tolist() == [[0, 0], [1, 1]]
    assert np.allclose(result.mask("ring"), scores[1].numpy())
    assert np.allclose(result.mask("red ring"), scores[0].numpy())
    assert result.mean_score("ring") == pytest.approx(0.6)
    assert result.mean_score("red ring") == pytest.approx(0.9)


def test_soft_masks_of_labels_that_compete_are_their_probabilities():
    scores = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0))
    result = Segmentation.from_scores(labels=["a", "b", "c"], scores=scores, height=2, width=2)
    masks = np.stack([result.mask(label) for label in result.labels])
    assert np.allclose(masks, scores.softmax(0).numpy(), atol=1e-6)
    larger = Segmentation.from_scores(labels=["a", "b", "c"], scores=scores, height=5, width=7).mask("b")
    assert larger.shape == (5, 7)
    assert larger.dtype == np.float32


def test_area_and_mean_score():
    scores = torch.tensor([[[4.0, 4.0], [0.0, 0.0]], [[0.0, 0.0], [2.0, 2.0]], [[-9.0, -9.0], [-9.0, -9.0]]])
    result = Segmentation.from_scores(labels=["sky", "grass", "ring"], scores=scores, height=2, width=2, protocol="p")
    assert result.label_map.dtype == np.int32
    assert result.label_map.tolist() == [[0, 0], [1, 1]]
    assert (result.area("sky"), result.area("grass"), result.area("ring")) == (0.5, 0.5, 0.0)
    assert result.mean_score("sky") == pytest.approx(float(scores.softmax(0)[0, 0, 0]))
    assert result.mean_score("grass") == pytest.approx(float(scores.softmax(0)[1, 1, 0]))
    assert result.mean_score("ring") is None
    assert result.protocol == "p"


def test_the_mean_score_of_thousands_of_labels_in_chunks(monkeypatch):
    scores = 5 * torch.randn(50, 4, 6, generator=torch.Generator().manual_seed(0))
    labels = [f"label {number}" for number in range(50)]
    whole = Segmentation.from_scores(labels=labels, scores=scores, height=8, width=12)
    labels = [label for label in labels if whole.area(label)]
    expected = [whole.mean_score(label) for label in labels]
    assert len(labels) > 10
    monkeypatch.setattr(segmentation, "_CHUNK_VALUES", 24 * 7)
    chunked = Segmentation.from_scores(labels=whole.labels, scores=scores, height=8, width=12)
    assert [chunked.mean_score(label) for label in labels] == pytest.approx(expected, rel=1e-5)
    assert sum(chunked.area(label) for label in labels) == pytest.approx(1.0)


def test_mean_score_weighs_cells_by_the_share_the_region_covers():
    # One score cell for the left half, one for the right; the label covers all of the left and half of the right.
    label_map = np.array([[0, 0, 0, 1]], dtype=np.int32)
    scores = np.array([[[3.0, 1.0]], [[0.0, 0.0]]], dtype=np.float32)
    result = Segmentation(labels=("a", "b"), label_map=label_map, scores=scores)
    left, right = torch.from_numpy(scores).softmax(0)[0, 0].tolist()
    assert result.mean_score("a") == pytest.approx((left + 0.5 * right) / 1.5)


def test_asking_for_another_label_names_those_there_are():
    result = Segmentation.from_scores(labels=["sky"], scores=torch.zeros(1, 2, 2), height=4, width=4)
    with pytest.raises(LabelError, match="'ring'") as caught:
        result.area("ring")
    assert "sky" in caught.value.allowed
    assert "segment again" in caught.value.fix


@pytest.mark.parametrize(
    ("label_map", "scores"),
    [
        (np.zeros((4, 4), dtype=np.int64), np.zeros((2, 2, 2), dtype=np.float32)),
        (np.zeros((4, 4), dtype=np.int32), np.zeros((3, 2, 2), dtype=np.float32)),
        (np.zeros((4, 4), dtype=np.int32), np.zeros((2, 2, 2), dtype=np.float64)),
    ],
)
def test_arrays_of_another_kind_are_refused(label_map, scores):
    with pytest.raises(ValueError, match="expected"):
        Segmentation(labels=("a", "b"), label_map=label_map, scores=scores)
