import pickle

import numpy as np
import pytest
from helpers.micro import mask, picture, settings, write_camvid, write_folder, write_photos
from torch.utils.data import DataLoader

from lexiseg.data.dataset import PreparedSplit
from lexiseg.errors import DataError
from lexiseg.stages import prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    prepare.run(settings(name="own", adapter="folder"), {"data": write_folder(root / "raw")}, root / "out")
    return root / "out"


def test_samples_come_back(prepared):
    split = PreparedSplit(prepared, "train")
    assert len(split) == 4
    assert split.ids == ["0", "1", "2", "3"]
    assert split.vocabulary.names == ("grass", "potted plant", "sea")
    sample = split[1]
    assert sample["id"] == "1"
    assert sample["image"].dtype == np.uint8
    assert (sample["image"] == picture(201)).all()
    assert sample["semantic"].dtype == np.int64
    assert (sample["semantic"] == mask(1, classes=3)).all()
    for absent in ("panoptic", "segments", "captions", "phrases", "questions"):
        assert sample[absent] is None
    assert split[0]["captions"] == ["a plant on grass", "grass"]
    assert (split.image(-1) == picture(203)).all()
    assert (split.semantic(-1) == split[3]["semantic"]).all()
    assert split.captions == [["a plant on grass", "grass"], None, None, None]


def test_pixels_without_a_label_are_minus_100(tmp_path):
    prepare.run(settings(name="camvid", adapter="camvid"), {"data": write_camvid(tmp_path / "raw")}, tmp_path / "out")
    split, raw = PreparedSplit(tmp_path / "out", "val"), mask(100, classes=12).astype(np.int64)
    for semantic in (split[0]["semantic"], split.semantic(0)):
        assert semantic is not None
        assert semantic.dtype == np.int64
        assert (semantic == np.where(raw == 11, -100, raw)).all()


def test_a_picture_without_labels_has_none(tmp_path):
    prepare.run(settings(name="own", adapter="folder"), {"data": write_photos(tmp_path / "raw")}, tmp_path / "out")
    split = PreparedSplit(tmp_path / "out", "train")
    assert split.semantic(0) is None
    assert split[0]["semantic"] is None


def test_index_outside(prepared):
    split = PreparedSplit(prepared, "val")
    for index in (2, -3):
        with pytest.raises(IndexError, match="`val`, which has 2"):
            split[index]


def test_travels_to_workers(prepared):
    split = PreparedSplit(prepared, "train")
    again = pickle.loads(pickle.dumps(split))
    assert again.ids == split.ids
    assert (again[3]["image"] == split[3]["image"]).all()
    loader = DataLoader(split, batch_size=2, num_workers=1, collate_fn=list)
    assert [sample["id"] for batch in loader for sample in batch] == split.ids


def test_unknown_split(prepared):
    with pytest.raises(DataError) as error:
        PreparedSplit(prepared, "validation")
    assert error.value.found == "the split `validation`"
    assert error.value.allowed == "one of test, train, val"
    assert "dvc repro prepare" in error.value.fix


def test_nothing_prepared(tmp_path):
    with pytest.raises(DataError) as error:
        PreparedSplit(tmp_path, "train")
    assert "no prepared data set" in error.value.found
    assert error.value.fix == "run `dvc repro prepare`"
