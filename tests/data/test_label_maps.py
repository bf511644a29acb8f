"""Fine labels to coarse ones."""

import numpy as np
import pytest

from lexiseg.data.label_maps import CITYSCAPES27, COCOSTUFF27, POTSDAM3, cityscapes27, cocostuff27, potsdam3


@pytest.mark.parametrize(
    ("table", "names", "size"),
    [(cocostuff27, COCOSTUFF27, 182), (cityscapes27, CITYSCAPES27, 34), (potsdam3, POTSDAM3, 6)],
)
def test_every_coarse_class_has_fine_labels_and_a_name_of_its_own(table, names, size):
    found = set(table(np.arange(size)).tolist())
    assert found - {-100} == set(range(len(names)))
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("fine", "coarse"),
    [(0, "person"), (2, "vehicle"), (17, "animal"), (123, "plant"), (156, "sky"), (177, "water"), (148, "ground")],
)
def test_labels_of_coco_stuff(fine, coarse):
    assert COCOSTUFF27[int(cocostuff27(np.array(fine)))] == coarse


def test_what_is_no_label_is_ignored_and_shapes_stay():
    assert cocostuff27(np.array([[255, 182], [-1, 0]])).tolist() == [[-100, -100], [-100, 9]]
    assert cityscapes27(np.array([-1, 6, 7, 33, 34])).tolist() == [-100, -100, 0, 26, -100]
    assert potsdam3(np.array([0, 4, 1, 5, 2, 3, 255], dtype=np.uint8)).tolist() == [0, 0, 1, 1, 2, 2, -100]
