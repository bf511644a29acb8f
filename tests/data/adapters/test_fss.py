import numpy as np
import pytest
from helpers.zero_shot import two_classes, write_fss

from lexiseg.data.adapters import open_adapter
from lexiseg.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_fss(tmp_path_factory.mktemp("fss"))


def test_the_classes_of_training_are_seen(folder):
    words = open_adapter("fss", folder).vocabulary()
    assert words.names == ("background", "abacus", "zebra_x", "carpenter's_hammer", "ab_wheel", "bus")
    assert words.seen_names == ("background", "abacus", "zebra_x")


@pytest.mark.parametrize(
    ("split", "classes"),
    [("train", ("abacus", "zebra_x")), ("val", ("carpenter's_hammer",)), ("test", ("ab_wheel", "bus"))],
)
def test_every_picture_is_asked_about_its_class(folder, split, classes):
    adapter = open_adapter("fss", folder)
    asked = adapter.episodes(split)  # type: ignore[attr-defined]
    assert asked.classes == classes
    assert asked.pairs == tuple((f"{name}/{k}", name) for name in classes for k in (1, 10))
    assert [sample.id for sample in adapter.samples(split)] == [id for id, _ in asked.pairs]


def test_masks_are_cut_at_half(folder):
    for number, sample in enumerate(open_adapter("fss", folder).samples("test")):  # grey and colour pictures in turn
        content = sample.load()
        assert content.semantic is not None
        assert (content.semantic == np.where(two_classes(128, 127) == 128, 4 + number // 2, 0)).all()


@pytest.mark.parametrize("lines", ["bus\nbus\n", "bus\nabacus\n", "bus\na/b\n"])
def test_faulty_lists(tmp_path, lines):
    folder = write_fss(tmp_path)
    (folder / "splits/fss/test.txt").write_text(lines)
    with pytest.raises(DataError) as error:
        open_adapter("fss", folder).vocabulary()
    assert error.value.found == f"splits/fss/test.txt line 2: `{lines.split()[1]}`"
    assert "in one list and once" in error.value.allowed
    assert "test.txt" in error.value.fix


def test_lists_do_not_lead_out_of_the_folder(tmp_path):
    folder = write_fss(tmp_path)
    (folder / "splits/fss/test.txt").write_text("..\n")
    with pytest.raises(DataError, match=r"the path `FSS-1000/\.\.`"):
        open_adapter("fss", folder).vocabulary()


def test_a_class_without_pictures(tmp_path):
    folder = write_fss(tmp_path)
    (folder / "splits/fss/val.txt").write_text("hammer\n")
    with pytest.raises(DataError) as error:
        list(open_adapter("fss", folder).samples("val"))
    assert error.value.found == "no picture in FSS-1000/hammer/, a class of splits/fss/val.txt"
    assert "1.jpg" in error.value.allowed
    assert "take its line out" in error.value.fix
