import numpy as np
import pytest
from helpers.zero_shot import two_classes, write_pascal5i

from lexiseg.data.adapters import open_adapter
from lexiseg.data.adapters.pascal5i import CLASSES
from lexiseg.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pascal5i(tmp_path_factory.mktemp("pascal"))


def test_training_takes_the_other_folds_and_testing_its_own(folder):
    adapter = open_adapter("pascal5i", folder, fold=1)
    assert adapter.splits() == ["train", "test"]
    assert [sample.id for sample in adapter.samples("train")] == [f"2007_{f}0{k}" for f in (0, 2, 3) for k in (0, 1)]
    assert [sample.id for sample in adapter.samples("test")] == ["2007_110", "2007_111"]
    assert next(adapter.samples("test")).file == "VOC2012/JPEGImages/2007_110.jpg"


def test_the_classes_of_the_fold_are_unseen(folder):
    words = open_adapter("pascal5i", folder, fold=2).vocabulary()
    assert words.names == ("background", *CLASSES)
    assert words.unseen_names == ("diningtable", "dog", "horse", "motorbike", "person")
    assert words.things == (False, *[True] * 20)


def test_test_episodes_go_through_the_list_a_thousand_times(folder):
    asked = open_adapter("pascal5i", folder, fold=1).episodes("test")  # type: ignore[attr-defined]
    assert asked.classes == ("bus", "car", "cat", "chair", "cow")
    listed = [("2007_110", "bus"), ("2007_110", "car"), ("2007_111", "car")]
    assert asked.pairs == tuple((listed * 334)[:1000])
    assert not asked.by_class


def test_training_episodes_are_the_lists_of_the_other_folds(folder):
    asked = open_adapter("pascal5i", folder, fold=3).episodes("train")  # type: ignore[attr-defined]
    assert asked.classes == CLASSES[:15]
    assert asked.pairs[:4] == (
        ("2007_000", "aeroplane"),
        ("2007_000", "bicycle"),
        ("2007_001", "bicycle"),
        ("2007_100", "bus"),
    )
    assert len(asked.pairs) == 9


def test_the_border_has_no_label(folder):
    content = next(open_adapter("pascal5i", folder, fold=1).samples("test")).load()
    expected = two_classes(6, 7).astype(int)
    expected[-1] = 65535
    assert content.semantic is not None
    assert (content.semantic == expected).all()
    assert content.unknown_labels == ()
    assert content.image_bytes is not None


def test_all_folds_at_once_to_look_a_folder_through(folder):
    adapter = open_adapter("pascal5i", folder, fold="all")
    assert {split: len(list(adapter.samples(split))) for split in adapter.splits()} == {"train": 8, "test": 8}
    assert adapter.vocabulary().unseen_names == ()


@pytest.mark.parametrize("line", ["2007_000", "2007_000__21", "2007_000__06", "../x__01", "a b__01"])
def test_faulty_lines(tmp_path, line):
    folder = write_pascal5i(tmp_path)
    (folder / "splits/pascal/val/fold0.txt").write_text(f"2007_010__01\n{line}\n")
    with pytest.raises(DataError) as error:
        list(open_adapter("pascal5i", folder, fold=0).samples("test"))
    assert error.value.found == f"splits/pascal/val/fold0.txt line 2: `{line}`"
    assert "01, 02, 03, 04, 05" in error.value.allowed
    assert "fold0.txt" in error.value.fix


def test_missing_lists(tmp_path):
    with pytest.raises(DataError, match=r"splits/pascal/val/fold2\.txt cannot be read"):
        list(open_adapter("pascal5i", tmp_path, fold=2).samples("test"))
    with pytest.raises(DataError) as error:
        list(open_adapter("pascal5i", tmp_path, fold="all").samples("train"))
    assert "none of splits/pascal/val/fold0.txt" in error.value.found
    assert "lexiseg.data.adapters.pascal5i" in error.value.allowed
    assert "`splits`" in error.value.fix


@pytest.mark.parametrize(("name", "fold", "allowed"), [("pascal5i", None, "0 to 3"), ("fss", 0, "null; only coco20i")])
def test_a_fold_where_there_are_folds_and_nowhere_else(tmp_path, name, fold, allowed):
    with pytest.raises(DataError) as error:
        open_adapter(name, tmp_path, fold=fold)
    assert f"with the adapter `{name}`" in error.value.found
    assert error.value.allowed.startswith(allowed)
    assert error.value.fix == "set `data.fold` in params.yaml"


def test_masks_of_another_data_set_are_noticed(tmp_path):
    folder = write_pascal5i(tmp_path)
    from helpers.micro import save

    save(folder / "VOC2012/SegmentationClassAug/2007_110.png", np.full((12, 16), 77, np.uint8))
    assert next(open_adapter("pascal5i", folder, fold=1).samples("test")).load().unknown_labels == (77,)
