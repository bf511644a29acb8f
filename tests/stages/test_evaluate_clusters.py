"""The stage evaluate on methods of clusters, and on the baselines that stand beside them."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.micro import save
from helpers.micro import settings as data_settings

from lexiseg.errors import DataError
from lexiseg.evaluation import clusters
from lexiseg.evaluation.cluster_scores import map_names, pack
from lexiseg.evaluation.image_counts import read_image_counts
from lexiseg.evaluation.metrics import mean_over
from lexiseg.evaluation.predictions import PredictionWriter
from lexiseg.evaluation.protocol import ProtocolError
from lexiseg.evaluation.settings import EvaluateSettings
from lexiseg.methods.stego.settings import MatchSettings, PredictSettings, RefineSettings
from lexiseg.settings import View
from lexiseg.stages import evaluate, prepare
from lexiseg.storage import hash_tree, read_json

NAMES = ("sky", "grass")
DECLARED = ["evaluate", "stego.match", "stego.predict", "stego.protocol", "stego.refine"]


def truth(number: int) -> np.ndarray:
    """Sky above grass, and a rest that is not labelled."""
    labels = np.ones((32, 32), dtype=np.uint8)
    labels[: 12 + number] = 0
    labels[30:] = 255
    return labels


@pytest.fixture
def inputs(tmp_path):
    """A prepared data set, and predictions of three clusters: grass is cluster 0, sky 2, and 1 is in a corner of it."""
    for split in ("train", "test"):
        for number in range(4):
            save(tmp_path / f"raw/images/{split}/{number}.png", np.full((32, 32, 3), 40 * number, dtype=np.uint8))
            save(tmp_path / f"raw/masks/{split}/{number}.png", truth(number))
    (tmp_path / "raw/classes.txt").write_text("0 sky\n1 grass\n")
    prepare.run(data_settings(name="micro", adapter="folder"), {"data": tmp_path / "raw"}, tmp_path / "prepare")
    with PredictionWriter(tmp_path / "predict") as writer:
        for split in ("train", "test"):
            for number in range(4):
                found = np.where(truth(number) == 0, 2, 0)
                found[:4, :4] = 1
                codes = F.one_hot(torch.from_numpy(found), 3).permute(2, 0, 1)[None].float()
                linear = torch.tensor([[0.0, 1, 2], [1, 0, 0]]), torch.zeros(2)  # knows the corner, too
                writer.add(split, map_names(3, NAMES), str(number), pack(codes, torch.eye(3), linear)[0])
    predictions = dict.fromkeys(("stego/predict", "baselines/kmeans-raw/predict"), tmp_path / "predict")
    return {"prepare": tmp_path / "prepare", **predictions}


def settings(*, protocol="clusters", split=None, iterations=0, predict=None, **changes) -> View:
    block = EvaluateSettings(
        **{"protocol": "generic", "splits": ("test",), "pictures": 2, "boundary_tolerance": 0.0075, "episodes": None}
        | changes
    )
    stego = SimpleNamespace(
        protocol=protocol,
        predict=PredictSettings(**(predict or {})),
        refine=RefineSettings(crf_iterations=iterations),
        match=MatchSettings(split=split, unmatched="error"),
    )
    return View(SimpleNamespace(evaluate=block, stego=stego), DECLARED)


def run(inputs, out, *, method="stego", **how):
    evaluate.run(settings(**how), inputs, out, method=method)
    return read_json(out / "metrics.json")


def table(path):
    with path.open() as stream:
        return list(csv.DictReader(stream))


def test_writes_metrics_tables_and_pictures(inputs, tmp_path):
    result = run(inputs, tmp_path / "out")
    assert sorted(hash_tree(tmp_path / "out")) == [
        "metrics.json",
        *(f"pictures/test_{name}.png" for name in ("0", "1", "overview")),
        *(f"tables/test_{name}.csv" for name in ("cluster_classes", "clusters", "confusions")),
        "tables/test_images.parquet",
        "tables/test_per_class.csv",
    ]
    assert result["clusters"] == {
        "matched_on": "test",
        "names": ["grass", None, "sky"],
        "classes": ["sky", "grass"],
    }
    card = result["protocol"]["card"]
    assert (card["dataset"], card["templates"]) == ("micro", [])
    assert card["matching"] == {"split": "evaluated", "unmatched": "error", "clusters": 3}
    metrics = result["splits"]["test"]
    # Of 30 labelled rows in each of four pictures, 16 pixels are of the cluster without a class.
    assert metrics["pixel_accuracy"] == pytest.approx(1 - 16 / 960)
    assert (metrics["linear_miou"], metrics["linear_pixel_accuracy"]) == (1, 1)
    assert (metrics["clusters_used"], metrics["mean_cosine"]) == (1, pytest.approx(1, abs=1e-3))
    assert table(tmp_path / "out/tables/test_confusions.csv") == [
        {"true": "sky", "predicted": "(no class)", "pixels": "64", "share": str(64 / (54 * 32))}
    ]
    # What has no class is in the truth of its picture alone.
    counts = read_image_counts(tmp_path / "out/tables/test_images.parquet", ("sky", "grass"))
    assert counts.true.sum() - counts.predicted.sum() == 64
    assert mean_over((counts.intersection.sum(0) / counts.union.sum(0)), absent_class="exclude") == metrics["miou"]
    # To clusters no class was labelled in training.
    assert "miou_seen" not in metrics
    assert list(table(tmp_path / "out/tables/test_per_class.csv")[0])[:3] == ["class", "thing", "iou"]
    rows = table(tmp_path / "out/tables/test_clusters.csv")
    assert [(row["cluster"], row["class"], row["pixels"]) for row in rows] == [
        ("0", "grass", str((20 + 19 + 18 + 17) * 32)),
        ("1", "", "64"),
        ("2", "sky", str(54 * 32 - 64)),
    ]
    assert table(tmp_path / "out/tables/test_cluster_classes.csv") == [
        {"cluster": "cluster 0", "sky": "0", "grass": str(66 * 32)},
        {"cluster": "cluster 1", "sky": "64", "grass": "0"},
        {"cluster": "cluster 2", "sky": str(54 * 32 - 64), "grass": "0"},
    ]


def test_twice_gives_equal_bytes(inputs, tmp_path):
    for name in ("a", "b"):
        run(inputs, tmp_path / name, iterations=1)
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b")


def test_a_kmeans_baseline_is_measured_alike(inputs, tmp_path):
    ours = run(inputs, tmp_path / "ours", split="train", iterations=1)
    theirs = run(inputs, tmp_path / "theirs", split="train", iterations=1, method="baselines/kmeans-raw")
    assert theirs["method"] == "baselines/kmeans-raw"
    assert {**theirs, "method": "stego"} == ours


def test_the_dense_crf_refines_where_it_is_asked_for(inputs, tmp_path):
    plain, refined = (run(inputs, tmp_path / str(count), iterations=count) for count in (0, 2))
    assert plain["protocol"]["card"]["refinement"] == "none"
    assert refined["protocol"]["card"]["refinement"]["crf_iterations"] == 2
    # In pictures of one colour the largest clusters grow, beyond the pixels whose codes are near their centres.
    assert refined["splits"]["test"]["mean_cosine"] < plain["splits"]["test"]["mean_cosine"]


def test_names_of_another_split_are_looked_for_once(inputs, tmp_path, monkeypatch):
    asked = []
    count = clusters._counts
    monkeypatch.setattr(
        clusters, "_counts", lambda source, classes: asked.append(source.split) or count(source, classes)
    )
    result = run(inputs, tmp_path / "out", split="train", splits=("test", "train"), pictures=0)
    assert asked == ["train"]
    assert result["clusters"]["matched_on"] == "train"
    assert result["clusters"]["names"] == ["grass", None, "sky"]
    assert set(result["splits"]) == {"test", "train"}


def test_each_split_names_them_by_its_own_labels(inputs, tmp_path):
    result = run(inputs, tmp_path / "out", splits=("train", "test"), pictures=0)
    assert result["clusters"]["matched_on"] == "train"  # the first one
    assert (tmp_path / "out/tables/test_clusters.csv").is_file()


def test_without_labels(inputs, tmp_path):
    result = run(inputs, tmp_path / "out", protocol="unlabelled")
    assert sorted(hash_tree(tmp_path / "out")) == [
        "metrics.json",
        *(f"pictures/test_{name}.png" for name in ("0", "1", "overview")),
        "tables/test_clusters.csv",
    ]
    assert set(result["splits"]["test"]) == {"clusters_used", "usage_entropy", "mean_cosine"}
    # The classes that the data set has can still be told by a CLIP.
    assert result["clusters"] == {"matched_on": None, "names": None, "classes": ["sky", "grass"]}


def test_pictures_are_cropped_as_the_prediction_was(inputs, tmp_path, monkeypatch):
    seen = []
    whole = clusters.centre_square

    def watched(array, side, *, nearest):
        seen.append((array.ndim, side, nearest))
        return whole(array, side, nearest=nearest)

    monkeypatch.setattr(clusters, "centre_square", watched)
    for name, filter_ in (("smooth", "bilinear"), ("nearest", "nearest")):
        result = run(inputs, tmp_path / name, predict={"crop": 16, "filter": filter_, "flip": True}, pictures=0)
        assert result["protocol"]["card"]["centre_crop"] == 16
        assert result["protocol"]["card"].get("crop_filter", "bilinear") == filter_
        assert result["protocol"]["card"]["flips"]
        assert set(seen) == {(3, 16, filter_ == "nearest"), (2, 16, True)}
        seen.clear()


def test_the_card_says_how_pictures_were_scaled(inputs, tmp_path):
    cards = [
        run(inputs, tmp_path / str(number), predict=predict, pictures=0)["protocol"]["card"]
        for number, predict in enumerate([{}, {"filter": "nearest"}, {"max_side": 512}])
    ]
    assert cards[0] == cards[1]  # without a crop nothing is filtered
    assert cards[2] == {**cards[0], "max_side": 512}


def test_the_size_of_episodes_is_nothing_to_clusters(inputs, tmp_path):
    result = run(inputs, tmp_path / "out", protocol="clusters", episodes=(8, 8), pictures=0)
    assert "episodes" not in result["protocol"]["card"]


@pytest.mark.parametrize(
    ("how", "kind", "found", "fix"),
    [
        ({"protocol": "generic"}, ProtocolError, "'generic', for methods that know names", "stego.protocol: clusters"),
        ({"protocol": "world_clusters"}, ProtocolError, "'world_clusters', made for", "stego.protocol: clusters"),
        ({"protocol": "potsdam3"}, DataError, "a vocabulary with sky", "stego.protocol: clusters"),
        ({"split": "val"}, DataError, "the split `val`", "name one of these"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(inputs, tmp_path, how, kind, found, fix):
    with pytest.raises(kind) as caught:
        run(inputs, tmp_path / "out", **how)
    assert found in caught.value.found
    assert fix in caught.value.fix
    assert not (tmp_path / "out/metrics.json").exists()
