import os
import pickle

import numpy as np
import pytest
from helpers.zero_shot import two_classes, write_coco20i, write_pickle

from lexiseg.data.adapters import open_adapter
from lexiseg.data.adapters.coco20i import CLASSES
from lexiseg.errors import DataError

LIST = "splits/coco/val/fold1.pkl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_coco20i(tmp_path_factory.mktemp("coco"))


def test_classes_four_apart_are_unseen(folder):
    words = open_adapter("coco20i", folder, fold=1).vocabulary()
    assert words.names == ("background", *CLASSES)
    assert words.unseen_names == CLASSES[1::4]
    assert words.unseen_names[:3] == ("bicycle", "bus", "trafficlight")


def test_training_draws_by_class(folder):
    adapter = open_adapter("coco20i", folder, fold=1)
    asked = adapter.episodes("train")  # type: ignore[attr-defined]
    assert asked.by_class
    assert asked.classes == tuple(name for k, name in enumerate(CLASSES) if k % 4 != 1)
    assert len(asked.pairs) == 60 * 2
    assert asked.pairs[:2] == (("COCO_train2014_00", "person"), ("COCO_train2014_01", "person"))
    files = [sample.file for sample in adapter.samples("train")]
    assert files == [f"COCO2014/train2014/COCO_train2014_{fold}{k}.jpg" for fold in (0, 2, 3) for k in (0, 1)]


def test_a_thousand_questions_drawn_once(folder):
    adapter = open_adapter("coco20i", folder, fold=1)
    asked = adapter.episodes("test")  # type: ignore[attr-defined]
    # By numpy's global generator, as the official code draws them: the class, then one of its pictures.
    table = pickle.loads((folder / LIST).read_bytes())
    np.random.seed(0)
    expected = []
    for _ in range(1000):
        k = np.random.choice(range(1, 80, 4), 1, replace=False)[0]
        name = np.random.choice(table[k], 1, replace=False)[0]
        expected.append((name.partition("/")[2].removesuffix(".jpg"), CLASSES[k]))
    assert asked.pairs == tuple(expected)
    assert asked.classes == CLASSES[1::4]
    assert not asked.by_class
    assert {sample.id for sample in adapter.samples("test")} == {sample for sample, _ in asked.pairs}


def test_what_has_no_label_is_background(folder):
    content = next(open_adapter("coco20i", folder, fold=1).samples("test")).load()
    assert content.semantic is not None
    assert (content.semantic == two_classes(2, 6, border=0)).all()
    assert content.unknown_labels == ()


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("made_by_a_pickle",)


@pytest.mark.parametrize("content", [Malicious(), {1: Malicious()}, {1: [np.str_("a.jpg")]}])
def test_a_list_that_would_execute_code_is_refused_before_it_does(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    folder = write_coco20i(tmp_path / "d")
    write_pickle(folder / LIST, content)
    with pytest.raises(DataError) as error:
        list(open_adapter("coco20i", folder, fold=1).samples("test"))
    assert error.value.found.startswith(f"{LIST} cannot be read (it asks for ")
    assert "never opened" in error.value.allowed
    assert "official list" in error.value.fix
    assert not (tmp_path / "made_by_a_pickle").exists()


@pytest.mark.parametrize(
    "content", [[1, 2], {1: "val2014/a.jpg"}, {1: [3]}, {1: ["a.png"]}, {2: ["a.jpg"]}, {"bus": ["a.jpg"]}]
)
def test_something_else_than_a_list(tmp_path, content):
    folder = write_coco20i(tmp_path)
    write_pickle(folder / LIST, content)
    with pytest.raises(DataError) as error:
        list(open_adapter("coco20i", folder, fold=1).samples("test"))
    assert "something else than lists of pictures" in error.value.found
    assert "1, 5, 9, 13" in error.value.allowed
    assert error.value.fix


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"not a pickle"])
def test_a_damaged_or_missing_list(tmp_path, content):
    folder = write_coco20i(tmp_path)
    (folder / LIST).write_bytes(content)
    with pytest.raises(DataError, match=r"fold1\.pkl cannot be read"):
        list(open_adapter("coco20i", folder, fold=1).samples("test"))
    (folder / LIST).unlink()
    with pytest.raises(DataError) as error:
        list(open_adapter("coco20i", folder, fold=1).samples("test"))
    assert error.value.found == f"{LIST} cannot be read (No such file or directory)"


def test_a_class_without_a_picture(tmp_path):
    folder = write_coco20i(tmp_path)
    write_pickle(folder / LIST, {k: ["val2014/a.jpg"] if k != 5 else [] for k in range(1, 80, 4)})
    with pytest.raises(DataError, match=r"no picture of bus in splits/coco/val/fold1\.pkl"):
        list(open_adapter("coco20i", folder, fold=1).samples("test"))


def test_a_picture_outside_of_the_folder(tmp_path):
    folder = write_coco20i(tmp_path)
    write_pickle(folder / LIST, {k: ["../../secret.jpg"] for k in range(1, 80, 4)})
    sample = next(open_adapter("coco20i", folder, fold=1).samples("test"))
    with pytest.raises(DataError, match=r"the path `COCO2014/\.\./\.\./secret\.jpg`"):
        sample.load()


def test_all_folds_at_once_to_look_a_folder_through(folder):
    adapter = open_adapter("coco20i", folder, fold="all")
    assert {split: len(list(adapter.samples(split))) for split in adapter.splits()} == {"train": 8, "test": 8}
    assert adapter.vocabulary().unseen_names == ()
