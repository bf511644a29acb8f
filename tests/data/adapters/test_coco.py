import csv
import json
import shutil

import numpy as np
import pytest
from helpers.coco import CAPTIONS, CATEGORIES, colours, segment_ids, segments, write_coco, write_selection
from helpers.micro import HEIGHT, WIDTH, picture, save, settings, shared
from helpers.working_tree import SOURCE
from PIL import Image

from lexiseg.data.adapters import coco
from lexiseg.data.adapters.coco import CocoAdapter
from lexiseg.data.adapters.coco_words import STUFF, THINGS, synonyms
from lexiseg.data.manifest import read_manifest
from lexiseg.data.pool import Pool, Source
from lexiseg.errors import DataError
from lexiseg.settings import read_yaml
from lexiseg.stages import prepare

TRAIN = "annotations/panoptic_train2017.json"


@pytest.fixture
def folder(tmp_path):
    return write_coco(tmp_path / "d")


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def load(folder, split="train", index=0):
    return list(CocoAdapter(folder).samples(split))[index].load()


@pytest.mark.parametrize(
    ("write", "place", "splits"),
    [
        (write_coco, "train2017", ["train", "val"]),
        (write_selection, "images/train2017", ["train", "val", "captions"]),
    ],
)
def test_both_layouts(tmp_path, write, place, splits):
    folder = write(tmp_path / "d")
    adapter = CocoAdapter(folder)
    assert adapter.splits() == splits
    samples = list(adapter.samples("train"))
    assert [sample.id for sample in samples] == ["000000000010", "000000000011", "000000000012"]
    assert samples[1].file == f"{place}/000000000011.jpg"
    content = samples[1].load()
    assert content.image is not None
    assert content.semantic is not None
    assert content.panoptic is not None
    assert content.image_bytes == (folder / place / "000000000011.jpg").read_bytes()
    ids = segment_ids(11)
    semantic, panoptic = np.full(ids.shape, 65535), np.zeros(ids.shape)
    for number, segment in enumerate(segments(11), start=1):
        here = ids == segment["id"]
        semantic[here] = [category["id"] for category in CATEGORIES].index(segment["category_id"])
        panoptic[here] = number
    assert content.semantic.dtype == content.panoptic.dtype == np.uint16
    assert (content.semantic == semantic).all()
    assert (content.panoptic == panoptic).all()
    assert content.segments == [
        {"id": 1, "class_id": 0, "thing": True},
        {"id": 2, "class_id": 1, "thing": True},
        {"id": 3, "class_id": 2, "thing": False},
        {"id": 4, "class_id": 3, "thing": False},
    ]
    assert content.unknown_labels == ()
    assert load(folder, "val").captions == CAPTIONS
    words = adapter.vocabulary()
    assert words.names == ("person", "bus", "snow", "grass-merged")
    assert words.things == (True, True, False, False)
    assert "CC BY 4.0" in adapter.licence
    assert "each photograph has terms of its own" in adapter.licence


def test_photographs_with_captions_alone(tmp_path):
    content = load(write_selection(tmp_path / "d"), "captions")
    assert content.captions == CAPTIONS
    assert (content.semantic, content.panoptic, content.segments) == (None, None, None)
    assert load(tmp_path / "d", "train").captions is None


def test_photographs_may_lie_in_images(folder):
    (folder / "images").mkdir()
    shutil.move(folder / "train2017", folder / "images/train2017")
    assert load(folder).captions == CAPTIONS
    assert CocoAdapter(folder).splits() == ["train", "val"]


def test_the_words_are_those_of_coco_and_of_its_text_table():
    names = shared("weights/text_embeddings/coco_panoptic133_clip_vitb16.names.txt").read_text().splitlines()
    assert [*THINGS, *STUFF] == names


@pytest.mark.parametrize(
    ("word", "name"),
    [
        *(("grass", "grass-merged"), ("sky", "sky-other-merged"), ("wall", "wall-other-merged")),
        *(("door", "door-stuff"), ("window", "window-other"), ("wooden floor", "floor-wood")),
        *(("sofa", "couch"), ("man", "person"), ("woman", "person"), ("child", "person")),
        *(("aeroplane", "airplane"), ("pottedplant", "potted plant"), ("sidewalk", "pavement-merged")),
    ],
)
def test_usual_words_mean_a_class(tmp_path, word, name):
    shutil.copytree(write_coco(tmp_path / "d") / "train2017", tmp_path / "photographs/train2017")
    words = CocoAdapter(tmp_path / "photographs").vocabulary()  # the usual classes, as no list says otherwise
    assert len(words) == 133  # and no word means two of them, or there would be no vocabulary
    assert [other for other in words.names if word in words.words(other)] == [name]
    assert words.things[words.index("couch")]
    assert not words.things[words.index("floor-wood")]


def test_a_word_that_is_a_class_means_that_class():
    assert synonyms(["grass-merged", "moss", "wall-brick", "unheard of"]) == {
        "grass-merged": ("grass", "lawn", "straw"),
        "wall-brick": ("brick wall",),
    }


def test_a_crowd_is_labelled_but_no_segment(folder):
    change(folder / TRAIN, lambda content: content["annotations"][-1]["segments_info"][1].update(iscrowd=1))
    content = load(folder)
    assert content.semantic is not None
    assert content.panoptic is not None
    crowd = segment_ids(10) == segments(10)[1]["id"]
    assert (content.semantic[crowd] == 1).all()
    assert (content.panoptic[crowd] == 0).all()
    assert content.segments is not None
    assert [(one["id"], one["class_id"]) for one in content.segments] == [(1, 0), (2, 2), (3, 3)]


def test_a_category_that_no_list_has_is_reported(folder):
    change(folder / TRAIN, lambda content: content["annotations"][-1]["segments_info"][2].update(category_id=77))
    content = load(folder)
    assert content.unknown_labels == (77,)
    assert content.semantic is not None
    stripe = segment_ids(10) == segments(10)[2]["id"]
    assert (content.semantic[stripe] == 65535).all()
    assert content.segments is not None
    assert [one["class_id"] for one in content.segments] == [0, 1, 3]


def test_a_listed_segment_without_pixels_is_left_out(folder):
    def add(content):
        content["annotations"][-1]["segments_info"].append({"id": 5, "category_id": 1})

    change(folder / TRAIN, add)
    segments = load(folder).segments
    assert segments is not None
    assert len(segments) == 4


def test_a_photograph_without_any_segment(folder):
    change(folder / TRAIN, lambda content: content["annotations"][-1].update(segments_info=[]))
    save(folder / "annotations/panoptic_train2017/000000000010.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    content = load(folder)
    assert content.semantic is not None
    assert (content.semantic == 65535).all()
    assert content.segments == []


def test_parts_may_be_missing(folder):
    (folder / "annotations/captions_train2017.json").unlink()
    assert load(folder).captions is None
    (folder / TRAIN).unlink()
    assert load(folder).semantic is None
    assert CocoAdapter(folder).vocabulary().names[0] == "person"  # from val's list
    shutil.rmtree(folder / "annotations")
    assert load(folder, "val").semantic is None
    shutil.rmtree(folder / "val2017")
    assert CocoAdapter(folder).splits() == ["train"]


def test_captions_of_other_photographs_are_not_used(folder):
    def add(content):
        content["images"].append({"id": 99, "file_name": "000000000099.jpg"})
        content["annotations"].append({"image_id": 99, "caption": "a dog"})

    change(folder / "annotations/captions_train2017.json", add)
    assert len(list(CocoAdapter(folder).samples("train"))) == 3


def test_a_list_is_read_once(folder, monkeypatch):
    read = []
    monkeypatch.setattr(
        coco, "_json", lambda path, *, file, real=coco._json: read.append(file) or real(path, file=file)
    )
    adapter = CocoAdapter(folder)
    for _ in range(2):
        adapter.vocabulary()
        for split in adapter.splits():
            for sample in adapter.samples(split):
                sample.load()
    panoptic = [file for file in read if "panoptic" in file]
    assert sorted(panoptic) == [TRAIN, "annotations/panoptic_val2017.json"]


def test_other_processes_read_the_same(tmp_path, folder):
    for seed in range(100, 170):  # more than one chunk
        save(folder / f"train2017/{seed:012d}.jpg", picture(seed, height=4, width=4))
    samples = list(CocoAdapter(folder).samples("train"))
    source = Source("coco", folder, "train", max_pixels=1000, class_count=4)
    results = []
    for workers in (1, 2):
        with Pool(workers=workers) as pool:
            results.append([one for chunk in pool.examine(source, samples) for one in chunk])
    assert results[0] == results[1]
    assert [one.facts["readable"] for one in results[0]] == [True] * 3 + [False] * 70


# ---- faults of one photograph: recorded by prepare ---------------------------------------------------------------


def reason(folder, tmp_path, id="000000000010"):
    prepare.run(settings(name="d", adapter="coco"), {"data": folder}, tmp_path / "out")
    rows = {row["id"]: row for row in read_manifest(tmp_path / "out/manifest.parquet")}
    assert rows["000000000012"]["readable"]
    assert not rows[id]["readable"]
    return rows[id]["reason"]


def test_mask_and_list_disagree(folder, tmp_path):
    ids = segment_ids(10).copy()
    ids[:2, :2] = 99_999
    save(folder / "annotations/panoptic_train2017/000000000010.png", colours(ids))
    text = reason(folder, tmp_path)
    assert "annotations/panoptic_train2017/000000000010.png and its entry in" in text
    assert f"{TRAIN} disagree: 1 id(s) of the mask are not listed: 99999" in text
    assert "R + 256 G + 65536 B" in text
    assert "from one download" in text


@pytest.mark.parametrize("id", [0, segments(10)[0]["id"]])
def test_an_id_of_two_segments(folder, tmp_path, id):
    change(folder / TRAIN, lambda content: content["annotations"][-1]["segments_info"][1].update(id=id))
    assert f"the id {id} is listed twice (0 means no segment)" in reason(folder, tmp_path)


def test_a_mask_of_categories(folder, tmp_path):
    save(folder / "annotations/panoptic_train2017/000000000010.png", np.ones((HEIGHT, WIDTH), np.uint8))
    text = reason(folder, tmp_path)
    assert "annotations/panoptic_train2017/000000000010.png has the mode L" in text
    assert "an RGB picture" in text
    assert "use COCO's panoptic masks" in text


@pytest.mark.parametrize(
    ("file", "found"),
    [
        ("train2017/000000000010.jpg", "train2017/000000000010.jpg cannot be opened"),
        ("annotations/panoptic_train2017/000000000010.png", "000000000010.png cannot be opened"),
    ],
)
def test_a_listed_file_is_missing(folder, tmp_path, file, found):
    (folder / file).unlink()
    assert found in reason(folder, tmp_path)


def test_a_damaged_mask(folder, tmp_path):
    file = folder / "annotations/panoptic_train2017/000000000010.png"
    file.write_bytes(file.read_bytes()[:60])
    assert "000000000010.png is damaged" in reason(folder, tmp_path)


@pytest.mark.parametrize("listed", [True, False])
def test_a_photograph_without_annotation(folder, tmp_path, listed):
    def remove(content):
        content["annotations"].pop()
        content["images"] = content["images"] if listed else content["images"][1:]

    change(folder / TRAIN, remove)
    text = reason(folder, tmp_path)
    assert f"train2017/000000000010.jpg has no annotation in {TRAIN}" in text
    assert "one for every photograph" in text
    assert "add it, or remove the photograph" in text


def test_a_mask_of_another_size_is_a_fact(folder, tmp_path):
    save(folder / "annotations/panoptic_train2017/000000000010.png", colours(segment_ids(10, height=7, width=9)))
    prepare.run(settings(name="d", adapter="coco"), {"data": folder}, tmp_path / "out")
    row = read_manifest(tmp_path / "out/manifest.parquet")[0]
    assert (row["mask_width"], row["panoptic_height"], row["width"], row["height"]) == (9, 7, WIDTH, HEIGHT)


# ---- faults of a list: nothing is prepared -----------------------------------------------------------------------


def refused(folder, split="train"):
    with pytest.raises(DataError) as error:
        list(CocoAdapter(folder).samples(split))
    assert error.value.allowed
    assert error.value.fix
    return error.value


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x80"])
@pytest.mark.parametrize("file", ["panoptic_train2017.json", "captions_train2017.json"])
def test_broken_json(folder, file, text):
    (folder / "annotations" / file).write_bytes(text.encode("latin-1"))
    error = refused(folder)
    assert error.found.startswith(f"annotations/{file} cannot be read (")
    assert "a JSON file" in error.allowed
    assert f"annotations/{file} again" in error.fix


@pytest.mark.parametrize("content", [[], {"images": [], "annotations": {}}])
@pytest.mark.parametrize("file", ["panoptic_train2017.json", "captions_train2017.json"])
def test_json_of_another_kind(folder, file, content):
    (folder / "annotations" / file).write_text(json.dumps(content))
    error = refused(folder)
    assert error.found.startswith(f"annotations/{file} without the list(s) ")
    assert "annotations" in error.found
    assert "an object with the lists images, annotations" in error.allowed
    assert "files of COCO for other tasks" in error.fix


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (lambda content: content["images"].append(5), "images[3]"),
        (lambda content: content["images"][1].pop("file_name"), "images[1] cannot be used (no 'file_name')"),
        (lambda content: content["images"][1].update(file_name=None), "images[1]"),
        (lambda content: content["images"].pop(), "annotations[0] cannot be used (`images` has no id 12)"),
        (lambda content: content["annotations"][1].pop("segments_info"), "annotations[1]"),
        (lambda content: content["annotations"][1].update(segments_info=[{"id": 3}]), "(no 'category_id')"),
        (
            lambda content: content["annotations"][1].update(segments_info=[{"id": "x", "category_id": 1}]),
            "annotations[1]",
        ),
        (
            lambda content: content["annotations"][1].update(segments_info=[{"id": 1 << 70, "category_id": 1}]),
            "annotations[1]",
        ),
        (lambda content: content["annotations"][1].update(image_id=12), "the second one of the image 12"),
    ],
)
def test_faulty_panoptic_entry(folder, edit, found):
    change(folder / TRAIN, edit)
    error = refused(folder)
    assert error.found.startswith(f"{TRAIN}, ")
    assert found in error.found
    assert '"segments_info"' in error.allowed
    assert TRAIN in error.fix


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (lambda content: content["images"][0].pop("id"), "images[0] cannot be used (no 'id')"),
        (
            lambda content: content["annotations"][2].update(image_id=4),
            "annotations[2] cannot be used (`images` has no",
        ),
        (lambda content: content["annotations"][2].update(caption=["a dog"]), "annotations[2]"),
    ],
)
def test_faulty_captions(folder, edit, found):
    change(folder / "annotations/captions_train2017.json", edit)
    error = refused(folder)
    assert found in error.found
    assert '"caption"' in error.allowed
    assert "captions_train2017.json" in error.fix


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[]",
        json.dumps({"image": "images/val2017/a.jpg"}),
        json.dumps({"image": "images/val2017/a.jpg", "captions": []}),
        json.dumps({"image": "images/val2017/a.jpg", "captions": "a dog"}),
        json.dumps({"image": "images/val2017/a.jpg", "captions": [1]}),
    ],
)
def test_faulty_caption_lines(tmp_path, line):
    folder = write_selection(tmp_path / "d")
    (folder / "captions.jsonl").write_text(line + "\n")
    error = refused(folder, "captions")
    assert error.found.startswith("captions.jsonl line 1: `")
    assert '{"image": "images/val2017/' in error.allowed
    assert "captions.jsonl" in error.fix


@pytest.mark.parametrize(
    ("file", "key"),
    [(TRAIN, "images"), (TRAIN, "annotations"), ("annotations/captions_train2017.json", "images")],
)
@pytest.mark.parametrize("path", ["../../secret.png", "/etc/passwd", "a/../../x.jpg", ""])
def test_escape_in_a_file_name(folder, file, key, path):
    change(folder / file, lambda content: content[key][0].update(file_name=path))
    error = refused(folder)
    assert error.found == f"the path `{path}` in {file}, {key}[0]"
    assert "stay inside it" in error.allowed
    assert file in error.fix


@pytest.mark.parametrize(
    "categories",
    [
        {},
        [],
        ["person"],
        [{"id": 1, "name": "person"}],
        [{"id": "1", "name": "person", "isthing": 1}],
        [{"id": 1, "name": "person", "isthing": 2}],
        [*CATEGORIES, CATEGORIES[0]],
    ],
)
def test_faulty_list_of_categories(tmp_path, categories):
    folder = write_selection(tmp_path / "d")
    (folder / "categories.json").write_text(json.dumps(categories))
    with pytest.raises(DataError) as error:
        CocoAdapter(folder).vocabulary()
    assert error.value.found.startswith("categories.json, category ")
    assert '{"id": 1, "name": "person", "isthing": 1}' in error.value.allowed
    assert "categories.json" in error.value.fix


def test_lists_with_other_categories(folder):
    change(folder / TRAIN, lambda content: content["categories"][1].update(name="tram"))
    error = refused(folder)
    assert error.found == f"{TRAIN} lists other categories than the rest of the data set, those with the ids 6"
    assert "one list of categories" in error.allowed
    assert "one download" in error.fix


def test_masks_that_were_not_unpacked(folder):
    shutil.rmtree(folder / "annotations/panoptic_train2017")
    error = refused(folder)
    assert error.found == f"{TRAIN} without the folder of its masks"
    assert "annotations/panoptic_train2017 or panoptic/train2017/" in error.allowed
    assert "unpack panoptic_train2017.zip" in error.fix


def test_lists_of_a_split_without_photographs(folder):
    shutil.rmtree(folder / "val2017")
    shutil.rmtree(folder / "annotations/panoptic_val2017")
    adapter = CocoAdapter(folder)
    assert adapter.vocabulary().names[1] == "bus"
    assert adapter.splits() == ["train"]
    assert load(folder).semantic is not None


def test_other_layout(tmp_path):
    with pytest.raises(DataError) as error:
        CocoAdapter(tmp_path).splits()
    assert "none of train2017/, val2017/" in error.value.found
    assert "labels in annotations/" in error.value.allowed
    assert "lexiseg.data.adapters.coco" in error.value.fix


def test_unknown_split(folder):
    for split in ("test", "train2017"):
        error = refused(folder, split)
        assert error.found == f"the split `{split}`"
        assert error.allowed == "one of train, val"


# ---- real photographs --------------------------------------------------------------------------------------------


def test_real_photographs():
    folder = shared("data/coco_mini")
    adapter = CocoAdapter(folder)
    samples = {split: list(adapter.samples(split)) for split in adapter.splits()}
    assert {split: len(listed) for split, listed in samples.items()} == {"train": 100, "val": 100, "captions": 229}
    assert len(adapter.vocabulary()) == 133
    content = samples["val"][0].load()
    assert content.semantic is not None
    assert content.captions is not None
    assert len(content.captions) == 5
    # The same labels as categories per pixel, made by others from the same masks.
    ids = np.array([entry["id"] for entry in json.loads((folder / "categories.json").read_text()) if entry["id"]])
    with Image.open(folder / "semantic/val2017" / f"{samples['val'][0].id}.png") as file:
        expected = np.asarray(file)
    labelled = content.semantic != 65535
    assert (labelled == (expected > 0)).all()
    assert (ids[content.semantic[labelled]] == expected[labelled]).all()
    content = samples["captions"][0].load()
    assert (content.semantic, len(content.captions or [])) == (None, 5)


def test_the_unseen_classes_of_the_profile_are_what_its_comment_says():
    folder = shared("data/coco_mini")
    unseen = read_yaml(SOURCE / "profiles/coco.yaml")["data"]["unseen"]
    with (folder / "classes.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    categories = {entry["name"]: entry for entry in json.loads((folder / "categories.json").read_text())}
    kinds = [categories[name]["supercategory"] for name in unseen]
    assert len(unseen) == len(set(kinds)) == 16
    assert sum(categories[name]["isthing"] for name in unseen) == 8
    for name, kind in zip(unseen, kinds, strict=True):
        row = rows[name]
        assert int(row["train_images"]) >= 1
        assert int(row["val_images"]) >= 2
        assert float(row["val_fraction"]) >= 0.001
        others = [other for other, entry in categories.items() if entry["supercategory"] == kind and other != name]
        assert any(int(rows[other]["train_images"]) for other in others)
