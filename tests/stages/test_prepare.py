import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.micro import picture, save, settings, shared, write_camvid, write_folder, write_photos, write_world

from lexiseg.data.dataset import PreparedSplit
from lexiseg.data.manifest import SCHEMA, read_manifest
from lexiseg.data.targets import seen_targets
from lexiseg.errors import DataError
from lexiseg.stages import prepare
from lexiseg.storage import hash_tree


def run(raw, out, **data):
    prepare.run(settings(**data), {"data": raw}, out)
    return hash_tree(out)


@pytest.mark.parametrize(("adapter", "write"), [("camvid", write_camvid), ("folder", write_folder)])
def test_bytes_depend_on_the_data_alone(tmp_path, adapter, write):
    one = run(write(tmp_path / "here"), tmp_path / "a/out", name="d", adapter=adapter)
    two = run(write(tmp_path / "there/deep"), tmp_path / "b/c/out", name="d", adapter=adapter)
    assert one == two
    assert sorted(one) == [
        *(
            f"dataset/{split}/{file}"
            for split in ("test", "train", "val")
            for file in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json")
        ),
        "info.json",
        "manifest.parquet",
        "vocabulary.json",
    ]


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path):
    raw = write_folder(tmp_path / "raw")
    for index in range(4, 140):  # more than two chunks
        save(raw / f"images/train/{index:03d}.png", picture(index, height=4, width=4))
    (raw / "images/train/070.png").write_bytes(b"x")
    assert run(raw, tmp_path / "a", adapter="folder", workers=1) == run(
        raw, tmp_path / "b", adapter="folder", workers=2
    )


def test_changed_file_gives_new_rows(tmp_path):
    raw = write_camvid(tmp_path / "raw")
    before = run(raw, tmp_path / "a", adapter="camvid")
    save(raw / "train/train_0.png", picture(999))
    after = run(raw, tmp_path / "b", adapter="camvid")
    assert (PreparedSplit(tmp_path / "b", "train").image(0) == picture(999)).all()
    assert {file for file in before if before[file] != after[file]} == {
        "dataset/train/data-00000-of-00001.arrow",
        "dataset/train/state.json",
        "info.json",
        "manifest.parquet",
    }


def test_info_and_manifest(tmp_path):
    raw = write_folder(tmp_path / "raw")
    (raw / "images/val/1.png").write_bytes(b"")
    run(raw, tmp_path / "out", name="own", adapter="folder")
    info = json.loads((tmp_path / "out/info.json").read_text())
    assert info["name"] == "own"
    assert info["adapter"] == "folder"
    assert info["licence"] == "not stated (no licence.txt)"
    assert info["splits"]["train"] == {"count": 4, "labelled": 4, "captioned": 1, "unreadable": 0}
    assert info["splits"]["val"] == {"count": 1, "labelled": 1, "captioned": 0, "unreadable": 1}
    assert len(info["content_digest"]) == 64
    rows = read_manifest(tmp_path / "out/manifest.parquet")
    assert len(rows) == 8
    assert rows[0]["file"] == "images/train/0.png"
    assert (rows[0]["width"], rows[0]["height"], rows[0]["mask_width"]) == (24, 20, 24)
    assert pq.read_schema(tmp_path / "out/manifest.parquet").names == SCHEMA.names
    assert str(tmp_path) not in str(rows)


def test_bad_samples_are_recorded_with_the_reason(tmp_path):
    raw = write_camvid(tmp_path / "raw")
    (raw / "train/train_0.png").write_bytes(b"")
    (raw / "train/train_1.png").write_bytes((raw / "train/train_1.png").read_bytes()[:300])
    save(raw / "train/train_2.png", picture(1, height=50, width=50))
    (raw / "trainannot/train_3.png").unlink()
    run(raw, tmp_path / "out", name="d", adapter="camvid", max_pixels=2000)
    rows = {row["id"]: row for row in read_manifest(tmp_path / "out/manifest.parquet")}
    assert "train/train_0.png is empty (0 bytes)" in rows["train_0"]["reason"]
    assert "train/train_1.png is damaged" in rows["train_1"]["reason"]
    assert "train/train_2.png has 50 x 50 pixels; allowed: at most 2000" in rows["train_2"]["reason"]
    assert "trainannot/train_3.png cannot be opened" in rows["train_3"]["reason"]
    assert rows["val_0"]["readable"]
    assert len(PreparedSplit(tmp_path / "out", "train")) == 0
    assert PreparedSplit(tmp_path / "out", "val").ids == ["val_0", "val_1"]


def test_mask_of_another_size_is_a_fact(tmp_path):
    raw = write_camvid(tmp_path / "raw")
    save(raw / "valannot/val_0.png", np.zeros((9, 7), np.uint8))
    run(raw, tmp_path / "out", name="d", adapter="camvid")
    row = next(row for row in read_manifest(tmp_path / "out/manifest.parquet") if row["id"] == "val_0")
    assert (row["mask_width"], row["mask_height"], row["width"], row["height"]) == (7, 9, 24, 20)


@pytest.mark.parametrize("exists", [True, False])
def test_missing_data_set(tmp_path, exists):
    if exists:
        (tmp_path / "raw").mkdir()
    with pytest.raises(DataError) as error:
        run(tmp_path / "raw", tmp_path / "out", name="streets", adapter="camvid")
    assert error.value.found == "no data set in data/streets"
    assert "data.dvc" in error.value.allowed
    assert "`lexiseg data add streets PATH --adapter camvid`" in error.value.fix
    assert "`dvc pull data/streets`" in error.value.fix
    assert not (tmp_path / "out").exists()


def test_unknown_adapter(tmp_path):
    with pytest.raises(DataError, match="the adapter `cityscapes`"):
        run(write_camvid(tmp_path / "raw"), tmp_path / "out", adapter="cityscapes")


def test_unseen_classes_are_marked(tmp_path):
    raw = write_folder(tmp_path / "raw")
    before = run(raw, tmp_path / "a", adapter="folder")
    after = run(raw, tmp_path / "b", adapter="folder", unseen=("grass",))
    assert {file for file in before if before[file] != after[file]} == {"vocabulary.json"}
    words = PreparedSplit(tmp_path / "a", "train").vocabulary
    assert words.unseen_names == ("sea",)  # the data set says so itself
    changed = PreparedSplit(tmp_path / "b", "train").vocabulary
    assert changed.unseen_names == ("grass", "sea")
    assert (changed.names, changed.synonyms, changed.things) == (words.names, words.synonyms, words.things)


def test_training_sees_no_label_of_an_unseen_class(tmp_path):
    run(write_camvid(tmp_path / "raw"), tmp_path / "out", adapter="camvid", unseen=("Car", "Sky"))
    split = PreparedSplit(tmp_path / "out", "train")
    semantic = np.stack([sample["semantic"] for sample in map(split.__getitem__, range(len(split)))])
    targets = seen_targets(split.vocabulary)(semantic)
    unseen = np.isin(semantic, [split.vocabulary.index(name) for name in ("Car", "Sky")])
    assert unseen.any()
    assert (targets[unseen] == -100).all()
    assert set(np.unique(targets)) == {-100, *range(9)}


def test_unknown_unseen_classes(tmp_path):
    raw = write_folder(tmp_path / "raw")
    with pytest.raises(DataError) as error:
        run(raw, tmp_path / "out", adapter="folder", unseen=("gras", "sea", "Houseplant", "qqq"))
    assert error.value.found == (
        "`data.unseen` names `gras` (nearest: grass), `Houseplant` (nearest: potted plant), `qqq`"
    )
    assert "spelt as there: grass, potted plant, sea" in error.value.allowed
    assert "correct `data.unseen`" in error.value.fix
    assert not (tmp_path / "out").exists()


def test_photographs_without_labels(tmp_path):
    raw = write_photos(tmp_path / "raw")
    run(raw, tmp_path / "out", name="photos", adapter="folder")
    info = json.loads((tmp_path / "out/info.json").read_text())
    assert info["splits"] == {"train": {"count": 3, "labelled": 0, "captioned": 0, "unreadable": 0}}
    split = PreparedSplit(tmp_path / "out", "train")
    assert split.vocabulary.names == ()
    assert [split[index]["semantic"] for index in range(3)] == [None] * 3
    with pytest.raises(DataError) as error:
        run(raw, tmp_path / "again", adapter="folder", unseen=("sky",))
    assert error.value.found == "`data.unseen` names `sky`"
    assert error.value.allowed == "classes of the data set, spelt as there: it has none"


def test_pictures_in_no_folder_of_a_split(tmp_path):
    raw = write_photos(tmp_path / "raw", count=70)  # more than a chunk: other processes find them, too
    (raw / "images/train").rename(tmp_path / "flat")
    flat = tmp_path / "own/images"
    flat.parent.mkdir()
    (tmp_path / "flat").rename(flat)
    one = run(flat.parent, tmp_path / "a", adapter="folder", workers=2)
    assert one == run(flat.parent, tmp_path / "b", adapter="folder")
    assert len(PreparedSplit(tmp_path / "a", "train")) == 70
    assert read_manifest(tmp_path / "a/manifest.parquet")[0]["file"] == "images/0.png"


def test_nothing_to_train_on(tmp_path):
    raw = write_folder(tmp_path / "raw")
    with pytest.raises(DataError) as error:
        run(raw, tmp_path / "out", adapter="folder", unseen=("grass", "potted plant"))  # the third is unseen anyway
    assert error.value.found == "`data.unseen` leaves no class to train on"
    assert "at least one of grass, potted plant, sea" in error.value.allowed
    assert "take names out" in error.value.fix
    assert not (tmp_path / "out").exists()


def test_escape_in_a_list_file_stops_before_anything_is_written(tmp_path):
    raw = write_camvid(tmp_path / "raw")
    (raw / "test.txt").write_text("test/../../secret.png testannot/test_0.png\n")
    with pytest.raises(DataError, match=r"the path `test/../../secret.png` in test.txt line 1"):
        run(raw, tmp_path / "out", name="d", adapter="camvid")
    assert not (tmp_path / "out").exists()


def test_split_without_samples(tmp_path):
    raw = write_folder(tmp_path / "raw")
    shutil.rmtree(raw / "images/test")
    shutil.rmtree(raw / "masks/test")
    (raw / "images/test").mkdir()
    run(raw, tmp_path / "out", name="d", adapter="folder")
    assert len(PreparedSplit(tmp_path / "out", "test")) == 0


def test_nothing_is_left_beside_the_result(tmp_path):
    run(write_folder(tmp_path / "raw"), tmp_path / "out", name="d", adapter="folder")
    assert sorted(path.name for path in (tmp_path / "out/dataset").iterdir()) == ["test", "train", "val"]


def test_world_fills_every_column(tmp_path):
    raw = write_world(tmp_path / "raw")
    assert run(raw, tmp_path / "out", adapter="world") == run(raw, tmp_path / "again", adapter="world")
    info = json.loads((tmp_path / "out/info.json").read_text())
    assert info["splits"]["iconic"] == {"count": 3, "labelled": 0, "captioned": 3, "unreadable": 0}
    assert info["splits"]["stress"] == {"count": 2, "labelled": 2, "captioned": 2, "unreadable": 0}
    sample = PreparedSplit(tmp_path / "out", "train")[0]
    assert sample["semantic"].shape == sample["panoptic"].shape == (64, 64)
    assert {segment["id"] for segment in sample["segments"]} == set(np.unique(sample["panoptic"])) - {0}
    assert sample["captions"]
    assert set(sample["phrases"][0]) == {"text", "segment_ids"}
    assert set(sample["questions"][0]) == {"question", "answer"}
    iconic = PreparedSplit(tmp_path / "out", "iconic")[0]
    assert iconic["image"].shape == (32, 32, 3)
    assert (iconic["semantic"], iconic["segments"]) == (None, None)
    facts = read_manifest(tmp_path / "out/manifest.parquet")
    assert all(row["segments_agree"] for row in facts if row["split"] != "iconic")


def test_real_photographs(tmp_path):
    raw = shared("data/camvid")
    for split in ("train", "val", "test"):  # a few of each are enough here
        lines = (raw / f"{split}.txt").read_text().splitlines()[:2]
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / f"raw/{split}.txt").write_text("\n".join(lines))
        for file in " ".join(lines).split():
            (tmp_path / "raw" / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(raw / file, tmp_path / "raw" / file)
    shutil.copyfile(raw / "classes.txt", tmp_path / "raw/classes.txt")
    run(tmp_path / "raw", tmp_path / "out", name="camvid", adapter="camvid")
    split = PreparedSplit(tmp_path / "out", "test")
    assert len(split) == 2
    assert split[0]["image"].shape == (360, 480, 3)
    assert split[0]["semantic"].min() == -100
    assert split[0]["semantic"].max() <= 10
