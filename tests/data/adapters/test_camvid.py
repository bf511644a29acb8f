import numpy as np
import pytest
from helpers.micro import CAMVID_NAMES, mask, picture, save, shared, write_camvid

from lexiseg.data.adapters import ADAPTERS, open_adapter
from lexiseg.data.adapters.camvid import CamvidAdapter
from lexiseg.errors import DataError


def test_samples_in_the_order_of_the_list(tmp_path):
    adapter = CamvidAdapter(write_camvid(tmp_path / "d"))
    assert adapter.splits() == ["train", "val", "test"]
    samples = list(adapter.samples("train"))
    assert [sample.id for sample in samples] == ["train_0", "train_1", "train_2", "train_3"]
    assert samples[1].file == "train/train_1.png"
    content = samples[1].load()
    assert content.image is not None
    assert content.semantic is not None
    assert (content.image == picture(1)).all()
    raw = mask(1, classes=12).astype(int)
    assert (content.semantic == np.where(raw == 11, 65535, raw)).all()
    assert content.unknown_labels == ()
    assert content.captions is None


def test_vocabulary_has_words_for_text_tables(tmp_path):
    words = CamvidAdapter(write_camvid(tmp_path / "d")).vocabulary()
    assert list(words.names) == CAMVID_NAMES[:-1]
    assert words.words("Sky")[:3] == ("Sky", "sky", "sky-other-merged")
    assert words.words("Pedestrian")[-1] == "person"
    assert words.things[words.index("Car")]
    assert not words.things[words.index("Road")]


@pytest.mark.parametrize(
    ("table", "missing"),
    [
        ("coco_panoptic133_clip_vitb16", {"Pole"}),
        ("cocostuff182_word2vec", {"Pole"}),
        ("lvis1203_clip_vitb32", {"Sky", "Building", "Road", "Pavement", "Tree", "Fence"}),
    ],
)
def test_synonyms_find_rows_in_published_tables(tmp_path, table, missing):
    rows = set(shared(f"weights/text_embeddings/{table}.names.txt").read_text().splitlines())
    words = CamvidAdapter(write_camvid(tmp_path / "d")).vocabulary()
    assert {name for name in words.names if not rows & set(words.words(name))} == missing


def test_label_outside_the_list(tmp_path):
    folder = write_camvid(tmp_path / "d")
    save(folder / "trainannot/train_0.png", np.full((20, 24), 37, np.uint8))
    content = next(CamvidAdapter(folder).samples("train")).load()
    assert content.unknown_labels == (37,)
    assert content.semantic is not None
    assert (content.semantic == 65535).all()


def test_escape_in_a_list_file(tmp_path):
    folder = write_camvid(tmp_path / "d")
    (folder / "train.txt").write_text("../x.png trainannot/x.png\n")
    with pytest.raises(DataError, match=r"the path `../x.png` in train.txt line 1"):
        list(CamvidAdapter(folder).samples("train"))


def test_line_of_one_word(tmp_path):
    folder = write_camvid(tmp_path / "d")
    (folder / "val.txt").write_text("val/a.png\n")
    with pytest.raises(DataError) as error:
        list(CamvidAdapter(folder).samples("val"))
    assert error.value.found == "val.txt line 1: `val/a.png`"
    assert "two paths" in error.value.allowed
    assert "val.txt" in error.value.fix


@pytest.mark.parametrize("line", ["x Sky", "0", "0 Sky\n0 Road", "300 Sky"])
def test_faulty_class_list(tmp_path, line):
    folder = write_camvid(tmp_path / "d")
    (folder / "classes.txt").write_text(line)
    with pytest.raises(DataError, match=r"classes\.txt line"):
        CamvidAdapter(folder).vocabulary()


@pytest.mark.parametrize("text", ["", "0 Void 0 0 0\n"])
def test_a_list_without_classes(tmp_path, text):
    folder = write_camvid(tmp_path / "d")
    (folder / "classes.txt").write_text(text)
    with pytest.raises(DataError) as error:
        CamvidAdapter(folder).vocabulary()
    assert error.value.found == "classes.txt lists no class"
    assert "one class per line" in error.value.allowed
    assert "--adapter folder" in error.value.fix


def test_other_layout(tmp_path):
    with pytest.raises(DataError) as error:
        CamvidAdapter(tmp_path).splits()
    assert "none of train.txt, val.txt and test.txt" in error.value.found
    assert "--adapter folder" in error.value.fix
    with pytest.raises(DataError, match=r"classes\.txt cannot be read"):
        CamvidAdapter(tmp_path).vocabulary()


def test_registry(tmp_path):
    assert open_adapter("camvid", tmp_path).name == "camvid"
    with pytest.raises(DataError) as error:
        open_adapter("cityscapes", tmp_path)
    assert error.value.found == "the adapter `cityscapes`"
    assert error.value.allowed == f"one of {', '.join(sorted(ADAPTERS))}"
    assert "data.adapter" in error.value.fix


def test_real_photographs():
    adapter = CamvidAdapter(shared("data/camvid"))
    counts = {split: len(list(adapter.samples(split))) for split in adapter.splits()}
    assert counts == {"train": 90, "val": 30, "test": 60}
    assert list(adapter.vocabulary().names) == CAMVID_NAMES[:-1]
    content = next(adapter.samples("test")).load()
    assert content.image is not None
    assert content.semantic is not None
    assert content.image.shape == (360, 480, 3)
    assert set(np.unique(content.semantic)) <= {*range(11), 65535}
    assert content.image_bytes is not None
