import numpy as np
import pytest

from lexiseg.evaluation.image_counts import ImageCounter, read_image_counts, write_image_counts

CLASSES = ("sky", "grass", "star")


@pytest.fixture
def counts():
    counter = ImageCounter(CLASSES)
    for id, values in {"b": (1, 2, 3), "a": (4, 5, 6), "empty": (0, 0, 0)}.items():
        counter.add(
            id,
            intersection=np.array([values[0], 0, 0]),
            true=np.array([values[1], 0, 0]),
            predicted=np.array([values[0], 0, values[2]]),
        )
    return counter.result()


def test_every_picture_counts_once(counts):
    assert counts.ids == ("b", "a", "empty")
    assert counts.union.tolist() == [[2, 0, 3], [5, 0, 6], [0, 0, 0]]


def test_what_is_asked_twice_of_a_picture_adds_up():
    counter, one = ImageCounter(CLASSES), np.array([1, 2, 3])
    for _ in range(2):
        counter.add("a", intersection=one, true=2 * one, predicted=3 * one)
    assert counter.result().union.tolist() == [[8, 16, 24]]


def test_reads_what_was_written(counts, tmp_path):
    for name in ("one", "two"):
        write_image_counts(tmp_path / name, counts)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = read_image_counts(tmp_path / "one", CLASSES)
    assert (found.ids, found.classes) == (counts.ids, CLASSES)
    for name in ("intersection", "true", "predicted"):
        assert (getattr(found, name) == getattr(counts, name)).all()


def test_pictures_in_another_order(counts):
    found = counts.ordered(["a", "b", "empty"])
    assert found.ids == ("a", "b", "empty")
    assert found.true[:, 0].tolist() == [5, 2, 0]


def test_nothing_was_counted(tmp_path):
    write_image_counts(tmp_path / "none", ImageCounter(CLASSES).result())
    assert read_image_counts(tmp_path / "none", CLASSES).true.shape == (0, 3)
