import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.micro import save, write_camvid, write_folder, write_photos
from helpers.zero_shot import write_pascal5i
from ruamel.yaml import YAML

from lexiseg.data import add
from lexiseg.errors import DataError
from lexiseg.storage import hash_tree

add_data = partial(add.add_data, max_pixels=50_000_000)
DATA_DVC = "# data sets\nouts:\n- path: data/world\n  md5: 00.dir  # kept\n  remote: embedded\n"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/data.dvc").write_text(DATA_DVC)
    return tmp_path / "root"


def test_data_is_copied_and_never_pushed(root, tmp_path):
    source = write_camvid(tmp_path / "raw")
    (source / ".git").mkdir()
    (source / ".git/config").touch()
    added = add_data("streets", source, adapter="camvid", root=root)
    assert added.folder == root / "data/streets"
    assert added.splits == {"train": 4, "val": 2, "test": 2}
    assert added.classes == 11
    assert added.changed
    assert added.commands == (("commit", "--force", "data.dvc"),)
    shutil.rmtree(source / ".git")
    assert hash_tree(added.folder) == hash_tree(source)
    text = (root / "data.dvc").read_text()
    assert text.startswith(DATA_DVC)
    assert YAML(typ="safe").load(text)["outs"][1] == {"path": "data/streets", "push": False}
    assert (root / "data/.gitignore").read_text() == "/streets\n"


def test_again_changes_nothing(root, tmp_path):
    source = write_folder(tmp_path / "raw")
    add_data("own", source, adapter="folder", root=root)
    before = hash_tree(root)
    assert not add_data("own", source, adapter="folder", root=root).changed
    assert hash_tree(root) == before


def test_data_that_is_in_place_already(root):
    write_folder(root / "data/own")
    added = add_data("own", root / "data/own", adapter="folder", root=root)
    assert added.changed
    assert "data/own" in (root / "data.dvc").read_text()


def test_without_data_dvc(tmp_path):
    (tmp_path / "root").mkdir()
    add_data("own", write_folder(tmp_path / "raw"), adapter="folder", root=tmp_path / "root")
    assert (tmp_path / "root/data.dvc").read_text() == "outs:\n- path: data/own\n  push: false\n"


def test_other_data_of_that_name(root, tmp_path):
    source = write_folder(tmp_path / "raw")
    add_data("own", source, adapter="folder", root=root)
    before = hash_tree(root)
    (source / "licence.txt").write_text("changed")
    with pytest.raises(DataError) as error:
        add_data("own", source, adapter="folder", root=root)
    assert error.value.found == "data/own exists and holds other files"
    assert "same files" in error.value.allowed
    assert "choose another name" in error.value.fix
    assert hash_tree(root) == before


@pytest.mark.parametrize("name", ["../x", "A", "", "a b", "-x", "a/b"])
def test_bad_names(root, tmp_path, name):
    with pytest.raises(DataError) as error:
        add_data(name, tmp_path, adapter="folder", root=root)
    assert error.value.found == f"the data set name `{name}`"
    assert "small letters" in error.value.allowed


def test_missing_folder_and_adapter(root, tmp_path):
    with pytest.raises(DataError, match="no folder"):
        add_data("own", tmp_path / "nothing", adapter="folder", root=root)
    with pytest.raises(DataError, match="the adapter `cityscapes`"):
        add_data("own", write_folder(tmp_path / "raw"), adapter="cityscapes", root=root)
    assert not (root / "data").exists()


def test_wrong_layout_changes_nothing(root, tmp_path):
    with pytest.raises(DataError, match=r"none of train\.txt"):
        add_data("own", write_folder(tmp_path / "raw"), adapter="camvid", root=root)
    assert hash_tree(root) == {"data.dvc": hash_tree(root)["data.dvc"]}
    assert not (root / "data").exists()


def test_photographs_without_labels(root, tmp_path):
    added = add_data("photos", write_photos(tmp_path / "raw"), adapter="folder", root=root)
    assert (added.splits, added.classes) == ({"train": 3}, 0)
    source = write_folder(tmp_path / "labelled")
    (source / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"and no classes\.txt"):
        add_data("own", source, adapter="folder", root=root)
    assert not (root / "data/own").exists()


def test_first_picture_is_tried(root, tmp_path):
    source = write_folder(tmp_path / "raw")
    (source / "images/train/0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"images/train/0\.png is empty"):
        add_data("own", source, adapter="folder", root=root)
    save(source / "images/train/0.png", np.zeros((20, 24, 3), np.uint8))
    with pytest.raises(DataError, match="24 x 20 pixels"):
        add_data("own", source, adapter="folder", root=root, max_pixels=100)


def test_all_folds_of_a_data_set_are_looked_through(root, tmp_path):
    source = write_pascal5i(tmp_path / "raw")
    added = add_data("pascal", source, adapter="pascal5i", root=root)
    assert (added.splits, added.classes) == ({"train": 8, "test": 8}, 21)
    (source / "splits/pascal/val/fold3.txt").write_text("2007_310__01\n")
    with pytest.raises(DataError, match=r"val/fold3\.txt line 1"):
        add_data("other", source, adapter="pascal5i", root=root)


def test_no_samples(root, tmp_path):
    source = write_folder(tmp_path / "raw")
    shutil.rmtree(source / "images")
    shutil.rmtree(source / "masks")
    (source / "images/train").mkdir(parents=True)
    (source / "captions.jsonl").unlink()
    with pytest.raises(DataError, match="no sample in any split"):
        add_data("own", source, adapter="folder", root=root)


@pytest.mark.parametrize("target", ["/etc/hostname", "../outside.txt", "/etc"])
def test_links_out_of_the_folder(root, tmp_path, target):
    source = write_folder(tmp_path / "raw")
    (tmp_path / "outside.txt").write_text("secret")
    (source / "extra").symlink_to(target)
    with pytest.raises(DataError) as error:
        add_data("own", source, adapter="folder", root=root)
    assert error.value.found.startswith("extra is a link out of the folder")
    assert not (root / "data/own").exists()
    assert "own" not in (root / "data.dvc").read_text()


def test_disk_full_leaves_nothing_half_written(root, tmp_path, monkeypatch):
    source = write_folder(tmp_path / "raw")
    copied = []

    def copy(file, place):
        if len(copied) == 3:
            raise OSError(28, "No space left on device")
        place.write_bytes(file.read_bytes())
        copied.append(place)

    monkeypatch.setattr(add.shutil, "copyfile", copy)
    with pytest.raises(OSError, match="No space left"):
        add_data("own", source, adapter="folder", root=root)
    assert [path.name for path in Path(root / "data").iterdir()] == [".gitignore"]
    assert (root / "data.dvc").read_text() == DATA_DVC
    monkeypatch.undo()
    assert add_data("own", source, adapter="folder", root=root).changed


@pytest.mark.parametrize("text", ["outs: [", "stages: {}\n", "outs:\n- data/world\n"])
def test_broken_data_dvc(root, tmp_path, text):
    (root / "data.dvc").write_text(text)
    with pytest.raises(DataError) as error:
        add_data("own", write_folder(tmp_path / "raw"), adapter="folder", root=root)
    assert error.value.found.startswith("data.dvc cannot be read")
    assert "git checkout data.dvc" in error.value.fix
    assert (root / "data.dvc").read_text() == text
