import numpy as np
import pytest

from lexiseg.errors import DataError
from lexiseg.evaluation.evaluate import SplitResult, evaluate_split
from lexiseg.evaluation.predictions import PredictionWriter
from lexiseg.evaluation.protocol import ProtocolCard, load_protocol
from lexiseg.evaluation.sheets import example_picture, overview_picture
from lexiseg.settings import parse
from lexiseg.vocabulary import Vocabulary

WORDS = Vocabulary(names=("sky", "grass", "ring"), seen=(True, True, False), things=(False, False, True))


def halves(*, upper=0, lower=1, shape=(8, 8)) -> np.ndarray:
    labels = np.full(shape, lower)
    labels[: shape[0] // 2] = upper
    return labels


def scores(labels: np.ndarray, *, count=3, height=6.0) -> np.ndarray:
    return height * (np.arange(count)[:, None, None] == labels[None]).astype(np.float32)


def predict(folder, maps, *, names=WORDS.names, height=6.0):
    with PredictionWriter(folder) as writer:
        for id, labels in maps.items():
            writer.add("test", names, id, scores(labels, count=len(names), height=height))
    return folder


def card(vocabulary=WORDS, **changes) -> ProtocolCard:
    values = {**load_protocol("generic").model_dump(), **changes}
    return parse(values, ProtocolCard).resolve(
        vocabulary=vocabulary, dataset="micro", templates=("{}",), boundary_tolerance=0.0075
    )


@pytest.fixture
def evaluate(tmp_path, write_prepared):
    def run(truths, maps, *, names=WORDS.names, vocabulary=WORDS, pictures=0, height=6.0, **changes) -> SplitResult:
        return evaluate_split(
            predictions=predict(tmp_path / "predict", maps, names=names, height=height),
            prepared=write_prepared(vocabulary, truths),
            split="test",
            protocol=card(vocabulary, **changes),
            pictures=pictures,
        )

    return run


def test_perfect_predictions(evaluate):
    truths = {"a": halves(), "b": halves(upper=2, shape=(6, 10))}
    result = evaluate(truths, truths)
    assert result.images == 2
    assert set(result.metrics.values()) == {1.0}
    assert [row["class"] for row in result.per_class] == list(WORDS.names)
    assert result.per_class[2] == {
        "class": "ring",
        "seen": False,
        "thing": True,
        "iou": 1.0,
        "accuracy": 1.0,
        "boundary_f": 1.0,
        "pixels_true": 30,
        "pixels_predicted": 30,
    }
    assert result.confusions == []


def test_by_hand(evaluate):
    result = evaluate({"a": halves()}, {"a": halves(upper=2)})  # all sky taken for ring
    assert result.metrics == {
        "miou": pytest.approx(1 / 3),
        "miou_seen": 0.5,
        "miou_unseen": 0.0,
        "miou_harmonic": 0.0,
        "miou_things": 0.0,
        "miou_stuff": 0.5,
        "pixel_accuracy": 0.5,
        "mean_accuracy": 0.5,
        "fw_iou": 0.5,
        "boundary_f": pytest.approx(1 / 3),
    }
    assert result.confusions == [{"true": "sky", "predicted": "ring", "pixels": 32, "share": 1.0}]


def test_the_order_of_labels_and_samples_does_not_matter(evaluate):
    truths = {"a": halves(), "b": halves(upper=2)}
    names = ("ring", "sky", "grass")
    turned = {id: (truths[id] + 1) % 3 for id in ("b", "a")}
    assert evaluate(truths, turned, names=names).metrics["miou"] == 1


def test_low_resolution_scores_are_upsampled_before_the_argmax(evaluate):
    truth = halves(shape=(64, 64))
    assert evaluate({"a": truth}, {"a": truth[::8, ::8]}).metrics["pixel_accuracy"] == 1


def test_samples_without_labels_are_passed_over(evaluate):
    truths = {"a": halves(), "none": None}
    assert evaluate(truths, {"a": halves()}).images == 1
    assert evaluate(truths, {"a": halves(), "none": halves()}).images == 1


def test_ignored_pixels_and_absent_classes(evaluate):
    truth = halves()
    truth[0] = -100
    result = evaluate({"a": truth}, {"a": halves()})
    assert (result.metrics["miou"], result.metrics["miou_unseen"]) == (1, None)
    assert result.per_class[2]["iou"] is None
    assert evaluate({"a": truth}, {"a": halves()}, absent_class="zero").metrics["miou"] == pytest.approx(2 / 3)


def test_label_set_restricts_names_and_truth(evaluate):
    truth = halves(upper=0, lower=2)
    result = evaluate({"a": truth}, {"a": halves(upper=0, lower=2)}, label_set="unseen", pictures=1)
    assert result.classes == ("ring",)
    assert result.metrics["miou"] == 1
    assert result.metrics["miou_seen"] is None
    assert np.unique(result.examples[0].truth).tolist() == [-100, 0]


@pytest.mark.parametrize(("threshold", "expected"), [(0.9, 1), (0.5, 0)])
def test_background_threshold(evaluate, threshold, expected):
    words = Vocabulary(names=("sky", "background", "ring"))
    # Softmax of (2, 0) without background: 0.88 for the best class.
    result = evaluate(
        {"a": halves()},
        {"a": halves(upper=0, lower=0)},
        names=words.names,
        vocabulary=words,
        height=2.0,
        pictures=1,
        background={"policy": "threshold", "threshold": threshold, "label": "background"},
    )
    assert (result.examples[0].prediction == expected).all()


@pytest.mark.parametrize(("threshold", "expected"), [(0.4, 0), (0.6, 1)])
def test_soft_masks_are_compared_with_the_threshold_as_they_are(tmp_path, write_prepared, threshold, expected):
    words = Vocabulary(names=("sky", "background", "ring"))
    result = evaluate_split(
        predictions=predict(tmp_path / "predict", {"a": halves(upper=0, lower=0)}, names=words.names, height=0.5),
        prepared=write_prepared(words, {"a": halves()}),
        split="test",
        protocol=card(words, background={"policy": "threshold", "threshold": threshold, "label": "background"}),
        pictures=1,
        overlapping=True,
    )
    assert (result.examples[0].prediction == expected).all()


def test_saved_scores_are_refined_with_the_picture_at_hand(tmp_path, write_prepared):
    """Two kinds of scores per label, of which the refinement takes the second, its labels in the order of the card."""
    with PredictionWriter(tmp_path / "predict") as writer:
        kinds = np.stack([scores(halves()), scores(halves(upper=2, lower=2))])
        writer.add("test", WORDS.names[::-1], "a", kinds[:, ::-1].copy())
    seen = []

    def second(found, image):
        seen.append((found.shape, image.shape))
        return found[1]

    result = evaluate_split(
        predictions=tmp_path / "predict",
        prepared=write_prepared(WORDS, {"a": halves()}),
        split="test",
        protocol=card(WORDS),
        pictures=1,
        refine=second,
    )
    assert seen == [((2, 3, 8, 8), (8, 8, 3))]
    assert (result.examples[0].prediction == 2).all()


def test_examples_are_spread_over_the_split(evaluate):
    truths = {f"{number}": halves() for number in range(9)}
    result = evaluate(truths, truths, pictures=3)
    assert [example.id for example in result.examples] == ["0", "4", "8"]
    assert result.examples[1].image[0, 0].tolist() == [160, 160, 160]
    assert result.examples[1].prediction.tolist() == halves().tolist()
    assert len(evaluate(truths, truths, pictures=20).examples) == 9


def test_sheets(evaluate):
    truth = halves(shape=(300, 600))
    truth[:50] = -100
    result = evaluate({"a": truth}, {"a": halves(upper=2, shape=(300, 600))}, pictures=1)
    full = example_picture(result.examples[0], classes=result.classes, unseen=["ring"])
    sheet = overview_picture(result.examples, classes=result.classes, unseen=["ring"])
    assert full.shape[1] == 3 * 600 + 4 * 8
    assert sheet.shape[1] == 3 * 384 + 4 * 8
    assert full.dtype == sheet.dtype == np.uint8


def check(caught, *, found, allowed, fix):
    assert found in caught.value.found
    assert allowed in caught.value.allowed
    assert fix in caught.value.fix


def test_a_missing_prediction_is_an_error(evaluate):
    truths = {f"{number}": halves() for number in range(8)}
    with pytest.raises(DataError) as caught:
        evaluate(truths, {"3": halves()})
    found = "7 labelled sample(s) of the split 'test': 0, 1, 2, 4, 5 and 2 more"
    check(caught, found=found, allowed="every labelled sample", fix="dvc repro")


def test_a_stale_prediction_is_an_error(evaluate):
    with pytest.raises(DataError) as caught:
        evaluate({"a": halves()}, {"a": halves(), "gone": halves()})
    check(caught, found="'gone', which is not in the prepared split", allowed="as it is now", fix="dvc repro")


def test_other_labels_are_an_error(evaluate):
    with pytest.raises(DataError) as caught:
        evaluate({"a": halves()}, {"a": halves()}, names=("sky", "grass", "hoop"))
    check(caught, found="lack ring and have hoop", allowed="sky, grass, ring", fix="dvc repro")


def test_a_split_without_labels_is_an_error(evaluate):
    with pytest.raises(DataError) as caught:
        evaluate({"a": None}, {"a": halves()})
    check(caught, found="no labelled image in the split 'test'", allowed="with labels", fix="evaluate.splits")


def test_a_label_outside_the_vocabulary_is_an_error(evaluate):
    with pytest.raises(DataError) as caught:
        evaluate({"a": halves(upper=7)}, {"a": halves()})
    check(caught, found="the label 7", allowed="0..2 (sky, grass, ring)", fix="prepare and validate")
