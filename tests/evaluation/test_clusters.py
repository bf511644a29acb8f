"""Clusters against labels, and without."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lexiseg.errors import DataError
from lexiseg.evaluation.cluster_scores import ALPHA, map_names, pack
from lexiseg.evaluation.clusters import count_clusters, evaluate_clusters
from lexiseg.evaluation.evaluate import SplitResult
from lexiseg.evaluation.predictions import PredictionWriter
from lexiseg.evaluation.protocol import ProtocolCard, load_protocol
from lexiseg.evaluation.sheets import example_picture, overview_picture
from lexiseg.settings import parse
from lexiseg.vocabulary import Vocabulary

WORDS = Vocabulary(names=("sky", "grass", "ring"), seen=(True, True, False), things=(False, False, True))
NOTHING = Vocabulary(names=())


def halves(*, upper=0, lower=1, shape=(8, 8)) -> np.ndarray:
    labels = np.full(shape, lower)
    labels[: shape[0] // 2] = upper
    return labels


def card(name="clusters", *, vocabulary=WORDS, split="evaluated", unmatched="error", **changes) -> ProtocolCard:
    values = {**load_protocol(name).model_dump(), **changes}
    return parse(values, ProtocolCard).resolve(
        vocabulary=vocabulary,
        dataset="micro",
        templates=(),
        boundary_tolerance=0.0075,
        inference={"matching": {"split": split, "unmatched": unmatched}},
    )


def maps(clusters: np.ndarray, *, count: int, linear=None) -> torch.Tensor:
    """Maps of codes that are clusters: one dimension each."""
    codes = F.one_hot(torch.from_numpy(clusters).long(), count).permute(2, 0, 1)[None].float()
    return pack(codes, torch.eye(count), linear)[0]


@pytest.fixture
def predict(tmp_path):
    """Write predictions from {id: clusters of the cells}; more splits by name."""

    def write(test, *, count=3, classes=(), linear=None, **others):
        with PredictionWriter(tmp_path / "predict") as writer:
            for split, content in {"test": test, **others}.items():
                for id, clusters in content.items():
                    names = map_names(count, classes)
                    writer.add(split, names, id, maps(clusters, count=count, linear=linear))
        return tmp_path / "predict"

    return write


@pytest.fixture
def evaluate(predict, write_prepared):
    """Evaluate {id: truth} against {id: clusters}."""

    def run(
        truths, clusters, *, vocabulary=WORDS, protocol=None, count=3, classes=(), linear=None, size=(8, 8), **how
    ) -> SplitResult:
        return evaluate_clusters(
            predictions=predict(clusters, count=count, classes=classes, linear=linear),
            prepared=write_prepared(vocabulary, truths, size=size),
            split="test",
            protocol=protocol or card(vocabulary=vocabulary),
            **how,
        )

    return run


def test_clusters_with_other_numbers_than_the_classes(evaluate):
    truths = {"a": halves(), "b": halves(upper=2, shape=(6, 10)), "none": None}
    number = np.array([2, 0, 1])  # of the cluster that is each class
    clusters = {id: number[truth] for id, truth in truths.items() if truth is not None}
    result = evaluate(truths, clusters | {"none": halves()}, pictures=3)
    assert result.images == 2
    usual = {key: value for key, value in result.metrics.items() if key not in ("usage_entropy",)}
    assert set(usual.values()) == {1.0}
    assert result.classes == WORDS.names
    assert result.clusters is not None
    assert (result.clusters.names, result.clusters.matched_on) == (("grass", "ring", "sky"), "test")
    assert [(example.id, example.prediction.tolist()) for example in result.examples] == [
        ("a", truths["a"].tolist()),
        ("b", truths["b"].tolist()),
    ]
    assert result.confusions == []
    # No class was labelled in training: none is seen or unseen.
    assert not [name for name in result.metrics if "seen" in name or "harmonic" in name]
    assert not [row for row in result.per_class if "seen" in row]
    assert result.clusters.counts.tolist() == [[0, 62, 0], [0, 0, 30], [32, 0, 0]]
    assert result.clusters.rows[2] == {
        "cluster": 2,
        "class": "sky",
        "pixels": 32,
        "share": pytest.approx(32 / 124),
        "cosine": pytest.approx(1, abs=1e-3),
        "precision": 1.0,
    }


def test_pixels_are_those_of_upsampled_codes(tmp_path, write_prepared):
    """The truth is the nearest centre of codes that were upsampled, and every centre is a class."""
    generator = torch.Generator().manual_seed(0)
    codes, centres = torch.randn(5, 4, 6, generator=generator), torch.randn(3, 5, generator=generator)
    finer = F.interpolate(codes[None], size=(21, 32), mode="bilinear", align_corners=False)[0]
    truth = torch.einsum("khw,nk->nhw", F.normalize(finer, dim=0), F.normalize(centres, dim=1)).argmax(dim=0).numpy()
    assert len(np.unique(truth)) == 3
    with PredictionWriter(tmp_path / "predict") as writer:
        writer.add("test", map_names(3), "a", pack(codes[None], centres)[0])
    result = evaluate_clusters(
        predictions=tmp_path / "predict",
        prepared=write_prepared(WORDS, {"a": truth}),
        split="test",
        protocol=card(),
    )
    assert result.metrics["pixel_accuracy"] == pytest.approx(1, abs=0.005)  # of half precision


def columns(*widths: int) -> np.ndarray:
    """8 x sum(widths): stripes 0, 1, 2, … of these widths."""
    return np.repeat(np.arange(len(widths)), widths)[None].repeat(8, axis=0)


def test_clusters_beyond_the_classes_are_errors(evaluate):
    truth, clusters = columns(4, 4, 0), columns(4, 1, 3)  # sky is cluster 0; of grass, cluster 2 has more than 1
    result = evaluate({"a": truth}, {"a": clusters}, vocabulary=Vocabulary(names=("sky", "grass")), pictures=1)
    assert result.clusters is not None
    assert result.clusters.names == ("sky", None, "grass")
    assert result.metrics["pixel_accuracy"] == pytest.approx(7 / 8)
    assert result.metrics["miou"] == pytest.approx((1 + 3 / 4) / 2)  # the rest of grass is missing, and nothing else is
    assert result.confusions == [{"true": "grass", "predicted": "(no class)", "pixels": 8, "share": 0.25}]
    assert [row["pixels_predicted"] for row in result.per_class] == [32, 24]
    assert result.clusters.rows[1] == {
        "cluster": 1,
        "class": None,
        "pixels": 8,
        "share": 0.125,
        "cosine": pytest.approx(1, abs=1e-3),
        "precision": None,
    }
    # Sky ends where it should; the left side of grass is a column off, which the tolerance of a pixel allows.
    assert result.metrics["boundary_f"] == 1
    assert np.unique(result.examples[0].prediction).tolist() == [-100, 0, 1]


def test_a_boundary_that_is_too_far_off_counts(evaluate):
    truth, clusters = columns(4, 6, 0), columns(4, 2, 4)
    result = evaluate({"a": truth}, {"a": clusters}, vocabulary=Vocabulary(names=("sky", "grass")))
    assert [row["boundary_f"] for row in result.per_class] == [1.0, 0.0]


def test_or_they_go_to_their_majority(evaluate):
    words = Vocabulary(names=("sky", "grass"))
    result = evaluate(
        {"a": columns(4, 4, 0)},
        {"a": columns(4, 1, 3)},
        vocabulary=words,
        protocol=card(vocabulary=words, unmatched="majority"),
    )
    assert result.metrics["miou"] == result.metrics["boundary_f"] == 1
    assert result.clusters is not None
    assert result.clusters.names == ("sky", "grass", "grass")


def test_fewer_clusters_than_classes(evaluate):
    result = evaluate({"a": columns(3, 3, 2)}, {"a": columns(6, 2)}, count=2)
    assert [row["iou"] for row in result.per_class] == [0.5, 0.0, 1.0]
    assert result.clusters is not None
    assert result.clusters.names == ("sky", "ring")


def test_ignored_pixels_take_no_part_in_the_matching(evaluate):
    truth = columns(3, 5, 0)
    truth[:, 3:7] = -100  # of cluster 1, which has one column of grass left
    result = evaluate({"a": truth}, {"a": columns(3, 4, 1)})
    assert result.clusters is not None
    assert result.clusters.names[0] == "sky"
    assert result.clusters.names[2] == "grass"
    assert result.clusters.counts.sum() == 8 * 4
    assert result.metrics["pixel_accuracy"] == 1
    assert result.clusters.rows[1]["pixels"] == 32  # what needs no label counts every pixel
    assert result.clusters.rows[1]["precision"] is None


@pytest.fixture
def two_splits(predict, write_prepared):
    """In `val` cluster 0 is sky and cluster 1 grass, in `test` it is the other way around."""

    def run(*, split="val", val_truth=None, **how) -> SplitResult:
        truth = halves() if val_truth is None else val_truth
        return evaluate_clusters(
            predictions=predict({"a": halves(upper=1, lower=0)}, val={"v": halves()}),
            prepared=write_prepared(WORDS, {"a": halves()}, val={"v": truth}),
            split="test",
            protocol=card(split=split),
            **how,
        )

    return run


def test_names_from_the_labels_of_another_split(two_splits):
    result = two_splits()
    assert result.metrics["pixel_accuracy"] == 0
    assert result.clusters is not None
    assert (result.clusters.names[:2], result.clusters.matched_on) == (("sky", "grass"), "val")
    assert result.clusters.counts[:2, :2].tolist() == [[0, 32], [32, 0]]  # of the evaluated split
    assert two_splits(split="test").metrics["pixel_accuracy"] == 1


def test_names_that_are_known_are_not_looked_for_again(two_splits):
    unusable = np.full((8, 8), -100)
    result = two_splits(val_truth=unusable, names=("grass", "sky", None))
    assert result.metrics["pixel_accuracy"] == 1
    assert result.clusters is not None
    assert (result.clusters.names, result.clusters.matched_on) == (("grass", "sky", None), "val")


def test_the_centre_square_of_picture_and_labels(tmp_path, write_prepared):
    truth = np.full((8, 16), 2)
    truth[:, 4:12] = halves()
    with PredictionWriter(tmp_path / "predict") as writer:
        writer.add("test", map_names(3), "a", maps(halves(), count=3))
    result = evaluate_clusters(
        predictions=tmp_path / "predict",
        prepared=write_prepared(WORDS, {"a": truth}),
        split="test",
        protocol=card().model_copy(update={"centre_crop": 4}),
        pictures=1,
    )
    example = result.examples[0]
    assert example.image.shape == (4, 4, 3)
    assert example.truth is not None
    assert example.truth.tolist() == halves(shape=(4, 4)).tolist()
    assert result.metrics["pixel_accuracy"] == 1
    assert result.clusters is not None
    assert result.clusters.counts.sum() == 16


@pytest.mark.parametrize("nearest", [True, False])
def test_the_picture_is_scaled_as_the_prediction_was(predict, write_prepared, nearest):
    prepared = write_prepared(NOTHING, {"a": None}, size=(16, 16))
    chessboard = (np.indices((16, 16)).sum(axis=0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, axis=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lexiseg.data.dataset.PreparedSplit.image", lambda self, index: chessboard)
        result = evaluate_clusters(
            predictions=predict({"a": halves()}),
            prepared=prepared,
            split="test",
            protocol=card(
                "unlabelled",
                vocabulary=NOTHING,
                centre_crop=8,
                crop_filter="nearest" if nearest else "bilinear",
            ),
            pictures=1,
        )
    assert (len(np.unique(result.examples[0].image)) == 1) == nearest


def test_scores_are_refined_once_with_the_picture_at_hand(evaluate):
    seen = []

    def turned(logits, picture):
        seen.append((logits.shape, logits.dtype, float(logits.max()), picture.shape))
        return logits[:, ::-1].copy()  # top to bottom

    truths = {"a": halves(lower=2, shape=(16, 12)), "b": halves(lower=2)}
    clusters = {"a": halves(lower=2, shape=(4, 3)), "b": halves(lower=2)}
    result = evaluate(truths, clusters, refine=turned, pictures=2)
    assert [(shape, picture) for shape, _, _, picture in seen] == [
        ((3, 16, 12), (16, 12, 3)),
        ((3, 8, 8), (8, 8, 3)),
    ]
    assert {kind for _, kind, _, _ in seen} == {np.dtype(np.float32)}
    assert seen[0][2] == pytest.approx(ALPHA, abs=1e-3)
    # The cosine is that of the cluster which the refinement chose, not the best one.
    assert result.metrics["mean_cosine"] < 0.2
    assert result.clusters is not None
    assert (result.clusters.names[0], result.clusters.names[2]) == ("ring", "sky")


def identity(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear probe that gives each cluster a class of its own."""
    return torch.eye(count), torch.zeros(count)


def test_a_linear_probe_has_its_names_by_training(evaluate):
    # Its classes are in another order than the card's: cluster 0 is grass to it, 1 is sky.
    classes = ("grass", "sky", "ring")
    truths = {"a": halves(upper=0, lower=1)}
    result = evaluate(truths, {"a": halves(upper=1, lower=0)}, classes=classes, linear=identity(3))
    assert (result.metrics["linear_miou"], result.metrics["linear_pixel_accuracy"]) == (1, 1)
    wrong = evaluate(truths, {"a": halves(upper=0, lower=0)}, classes=classes, linear=identity(3))
    assert (wrong.metrics["linear_miou"], wrong.metrics["linear_pixel_accuracy"]) == (0.25, 0.5)
    assert wrong.metrics["pixel_accuracy"] == 0.5
    assert "linear_miou" not in evaluate(truths, truths).metrics


def test_a_linear_probe_is_refined_too(evaluate):
    def turned(logits, picture):
        return logits[:, ::-1].copy()

    result = evaluate({"a": halves()}, {"a": halves()}, classes=WORDS.names, linear=identity(3), refine=turned)
    assert (result.metrics["pixel_accuracy"], result.metrics["linear_pixel_accuracy"]) == (1, 0)


def test_coarse_classes(evaluate):
    """Things are one class; the linear probe may know them by their own names."""
    words = Vocabulary(names=("ring", "sky", "star"), things=(True, False, True))
    truths = {"a": columns(2, 4, 2)}
    protocol = card("world_clusters11", vocabulary=words, dataset="any")
    how = {"vocabulary": words, "protocol": protocol, "count": 2}
    result = evaluate(truths, {"a": np.array([[1, 1, 0, 0, 0, 0, 1, 1]]).repeat(8, axis=0)}, **how)
    assert result.classes == ("sky", "thing")
    assert result.metrics["miou"] == result.metrics["miou_things"] == result.metrics["miou_stuff"] == 1
    assert result.clusters is not None
    assert result.clusters.names == ("sky", "thing")
    # A star that is taken for a ring is a thing still.
    how |= {"count": 3, "classes": words.names, "linear": identity(3)}
    fine = evaluate(truths, {"a": columns(4, 2, 2)}, **how)
    assert fine.metrics["linear_pixel_accuracy"] == pytest.approx(6 / 8)
    how |= {"count": 2, "classes": ("thing", "sky"), "linear": identity(2)}
    assert evaluate(truths, {"a": columns(4, 4)}, **how).metrics["linear_pixel_accuracy"] == pytest.approx(4 / 8)


def test_a_linear_class_that_is_not_evaluated_is_wrong(evaluate):
    result = evaluate(
        {"a": halves(upper=2, lower=2)},
        {"a": halves(upper=2, lower=1)},
        classes=WORDS.names,
        linear=identity(3),
        protocol=card(label_set="unseen"),
    )
    assert result.classes == ("ring",)
    assert result.metrics["linear_pixel_accuracy"] == 0.5


def test_what_needs_no_label(evaluate):
    clusters = {"a": np.zeros((8, 8), int), "b": columns(6, 2)}
    truths = {"a": halves(), "b": halves()}
    for protocol in (card(), card("unlabelled")):
        metrics = evaluate(truths, clusters, count=4, protocol=protocol).metrics
        assert metrics["clusters_used"] == 0.5
        shares = 14 / 16, 2 / 16
        assert metrics["usage_entropy"] == pytest.approx(-sum(s * math.log(s) for s in shares) / math.log(4))
        assert metrics["mean_cosine"] == pytest.approx(1, abs=1e-3)
    alike = {"a": columns(2, 2, 2, 2), "b": columns(2, 2, 2, 2)}
    assert evaluate(truths, alike, count=4).metrics["usage_entropy"] == pytest.approx(1)
    assert evaluate(truths, {"a": halves(lower=0), "b": halves(lower=0)}, count=1).metrics["usage_entropy"] is None


def test_a_cluster_with_less_than_a_thousandth_of_the_pixels_is_not_used(evaluate):
    for pixels, used in ((3, 1 / 3), (5, 2 / 3)):
        clusters = np.zeros((64, 64), int)
        clusters[0, :pixels] = 2
        result = evaluate({"a": halves(shape=(64, 64))}, {"a": clusters})
        assert result.metrics["clusters_used"] == pytest.approx(used)


@pytest.mark.parametrize("vocabulary", [WORDS, NOTHING])
def test_without_labels(evaluate, vocabulary):
    # A label that the vocabulary lacks would be an error: none is read.
    truths = {"a": halves(upper=7, shape=(300, 600)), "b": None}
    clusters = {"a": halves(upper=11, lower=2, shape=(30, 60)), "b": halves(lower=3)}
    protocol = card("unlabelled", vocabulary=vocabulary)
    result = evaluate(truths, clusters, vocabulary=vocabulary, protocol=protocol, count=12, pictures=2)
    assert set(result.metrics) == {"clusters_used", "usage_entropy", "mean_cosine"}
    assert (result.per_class, result.confusions, result.images) == ([], [], 2)
    assert result.classes[:2] == ("cluster 0", "cluster 1")
    assert result.clusters is not None
    assert (result.clusters.names, result.clusters.matched_on) == ((), None)
    assert [row["class"] for row in result.clusters.rows] == [None] * 12
    assert [example.truth for example in result.examples] == [None, None]
    assert np.unique(result.examples[0].prediction).tolist() == [2, 11]
    full = example_picture(result.examples[0], classes=result.classes, unseen=[])
    assert full.shape[1] == 2 * 600 + 3 * 8  # photo and clusters
    sheet = overview_picture(result.examples, classes=result.classes, unseen=[])
    assert sheet.shape[1] == 2 * 384 + 3 * 8


def check(caught, *, found, allowed, fix):
    assert found in caught.value.found
    assert allowed in caught.value.allowed
    assert fix in caught.value.fix


def test_a_split_without_labels_is_an_error(evaluate):
    with pytest.raises(DataError) as caught:
        evaluate({"a": None}, {"a": halves()})
    check(caught, found="no labelled image in the split 'test'", allowed="miou", fix="stego.protocol: unlabelled")
    for word in ("pixel_accuracy", "boundary_f", "clusters_used"):
        assert word in caught.value.allowed


def test_names_from_a_split_without_labels_are_an_error(predict, write_prepared):
    with pytest.raises(DataError) as caught:
        evaluate_clusters(
            predictions=predict({"a": halves()}, val={"v": halves()}),
            prepared=write_prepared(WORDS, {"a": halves()}, val={"v": None}),
            split="test",
            protocol=card(split="val"),
        )
    check(caught, found="no labelled image in the split 'val'", allowed="with labels", fix="`stego.match.split`")


def test_predictions_of_another_method_are_an_error(tmp_path, write_prepared):
    with PredictionWriter(tmp_path / "predict") as writer:
        writer.add("test", WORDS.names, "a", np.zeros((3, 4, 4), np.float32))
    with pytest.raises(DataError) as caught:
        evaluate_clusters(
            predictions=tmp_path / "predict",
            prepared=write_prepared(WORDS, {"a": halves()}),
            split="test",
            protocol=card(),
        )
    check(caught, found="for the labels sky, grass, ring", allowed="maps of clusters", fix="dvc repro")
    with pytest.raises(DataError) as caught:
        count_clusters(tmp_path / "predict", "test")
    check(caught, found="for the labels sky, grass, ring", allowed="maps of clusters", fix="dvc repro")


@pytest.mark.parametrize(
    ("protocol", "truth", "found", "allowed"),
    [
        (card(), halves(), "1 labelled sample(s) of the split 'test': b", "every labelled sample"),
        (card("unlabelled"), None, "1 sample(s) of the split 'test': b", "every sample"),
    ],
)
def test_a_missing_prediction_is_an_error(evaluate, protocol, truth, found, allowed):
    with pytest.raises(DataError) as caught:
        evaluate({"a": halves(), "b": truth}, {"a": halves()}, protocol=protocol)
    check(caught, found=f"no prediction for {found}", allowed=allowed, fix="dvc repro")


def test_a_stale_prediction_is_an_error(evaluate):
    with pytest.raises(DataError) as caught:
        evaluate({"a": halves()}, {"gone": halves()})
    check(caught, found="'gone', which is not in the prepared split", allowed="as it is now", fix="dvc repro")


def test_a_linear_probe_of_other_classes_is_an_error(evaluate):
    with pytest.raises(DataError) as caught:
        evaluate({"a": halves()}, {"a": halves()}, classes=("sky", "grass", "hoop"), linear=identity(3))
    check(caught, found="the class 'hoop' in the predictions", allowed="sky, grass, ring", fix="stego.probe.linear")


def test_the_number_of_clusters(predict):
    linear = torch.eye(5)[:3], torch.zeros(3)
    assert count_clusters(predict({"a": halves()}, count=5, classes=WORDS.names, linear=linear), "test") == 5
