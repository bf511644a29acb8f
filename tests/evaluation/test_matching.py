"""Clusters to classes."""

from itertools import permutations

import numpy as np
import pytest

from lexiseg.evaluation.matching import NO_CLASS, ClusterCounts, class_scores


def counted(clusters, truth, *, sizes):
    counts = ClusterCounts(*sizes)
    counts.update(clusters=np.array(clusters), truth=np.array(truth))
    return counts


def test_a_renumbering_of_the_classes_is_found():
    truth = np.arange(4).repeat([5, 1, 3, 7])
    counts = counted(np.array([2, 0, 3, 1])[truth], truth, sizes=(4, 4))
    assert counts.match().tolist() == [1, 3, 0, 2]
    assert class_scores(counts.matched(counts.match())) == {"miou": 1.0, "accuracy": 1.0}


def test_the_matching_is_the_best_of_all():
    rng = np.random.default_rng(0)
    counts = ClusterCounts(5, 5)
    counts.counts[:] = rng.integers(0, 50, size=(5, 5))
    best = max(sum(counts.counts[row, column] for row, column in enumerate(order)) for order in permutations(range(5)))
    assert sum(counts.counts[row, column] for row, column in enumerate(counts.match())) == best


def test_what_has_no_label_does_not_count():
    counts = counted([0, 1, 1, 0], [0, -100, 255, 1], sizes=(2, 2))
    assert counts.counts.tolist() == [[1, 1], [0, 0]]


def test_extra_clusters_are_errors_or_go_to_their_majority():
    counts = counted([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1], sizes=(3, 2))
    counts.counts[1, 1] = 3
    strict, kind = counts.match(), counts.match(unmatched="majority")
    assert strict.tolist() == [0, 1, NO_CLASS]
    assert kind.tolist() == [0, 1, 1]
    scores = class_scores(counts.matched(strict))
    assert scores["accuracy"] == pytest.approx(5 / 7)
    assert scores["miou"] == pytest.approx((1 + 3 / 5) / 2)
    assert class_scores(counts.matched(kind)) == {"miou": 1.0, "accuracy": 1.0}


def test_an_extra_cluster_without_pixels_stays_without_a_class():
    counts = counted([0, 1], [0, 1], sizes=(3, 2))
    assert counts.match(unmatched="majority").tolist() == [0, 1, NO_CLASS]


def test_fewer_clusters_than_classes_leave_classes_unfound():
    counts = counted([0, 0, 1], [0, 0, 2], sizes=(2, 3))
    scores = class_scores(counts.matched(counts.match()))
    assert scores == {"miou": 1.0, "accuracy": 1.0}  # class 1 occurs nowhere
    counts.counts[0, 1] = 1
    assert class_scores(counts.matched(counts.match()))["miou"] == pytest.approx((2 / 3 + 0 + 1) / 3)


def test_nothing_counted_has_no_scores():
    counts = ClusterCounts(2, 2)
    assert class_scores(counts.matched(counts.match())) == {"miou": None, "accuracy": None}


def test_wrong_maps_are_refused():
    counts = ClusterCounts(2, 2)
    with pytest.raises(ValueError, match=r"shape \(2,\) for labels of shape \(3,\)"):
        counts.update(clusters=np.zeros(2, int), truth=np.zeros(3, int))
    with pytest.raises(ValueError, match=r"expected 0\.\.1"):
        counts.update(clusters=np.array([0, 2]), truth=np.array([0, 0]))
