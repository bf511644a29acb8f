import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from helpers.micro import picture

from lexiseg.data import features
from lexiseg.data.features import FEATURES, SplitWriter
from lexiseg.data.rows import png
from lexiseg.storage import hash_tree

IDS = np.array([[0, 255, 256, 65535]], np.uint16)
FULL = {
    "id": "a",
    "image": png(picture(1)),
    "semantic": png(IDS),
    "panoptic": png(IDS),
    "segments": [{"id": 300, "class_id": 2, "thing": True}],
    "captions": ["one", "two"],
    "phrases": [{"text": "the ring", "segment_ids": [300]}],
    "questions": [{"question": "how many?", "answer": "one"}],
}
BARE = {**dict.fromkeys(FULL), "id": "b", "image": png(picture(2))}


def write(folder, *, chunks):
    with SplitWriter(folder) as writer:
        for chunk in chunks:
            writer.add(chunk)
        writer.finish(fingerprint="f" * 64)
    return load_from_disk(folder)


def test_the_datasets_library_reads_it(tmp_path):
    rows = write(tmp_path / "train", chunks=[[FULL], [BARE]])
    assert isinstance(rows, Dataset)
    assert rows.features == FEATURES
    assert np.array_equal(np.asarray(rows[0]["image"]), picture(1))
    assert np.asarray(rows[0]["semantic"]).tolist() == IDS.tolist()
    assert {name: rows[0][name] for name in ("segments", "captions", "phrases", "questions")} == {
        name: FULL[name] for name in ("segments", "captions", "phrases", "questions")
    }
    assert [rows[1][name] for name in ("semantic", "panoptic", "segments", "captions")] == [None] * 4


def test_bytes_do_not_depend_on_chunks_or_place(tmp_path):
    write(tmp_path / "a/train", chunks=[[FULL], [BARE]])
    write(tmp_path / "b/c/train", chunks=[[FULL, BARE], []])
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b/c")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["train"]


def test_large_splits_have_at_most_four_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_SHARD_BYTES", 1000)
    rows = write(tmp_path / "train", chunks=[[BARE] * 9])
    assert len(rows) == 9
    assert len(list((tmp_path / "train").glob("*.arrow"))) == 4


def interrupted(folder):
    with SplitWriter(folder) as writer:
        writer.add([FULL])
        raise KeyboardInterrupt


def test_interruption_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "train")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed(tmp_path):
    killed = SplitWriter(tmp_path / "a/train")
    killed.add([FULL])
    (tmp_path / "a/train").mkdir()
    (tmp_path / "a/train/data-00000-of-00009.arrow").touch()
    write(tmp_path / "a/train", chunks=[[FULL]])
    write(tmp_path / "b/train", chunks=[[FULL]])
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b")
