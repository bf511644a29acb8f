import csv
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.micro import settings as data_settings
from PIL import Image

from lexiseg.errors import DataError
from lexiseg.evaluation.image_counts import read_image_counts
from lexiseg.evaluation.predictions import PredictionWriter
from lexiseg.evaluation.protocol import ProtocolError
from lexiseg.evaluation.settings import EvaluateSettings
from lexiseg.settings import View
from lexiseg.stages import evaluate, prepare
from lexiseg.storage import hash_tree, read_json

METHOD = "baselines/maskclip"
NAMES = ("sky", "grass", "star")


@pytest.fixture
def inputs(tmp_path):
    """A data set of four pictures, prepared by the real stage, and predictions that miss the star."""
    raw, rng = tmp_path / "raw", np.random.default_rng(0)
    for split in ("train", "test"):
        for number in range(4):
            truth = np.repeat([[0], [1]], 16, axis=0).repeat(32, axis=1).astype(np.uint8)
            truth[4:12, 4 + number : 12 + number] = 2
            truth[30:] = 255
            for folder, array in (("images", rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)), ("masks", truth)):
                path = raw / folder / split / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    (raw / "classes.txt").write_text("0 sky\n1 grass\n2 star [unseen] [thing]\n")
    prepare.run(
        data_settings(name="micro", adapter="folder"),
        {"data": raw},
        tmp_path / "prepare",
    )
    with PredictionWriter(tmp_path / "predict") as writer:
        for number in range(4):
            scores = np.zeros((3, 8, 8), dtype=np.float32)
            scores[0, :4], scores[1, 4:] = 5, 5
            writer.add("test", NAMES, str(number), scores)
    return {"prepare": tmp_path / "prepare", f"{METHOD}/predict": tmp_path / "predict"}


def settings(*, text: str = "clip", **changes) -> View:
    block = EvaluateSettings(
        **{"protocol": "generic", "splits": ("test",), "pictures": 2, "boundary_tolerance": 0.0075, "episodes": None}
        | changes
    )
    side = SimpleNamespace(source=text, templates="vocabulary")
    root = SimpleNamespace(evaluate=block, encode=SimpleNamespace(text=side))
    return View(root, ["evaluate", "encode.text.source", "encode.text.templates"])


def test_writes_metrics_tables_and_pictures(inputs, tmp_path):
    out = tmp_path / "out"
    evaluate.run(settings(), inputs, out, method=METHOD)
    assert sorted(hash_tree(out)) == [
        "metrics.json",
        "pictures/test_0.png",
        "pictures/test_1.png",
        "pictures/test_overview.png",
        "tables/test_confusions.csv",
        "tables/test_images.parquet",
        "tables/test_per_class.csv",
    ]
    result = read_json(out / "metrics.json")
    assert result["method"] == METHOD
    assert result["protocol"]["card"]["dataset"] == "micro"
    assert len(result["protocol"]["hash"]) == 64
    metrics = result["splits"]["test"]
    # sky: 448 of 512 pixels, 4 x 64 of them taken from the star; grass: all
    assert metrics["miou"] == pytest.approx((448 / 512 + 1 + 0) / 3)
    assert metrics["miou_unseen"] == metrics["miou_things"] == metrics["miou_harmonic"] == 0
    assert metrics["pixel_accuracy"] == pytest.approx((448 + 448) / 960)
    rows = list(csv.DictReader((out / "tables/test_per_class.csv").open()))
    assert [row["class"] for row in rows] == list(NAMES)
    assert float(rows[0]["iou"]) == 0.875
    counts = read_image_counts(out / "tables/test_images.parquet", NAMES)
    assert counts.ids == ("0", "1", "2", "3")
    assert counts.intersection.tolist() == [[448, 448, 0]] * 4
    assert counts.union.tolist() == [[512, 448, 64]] * 4
    mistakes = list(csv.DictReader((out / "tables/test_confusions.csv").open()))
    assert mistakes == [{"true": "star", "predicted": "sky", "pixels": "256", "share": "1.0"}]


def test_twice_gives_equal_bytes(inputs, tmp_path):
    for name in ("a", "b"):
        evaluate.run(settings(), inputs, tmp_path / name, method=METHOD)
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b")


def test_no_pictures_wanted(inputs, tmp_path):
    evaluate.run(settings(pictures=0), inputs, tmp_path / "out", method=METHOD)
    assert not list((tmp_path / "out").rglob("*.png"))


def test_the_tolerance_is_part_of_the_protocol(inputs, tmp_path):
    hashes = set()
    for tolerance in (0.0075, 0.02):
        evaluate.run(settings(boundary_tolerance=tolerance, pictures=0), inputs, tmp_path / "out", method=METHOD)
        hashes.add(read_json(tmp_path / "out/metrics.json")["protocol"]["hash"])
    assert len(hashes) == 2


@pytest.mark.parametrize(("text", "templates"), [("clip", ["{}"]), ("table", []), ("none", [])])
def test_the_card_names_the_templates_in_use(inputs, tmp_path, text, templates):
    evaluate.run(settings(text=text, pictures=0), inputs, tmp_path / "out", method=METHOD)
    assert read_json(tmp_path / "out/metrics.json")["protocol"]["card"]["templates"] == templates


@pytest.mark.parametrize(
    ("changes", "kind", "found", "allowed", "fix"),
    [
        ({"protocol": "world"}, ProtocolError, "'world', on 'micro'", "any data set", "generic"),
        ({"splits": ("val",)}, DataError, "val", "test, train", "split"),
        ({"splits": ("train",)}, DataError, "no predictions for the split 'train'", "test", "params.yaml"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(inputs, tmp_path, changes, kind, found, allowed, fix):
    with pytest.raises(kind) as caught:
        evaluate.run(settings(**changes), inputs, tmp_path / "out", method=METHOD)
    assert found in caught.value.found
    assert allowed in caught.value.allowed
    assert fix in caught.value.fix
    assert not (tmp_path / "out/metrics.json").exists()
