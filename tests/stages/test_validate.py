import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from helpers.micro import mask, picture, save, settings, shared, write_camvid, write_folder, write_photos, write_world

from lexiseg.data.adapters.folder import FolderAdapter
from lexiseg.data.docs import write_data_docs
from lexiseg.errors import DataError
from lexiseg.stages import prepare, validate
from lexiseg.storage import hash_tree, write_text


@pytest.fixture(autouse=True)
def _working_tree(tmp_path, monkeypatch):
    for name in ("dvc.yaml", "params.yaml", "below/file"):
        write_text(tmp_path / "tree" / name, "")
    monkeypatch.chdir(tmp_path / "tree/below")


def run(raw, tmp_path, *, adapter="camvid", **data):
    root = settings(name="d", adapter=adapter, **data)
    prepare.run(root, {"data": raw}, tmp_path / "prepare")
    validate.run(root, {"prepare": tmp_path / "prepare"}, tmp_path / "validate")
    return json.loads((tmp_path / "validate/validation.json").read_text())


def refused(raw, tmp_path, **data):
    with pytest.raises(DataError) as error:
        run(raw, tmp_path, **data)
    assert not (tmp_path / "validate").exists()
    report = json.loads((tmp_path / "tree/.lexiseg/validation/validation.json").read_text())
    assert not report["success"]
    assert ".lexiseg/validation/validation.json" in error.value.fix
    assert "fails" in error.value.found
    assert error.value.allowed
    failed = {entry["name"]: entry for entry in report["expectations"] if not entry["success"]}
    for name, entry in failed.items():
        if entry["severity"] == "error":
            assert name in error.value.found
            assert f"{name}: {entry['fix']}" in error.value.fix
    return error.value, failed


def test_good_data(tmp_path):
    report = run(write_camvid(tmp_path / "raw"), tmp_path)
    assert report["success"]
    assert all(entry["success"] for entry in report["expectations"])
    names = [entry["name"] for entry in report["expectations"]]
    assert names == sorted(names)
    assert report["counts"]["train"] == {"samples": 4, "readable": 4, "labelled": 4, "captioned": 0}
    assert not (tmp_path / "tree/.lexiseg").exists()


def test_report_is_the_same_in_every_folder(tmp_path):
    run(write_folder(tmp_path / "raw"), tmp_path, adapter="folder")
    again = tmp_path / "again"
    validate.run(settings(name="d"), {"prepare": tmp_path / "prepare"}, again)
    assert hash_tree(again) == hash_tree(tmp_path / "validate")


def test_unreadable_samples(tmp_path):
    raw = write_camvid(tmp_path / "raw")
    (raw / "train/train_0.png").write_bytes(b"")
    (raw / "val/val_1.png").write_bytes(b"no picture")
    error, failed = refused(raw, tmp_path)
    assert list(failed) == ["readable"]
    assert failed["readable"]["unexpected_count"] == 2
    assert [sample["id"] for sample in failed["readable"]["samples"]] == ["train/train_0", "val/val_1"]
    assert "train/train_0: found: train/train_0.png is empty (0 bytes)" in error.found
    assert "mend or remove" in error.fix


def test_decompression_bomb(tmp_path):
    raw = write_camvid(tmp_path / "raw")
    save(raw / "test/test_0.png", picture(1, height=60, width=60))
    error, failed = refused(raw, tmp_path, max_pixels=1000)
    assert list(failed) == ["readable"]
    assert "test/test_0.png has 60 x 60 pixels" in error.found


def test_label_outside_the_vocabulary(tmp_path):
    raw = write_camvid(tmp_path / "raw")
    save(raw / "valannot/val_0.png", np.full((20, 24), 37, np.uint8) * (np.arange(24) > 3))
    error, failed = refused(raw, tmp_path)
    assert list(failed) == ["labels_in_vocabulary"]
    assert failed["labels_in_vocabulary"]["samples"] == [{"id": "val/val_0", "found": "ids 37"}]
    assert "labels_in_vocabulary: val/val_0: ids 37" in error.found


def test_mask_of_another_size(tmp_path):
    raw = write_camvid(tmp_path / "raw")
    save(raw / "trainannot/train_2.png", mask(1, classes=11, height=9, width=7))
    error, failed = refused(raw, tmp_path)
    assert list(failed) == ["mask_size"]
    assert "train/train_2: mask 7 x 9, picture 24 x 20" in error.found
    assert "nearest neighbour" in error.fix


def test_mask_without_any_label(tmp_path):
    raw = write_camvid(tmp_path / "raw")
    save(raw / "trainannot/train_2.png", np.full((20, 24), 11, np.uint8))
    error, failed = refused(raw, tmp_path)
    assert list(failed) == ["ignored_share"]
    assert "train/train_2: 100.0% of the pixels without a label" in error.found


def test_empty_split(tmp_path):
    raw = write_camvid(tmp_path / "raw")
    (raw / "test.txt").write_text("")
    error, failed = refused(raw, tmp_path)
    assert list(failed) == ["required_splits"]
    assert "no readable sample in test" in error.found
    assert "data.required_splits" in error.fix
    report = run(raw, tmp_path, required_splits=("train", "val"))
    assert report["success"]


def test_no_samples_at_all(tmp_path):
    raw = write_camvid(tmp_path / "raw")
    for split in ("train", "val", "test"):
        (raw / f"{split}.txt").write_text("")
    error, failed = refused(raw, tmp_path)
    assert set(failed) == {"required_splits", "row_count"}
    assert "no readable sample in test, train, val" in error.found


def test_duplicates_across_splits(tmp_path):
    raw = write_camvid(tmp_path / "raw")
    save(raw / "test/test_1.png", picture(2))  # the pixels of train_2, in another file
    error, failed = refused(raw, tmp_path)
    assert list(failed) == ["duplicates_across_splits"]
    assert "test/test_1: the same picture as train/train_2" in error.found
    assert "train/train_2: the same picture as test/test_1" in error.found


def test_duplicates_within_a_split_are_a_warning(tmp_path, capsys):
    raw = write_camvid(tmp_path / "raw")
    save(raw / "train/train_1.png", picture(0))
    report = run(raw, tmp_path)
    assert report["success"]
    entry = next(entry for entry in report["expectations"] if entry["name"] == "duplicates_within_split")
    assert (entry["success"], entry["severity"], entry["unexpected_count"]) == (False, "warning", 2)
    assert "warning: duplicates_within_split: train/train_0: the same picture as" in capsys.readouterr().err


def test_two_samples_of_one_id(tmp_path):
    raw = write_folder(tmp_path / "raw")
    save(raw / "images/train/0.bmp", picture(77))
    _, failed = refused(raw, tmp_path, adapter="folder")
    assert list(failed) == ["unique_ids"]
    assert [sample["found"] for sample in failed["unique_ids"]["samples"]] == [
        "images/train/0.bmp",
        "images/train/0.png",
    ]


def test_captions_and_small_pictures(tmp_path):
    raw = write_folder(tmp_path / "raw")
    lines = [{"image": "val/0.png", "captions": ["", "a"]}, {"image": "val/1.png", "captions": ["a " * 30]}]
    (raw / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    error, failed = refused(raw, tmp_path, adapter="folder", max_caption_words=20, min_side=21)
    assert set(failed) == {"captions_not_empty", "caption_length", "smallest_size"}
    assert "caption_length: val/1: 30 words" in error.found
    assert "smallest_size: test/0: 24 x 20; test/1: 24 x 20; train/0: 24 x 20 (and 5 more)" in error.found


def test_long_lists_are_cut_and_sorted(tmp_path):
    raw = write_folder(tmp_path / "raw")
    for index in range(30):
        save(raw / f"images/train/x{29 - index:02d}.png", picture(500 + index, height=3, width=3))
    _, failed = refused(raw, tmp_path, adapter="folder")
    samples = [sample["id"] for sample in failed["smallest_size"]["samples"]]
    assert failed["smallest_size"]["unexpected_count"] == 30
    assert samples == [f"train/x{index:02d}" for index in range(20)]


def test_nothing_prepared(tmp_path):
    with pytest.raises(DataError) as error:
        validate.run(settings(name="d"), {"prepare": tmp_path}, tmp_path / "out")
    assert "no manifest" in error.value.found
    assert error.value.fix == "run `dvc repro prepare`"


def test_data_docs_are_a_page_that_needs_no_network(tmp_path):
    raw = write_folder(tmp_path / "raw")
    save(raw / "images/train/<img src=x>.png", picture(1, height=3, width=3))
    with pytest.raises(DataError):
        run(raw, tmp_path, adapter="folder")
    page = write_data_docs(tmp_path / "prepare", tmp_path / "docs", data=settings(name="d").data)
    text = page.read_text()
    assert page == tmp_path / "docs/index.html"
    assert "9 samples; 14 of 15 expectations are met." in text
    assert ": an error, the graph stops here</li>" in text
    assert "Each mask has the size of its picture." in text
    assert "&lt;img src=x&gt;" in text
    assert "<img" not in text
    assert "<script" not in text
    assert "http" not in text


def test_world_is_good_data(tmp_path):
    report = run(write_world(tmp_path / "raw"), tmp_path, adapter="world")
    assert all(entry["success"] for entry in report["expectations"])
    assert report["counts"]["iconic"] == {"samples": 3, "readable": 3, "labelled": 0, "captioned": 3}


def test_photographs_without_labels(tmp_path):
    report = run(write_photos(tmp_path / "raw"), tmp_path, adapter="folder", required_splits=("train",))
    assert all(entry["success"] for entry in report["expectations"])
    assert report["counts"] == {"train": {"samples": 3, "readable": 3, "labelled": 0, "captioned": 0}}
    page = write_data_docs(tmp_path / "prepare", tmp_path / "docs", data=settings(required_splits=("train",)).data)
    assert "3 samples; 15 of 15 expectations are met." in page.read_text()


def test_photographs_are_checked_like_any(tmp_path, capsys):
    raw = write_photos(tmp_path / "raw")
    save(raw / "images/train/copy.png", picture(600, height=20, width=40))
    (raw / "images/train/broken.jpg").write_bytes(b"x")
    error, failed = refused(raw, tmp_path, adapter="folder", min_side=24)
    assert set(failed) == {"required_splits", "readable", "smallest_size", "duplicates_within_split"}
    assert "no readable sample in test, val" in error.found
    assert "images/train/broken.jpg is not a picture" in error.found
    assert "smallest_size: train/0: 40 x 20; train/copy: 40 x 20" in error.found
    assert "duplicates_within_split: train/0: the same picture as train/copy" in capsys.readouterr().err


def test_panoptic_mask_that_differs_from_its_table(tmp_path, monkeypatch):
    table = [{"id": 9, "class_id": 0, "thing": False}]
    load = FolderAdapter._load
    panoptic = np.ones((20, 24), np.uint16)
    monkeypatch.setattr(
        FolderAdapter,
        "_load",
        lambda self, path, mask: replace(load(self, path, mask), panoptic=panoptic, segments=table),
    )
    error, failed = refused(write_folder(tmp_path / "raw"), tmp_path, adapter="folder")
    assert list(failed) == ["panoptic"]
    assert "segment tables agree" in error.fix


def test_real_photographs(tmp_path):
    raw = shared("data/camvid")
    (tmp_path / "raw").mkdir()
    for folder in ("val", "valannot"):
        shutil.copytree(raw / folder, tmp_path / "raw" / folder)
    for file in ("val.txt", "classes.txt"):
        shutil.copyfile(raw / file, tmp_path / "raw" / file)
    report = run(tmp_path / "raw", tmp_path, required_splits=("val",))
    assert report["success"]
    assert all(entry["success"] for entry in report["expectations"])
    assert report["counts"] == {"val": {"samples": 30, "readable": 30, "labelled": 30, "captioned": 0}}
