import json

import numpy as np
import pytest
from helpers.micro import mask, picture, save, write_folder, write_photos

from lexiseg.data.adapters.folder import FolderAdapter
from lexiseg.errors import DataError


def test_samples_with_and_without_masks_and_captions(tmp_path):
    folder = write_folder(tmp_path / "d")
    (folder / "masks/train/1.png").unlink()
    adapter = FolderAdapter(folder)
    assert adapter.splits() == ["train", "val", "test"]
    first, second = list(adapter.samples("train"))[:2]
    assert (first.id, first.file) == ("0", "images/train/0.png")
    content = first.load()
    assert content.captions == ["a plant on grass", "grass"]
    assert content.semantic is not None
    assert (content.semantic == mask(0, classes=3)).all()
    content = second.load()
    assert (content.semantic, content.captions) == (None, None)


def test_class_list_with_synonyms_and_flags(tmp_path):
    words = FolderAdapter(write_folder(tmp_path / "d")).vocabulary()
    assert words.names == ("grass", "potted plant", "sea")
    assert words.words("potted plant") == ("potted plant", "houseplant", "plant")
    assert words.unseen_names == ("sea",)
    assert words.things == (False, True, False)


@pytest.mark.parametrize(
    ("classes", "raw", "expected"),
    [
        ("0 a\n1 b", [0, 1, 255], [0, 1, 65535]),
        ("0 a\n255 b", [0, 255, 0], [0, 1, 0]),
        ("10 a\n7 b", [10, 7, 255], [0, 1, 65535]),
    ],
)
def test_ids_become_positions_in_the_list(tmp_path, classes, raw, expected):
    folder = write_folder(tmp_path / "d")
    (folder / "classes.txt").write_text(classes)
    save(folder / "masks/train/0.png", np.array([raw], np.uint8))
    content = next(FolderAdapter(folder).samples("train")).load()
    assert content.semantic is not None
    assert content.semantic.tolist() == [expected]
    assert content.unknown_labels == ()


def test_sixteen_bit_masks(tmp_path):
    folder = write_folder(tmp_path / "d")
    save(folder / "masks/train/0.png", np.array([[2, 65535, 300]], np.uint16))
    content = next(FolderAdapter(folder).samples("train")).load()
    assert content.semantic is not None
    assert content.semantic.tolist() == [[2, 65535, 65535]]
    assert content.unknown_labels == (300,)


@pytest.mark.parametrize("line", ["grass", "0 a [maybe]", "0 a\n0 b", "65535 a", "0 a [thing", "-1 a"])
def test_faulty_class_list(tmp_path, line):
    folder = write_folder(tmp_path / "d")
    (folder / "classes.txt").write_text(line)
    with pytest.raises(DataError) as error:
        FolderAdapter(folder).vocabulary()
    assert "classes.txt line" in error.value.found
    assert "id name | synonym, synonym [unseen] [thing]" in error.value.allowed
    assert "classes.txt" in error.value.fix


def test_two_classes_of_one_name(tmp_path):
    folder = write_folder(tmp_path / "d")
    (folder / "classes.txt").write_text("0 a\n1 a\n")
    with pytest.raises(DataError, match="repeated names"):
        FolderAdapter(folder).vocabulary()


def test_mask_without_picture(tmp_path):
    folder = write_folder(tmp_path / "d")
    save(folder / "masks/val/0_mask.png", mask(1, classes=3))
    (folder / "masks/val/.DS_Store").touch()
    with pytest.raises(DataError) as error:
        list(FolderAdapter(folder).samples("val"))
    assert error.value.found == "1 mask(s) without a picture in masks/val/: 0_mask.png"
    assert "masks/val/<stem>.png" in error.value.allowed
    assert "names of their pictures" in error.value.fix


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[]",
        json.dumps({"image": "train/0.png"}),
        json.dumps({"image": "train/0.png", "captions": []}),
        json.dumps({"image": "train/0.png", "captions": "a dog"}),
        json.dumps({"image": "train/missing.png", "captions": ["a"]}),
    ],
)
def test_faulty_captions(tmp_path, line):
    folder = write_folder(tmp_path / "d")
    (folder / "captions.jsonl").write_text(line + "\n")
    with pytest.raises(DataError) as error:
        list(FolderAdapter(folder).samples("train"))
    assert error.value.found.startswith("captions.jsonl line 1: `")
    assert '{"image": "train/dog.jpg"' in error.value.allowed
    assert "captions.jsonl" in error.value.fix


def test_caption_for_a_file_elsewhere(tmp_path):
    folder = write_folder(tmp_path / "d")
    (folder / "captions.jsonl").write_text(json.dumps({"image": "../../x.png", "captions": ["a"]}))
    with pytest.raises(DataError, match=r"the path `../../x.png` in captions.jsonl line 1"):
        list(FolderAdapter(folder).samples("train"))


@pytest.mark.parametrize("write", ["", "photo.jpg", "images/notes.txt", "images/.thumbnails/photo.jpg"])
def test_other_layout(tmp_path, write):
    if write:
        (tmp_path / "d" / write).parent.mkdir(parents=True)
        (tmp_path / "d" / write).touch()
    with pytest.raises(DataError) as error:
        FolderAdapter(tmp_path / "d").splits()
    assert error.value.found == "no picture and no folder in images/ of d/"
    assert "images/train/" in error.value.allowed
    assert "or all of them in images/" in error.value.allowed
    assert "arrange the pictures" in error.value.fix


def test_photographs_alone(tmp_path):
    adapter = FolderAdapter(write_photos(tmp_path / "d"))
    assert adapter.splits() == ["train"]
    assert adapter.vocabulary().names == ()
    contents = [sample.load() for sample in adapter.samples("train")]
    assert [content.image.shape for content in contents if content.image is not None] == [
        (20, 40, 3),
        (24, 36, 3),
        (28, 32, 3),
    ]
    assert {(content.semantic is None, content.captions, content.unknown_labels) for content in contents} == {
        (True, None, ())
    }


def test_an_empty_folder_of_masks_is_none(tmp_path):
    folder = write_photos(tmp_path / "d")
    (folder / "masks/train").mkdir(parents=True)
    (folder / "masks/train/.DS_Store").touch()
    assert FolderAdapter(folder).vocabulary().names == ()


def test_pictures_in_images_itself_are_the_split_train(tmp_path):
    folder = tmp_path / "d"
    for index in range(2):
        save(folder / f"images/{index}.png", picture(index))
    (folder / "images/.thumbnails").mkdir()
    adapter = FolderAdapter(folder)
    assert adapter.splits() == ["train"]
    assert [(sample.id, sample.file) for sample in adapter.samples("train")] == [
        ("0", "images/0.png"),
        ("1", "images/1.png"),
    ]
    assert adapter.vocabulary().names == ()


def test_their_masks_and_captions_lie_alike(tmp_path):
    folder = write_folder(tmp_path / "d")
    flat = tmp_path / "flat"
    flat.mkdir()
    for kind in ("images", "masks"):
        (folder / kind / "train").rename(flat / kind)
    (flat / "classes.txt").write_text((folder / "classes.txt").read_text())
    (flat / "captions.jsonl").write_text(json.dumps({"image": "0.png", "captions": ["a plant"]}))
    first, *others = [sample.load() for sample in FolderAdapter(flat).samples("train")]
    assert first.semantic is not None
    assert (first.semantic == mask(0, classes=3)).all()
    assert first.captions == ["a plant"]
    assert [content.captions for content in others] == [None] * 3
    save(flat / "masks/9.png", mask(9, classes=3))
    with pytest.raises(DataError) as error:
        list(FolderAdapter(flat).samples("train"))
    assert error.value.found == "1 mask(s) without a picture in masks/: 9.png"
    assert error.value.allowed == "masks/<stem>.png for a picture images/<stem>.*"


def test_pictures_beside_splits(tmp_path):
    folder = write_folder(tmp_path / "d")
    save(folder / "images/x.png", picture(1))
    with pytest.raises(DataError) as error:
        FolderAdapter(folder).splits()
    assert error.value.found == "pictures (x.png, …) and folders (test/, …) side by side in images/"
    assert "or all of them in images/" in error.value.allowed
    assert "arrange the pictures" in error.value.fix


def test_masks_without_a_list_of_classes(tmp_path):
    folder = write_folder(tmp_path / "d")
    (folder / "classes.txt").unlink()
    with pytest.raises(DataError) as error:
        FolderAdapter(folder).vocabulary()
    assert error.value.found.startswith("masks (masks/t")
    assert error.value.found.endswith(", …) and no classes.txt")
    assert "a line for each id in the masks" in error.value.allowed
    assert "list the classes in classes.txt; or remove masks/" in error.value.fix


@pytest.mark.parametrize("text", ["", "# 0 grass\n\n"])
def test_a_list_without_classes(tmp_path, text):
    folder = write_photos(tmp_path / "d")
    (folder / "classes.txt").write_text(text)
    with pytest.raises(DataError) as error:
        FolderAdapter(folder).vocabulary()
    assert error.value.found == "classes.txt lists no class"
    assert "one class per line" in error.value.allowed
    assert "or remove classes.txt and masks/" in error.value.fix


def test_licence(tmp_path):
    folder = write_folder(tmp_path / "d")
    assert FolderAdapter(folder).licence == "not stated (no licence.txt)"
    (folder / "licence.txt").write_text("CC BY 4.0\n")
    assert FolderAdapter(folder).licence == "CC BY 4.0"


def test_other_picture_formats(tmp_path):
    folder = write_folder(tmp_path / "d")
    for ending in ("jpg", "JPEG", "webp", "bmp", "tif"):
        save(folder / f"images/more/{ending}.{ending}", picture(1))
    (folder / "images/more/notes.txt").write_text("x")
    adapter = FolderAdapter(folder)
    assert adapter.splits() == ["train", "val", "test", "more"]
    contents = {sample.id: sample.load() for sample in adapter.samples("more")}
    assert sorted(contents) == ["JPEG", "bmp", "jpg", "tif", "webp"]
    assert contents["jpg"].image_bytes is not None
    assert contents["bmp"].image_bytes is None
