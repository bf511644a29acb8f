"""The zero-shot setting from raw files to the report: pictures that are asked about one unseen class, in two labels."""

import csv
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.micro import settings as data_settings
from helpers.micro import write_world
from helpers.tiny import encoded, settings, vocabulary_of
from helpers.zero_shot import write_coco20i, write_fss, write_pascal5i

from lexiseg.data.dataset import PreparedSplit
from lexiseg.data.episodes import read_episodes
from lexiseg.errors import LexisegError, SettingsError
from lexiseg.evaluation.image_counts import read_image_counts
from lexiseg.evaluation.predictions import read_predictions
from lexiseg.methods import load_scorer
from lexiseg.methods.lseg.stages import train
from lexiseg.settings import View
from lexiseg.stages import baseline, evaluate, predict, prepare, report
from lexiseg.storage import hash_tree, read_json, write_json

RAW = {"pascal5i": write_pascal5i, "coco20i": write_coco20i, "fss": write_fss, "world": write_world}
FOLD = {"pascal5i": 1, "coco20i": 1}
PREDICT = ["threads", "evaluate.episodes", "evaluate.splits", "lseg.predict"]  # these three as in dvc.yaml
EVALUATE = ["threads", "encode.text.source", "encode.text.templates", "evaluate", "lseg.predict"]
BASELINE = ["seed", "threads", "baseline", "evaluate.episodes", "evaluate.splits"]


def changes(name, protocol, *, size=(480, 480), **more):
    return {
        "data.name": name,
        "data.adapter": name,
        "baselines": ["maskclip"],
        "evaluate.protocol": protocol,
        "evaluate.episodes": list(size),
        "evaluate.pictures": 2,
        "lseg.train.labels": "episode",
        "lseg.train.resize": [16, 16],
        **more,
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Prepared data and encoders of each data set, made once."""
    root, found = tmp_path_factory.mktemp("zero-shot"), {}

    def make(name):
        if name not in found:
            out = root / name / "prepare"
            data = data_settings(name=name, adapter=name, fold=FOLD.get(name))
            prepare.run(data, {"data": RAW[name](root / name / "raw")}, out)
            found[name] = {
                "prepare": out,
                "encode": encoded(root / name / "encode", vocabulary=vocabulary_of(out)),
            }
        return found[name]

    return make


@pytest.mark.parametrize(
    ("name", "protocol", "size", "classes"),
    [
        ("pascal5i", "pascal5i", (480, 480), ["bus", "car", "cat", "chair", "cow"]),
        ("fss", "fss", (480, 480), ["ab_wheel", "bus"]),
        ("world", "episodes", (64, 64), None),
    ],
)
def test_from_raw_files_to_the_report(made, tmp_path, name, protocol, size, classes):
    inputs, values = made(name), settings(changes(name, protocol, size=size))
    train(View(values, ["seed", "threads", "lseg.model", "lseg.train"]), inputs, tmp_path / "train")
    inputs = {**inputs, "lseg/train": tmp_path / "train"}
    predict.run(View(values, PREDICT), inputs, tmp_path / "predict", method="lseg")
    baseline.run(View(values, BASELINE), inputs, tmp_path / "maskclip", name="maskclip")
    results = {}
    for method, folder in (("lseg", "predict"), ("baselines/maskclip", "maskclip")):
        given = {**inputs, f"{method}/predict": tmp_path / folder}
        for number in "ab":
            evaluate.run(View(values, EVALUATE), given, tmp_path / method / number, method=method)
        assert hash_tree(tmp_path / method / "a") == hash_tree(tmp_path / method / "b")
        results[method] = read_json(tmp_path / method / "a/metrics.json")
        assert results[method]["protocol"]["card"]["episodes"] == list(size)
    found = results["lseg"]["splits"]["test"]
    asked = read_episodes(inputs["prepare"], "test")
    assert found["episodes"] == len(asked.pairs)
    assert all(0 <= found[key] <= 1 for key in ("miou", "fb_iou"))
    assert sorted(hash_tree(tmp_path / "lseg/a")) == [
        "metrics.json",
        "pictures/test_0.png",
        "pictures/test_1.png",
        "pictures/test_overview.png",
        "tables/test_images.parquet",
        "tables/test_per_class.csv",
    ]
    rows = list(csv.DictReader((tmp_path / "lseg/a/tables/test_per_class.csv").open()))
    assert [row["class"] for row in rows] == (classes or list(asked.classes))
    assert sum(int(row["episodes"]) for row in rows) == len(asked.pairs)
    counts = read_image_counts(tmp_path / "lseg/a/tables/test_images.parquet", asked.classes)
    assert set(counts.ids) == {sample for sample, _ in asked.pairs}
    assert counts.intersection.sum(0).tolist() == [int(row["intersection"]) for row in rows]
    assert counts.union.sum(0).tolist() == [int(row["union"]) for row in rows]
    write_json(tmp_path / "encode.json", {"retrieval": {}, "stand_ins": {}})
    write_json(tmp_path / "baselines/maskclip/evaluate/metrics.json", results["baselines/maskclip"])
    given = {
        "lseg/evaluate/metrics.json": tmp_path / "lseg/a/metrics.json",
        "baselines": tmp_path / "baselines",
        "encode-evaluate/metrics.json": tmp_path / "encode.json",
    }
    stego = SimpleNamespace(run=False, baselines=("raw",))
    listed = SimpleNamespace(profile="tiny", seed=0, baselines=("maskclip",), stego=stego)
    report.run(listed, given, tmp_path / "report")
    row = read_json(tmp_path / "report/results.json")["results"][0]
    assert set(row["difference"]["baselines/maskclip"]) == {"miou", "fb_iou"}


def test_an_episode_is_scored_once_by_its_two_words(made, tmp_path):
    inputs, values = made("pascal5i"), settings(changes("pascal5i", "episodes", size=(32, 48)))
    train(View(values, ["seed", "threads", "lseg.model", "lseg.train"]), inputs, tmp_path / "train")
    inputs = {**inputs, "lseg/train": tmp_path / "train"}
    for folder in "ab":
        predict.run(View(values, PREDICT), inputs, tmp_path / folder, method="lseg")
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b")
    labels, rows = read_predictions(tmp_path / "a", "test")
    found = dict(rows)
    assert labels == ("others", "class")
    assert list(found) == ["2007_110 bus", "2007_110 car", "2007_111 car"]  # of a thousand questions
    assert {scores.shape for scores in found.values()} == {(2, 16, 24)}
    from lexiseg.data.episodes import resize_picture

    split = PreparedSplit(inputs["prepare"], "test")
    image = resize_picture(split.image(split.ids.index("2007_111")), (32, 48))
    expected = load_scorer(tmp_path / "train", encode=inputs["encode"]).scores([image], ["others", "car"])[0]
    assert np.allclose(found["2007_111 car"], expected, atol=0.02)  # kept as float16


def test_what_prepare_writes(made):
    folder = made("coco20i")["prepare"]
    written = read_json(folder / "episodes.json")
    assert list(written) == ["test", "train"]
    assert len(written["test"]["pairs"]) == 1000
    assert written["train"]["by_class"]
    assert set(PreparedSplit(folder, "test").ids) == {sample for sample, _ in written["test"]["pairs"]}
    assert not (made("world")["prepare"] / "episodes.json").exists()  # what follows from the manifest


def test_more_processes_read_the_same_fold(tmp_path):
    raw, names = write_pascal5i(tmp_path / "raw"), [f"2008_{k:03}" for k in range(70)]  # more than one process takes
    for folder, ending in (("JPEGImages", "jpg"), ("SegmentationClassAug", "png")):
        for name in names:
            shutil.copy(raw / f"VOC2012/{folder}/2007_000.{ending}", raw / f"VOC2012/{folder}/{name}.{ending}")
    (raw / "splits/pascal/trn/fold0.txt").write_text("".join(f"{name}__01\n" for name in names))
    for workers in (1, 2):
        data = data_settings(name="d", adapter="pascal5i", fold=3, workers=workers)
        prepare.run(data, {"data": raw}, tmp_path / f"out{workers}")
    assert PreparedSplit(tmp_path / "out1", "train").ids[69:71] == [names[-1], "2007_100"]
    assert hash_tree(tmp_path / "out1") == hash_tree(tmp_path / "out2")


def test_a_fold_has_to_be_named(tmp_path):
    raw = write_pascal5i(tmp_path / "raw")
    with pytest.raises(LexisegError, match=r"`data\.fold: null` with the adapter `pascal5i`"):
        prepare.run(data_settings(name="d", adapter="pascal5i"), {"data": raw}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_closed_set_cannot_be_asked_for_others():
    with pytest.raises(SettingsError) as caught:
        settings({"evaluate.episodes": [64, 64]})
    assert "the baseline linear knows the classes it was fitted on" in caught.value.allowed
    assert "set evaluate.episodes to null" in caught.value.allowed
