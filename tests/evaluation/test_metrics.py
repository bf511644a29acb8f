from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, jaccard_score
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassJaccardIndex

from lexiseg.errors import DataError
from lexiseg.evaluation.metrics import ConfusionMatrix, harmonic_mean, mean_over

CLASSES = ("sky", "grass", "ring", "star")


def counted(truth, prediction, classes=CLASSES) -> ConfusionMatrix:
    confusion = ConfusionMatrix(classes)
    confusion.update(truth=np.array(truth), prediction=np.array(prediction))
    return confusion


def metrics(confusion, *, seen=(True, True, True, False), things=(False, False, True, True), absent_class="exclude"):
    return confusion.metrics(seen=seen, things=things, absent_class=absent_class)


def test_by_hand():
    confusion = counted([[0, 0, 0, 1], [1, 2, 3, -100]], [[0, 0, 1, 1], [1, 2, 2, 3]])
    # sky 2/3, grass 2/3, ring 1/2, star 0/1; the ignored pixel counts nowhere
    assert confusion.iou.tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 2, 0])
    assert confusion.accuracy.tolist() == pytest.approx([2 / 3, 1, 1, 0])
    assert confusion.true_pixels.tolist() == [3, 2, 1, 1]
    assert confusion.predicted_pixels.tolist() == [2, 3, 2, 0]
    seen = (2 / 3 + 2 / 3 + 1 / 2) / 3
    assert metrics(confusion) == pytest.approx(
        {
            "miou": (2 / 3 + 2 / 3 + 1 / 2) / 4,
            "miou_seen": seen,
            "miou_unseen": 0.0,
            "miou_harmonic": 0.0,
            "miou_things": 0.25,
            "miou_stuff": 2 / 3,
            "pixel_accuracy": 5 / 7,
            "mean_accuracy": (2 / 3 + 2) / 4,
            "fw_iou": (3 * 2 / 3 + 2 * 2 / 3 + 1 / 2) / 7,
        }
    )


def test_pooled_over_images_not_averaged():
    confusion = ConfusionMatrix(("a", "b"))
    confusion.update(truth=np.array([0, 0, 0, 0]), prediction=np.array([0, 0, 0, 0]))
    confusion.update(truth=np.array([0, 1]), prediction=np.array([1, 1]))
    assert confusion.iou.tolist() == pytest.approx([4 / 5, 1 / 2])


def test_absent_class_policy():
    confusion = counted([0, 0, 1, 1], [0, 0, 1, 0])  # ring and star are nowhere
    assert metrics(confusion)["miou"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metrics(confusion, absent_class="zero")["miou"] == pytest.approx((2 / 3 + 1 / 2) / 4)
    assert metrics(confusion)["miou_unseen"] is None
    assert metrics(confusion, absent_class="zero")["miou_unseen"] == 0
    # A class that is predicted but not there is no absent class: its IoU is 0.
    assert metrics(counted([0, 0], [0, 2]))["miou"] == pytest.approx((1 / 2 + 0) / 2)


def test_metrics_that_do_not_exist_are_none():
    result = metrics(counted([0, 1], [0, 1]), seen=(True,) * 4, things=(False,) * 4)
    assert (result["miou_unseen"], result["miou_harmonic"], result["miou_things"]) == (None, None, None)


def test_where_nothing_is_said_of_training_its_means_are_left_out():
    confusion = counted([0, 1, 2, 3], [0, 1, 2, 2])
    everything, rest = metrics(confusion), metrics(confusion, seen=None)
    assert everything.keys() - rest.keys() == {"miou_seen", "miou_unseen", "miou_harmonic"}
    assert rest.items() <= everything.items()
    assert set(metrics(counted([-100], [0])).values()) == {None}


def test_harmonic_mean():
    assert harmonic_mean(0.6, 0.3) == pytest.approx(0.4)
    assert harmonic_mean(0.0, 0.0) == 0
    assert harmonic_mean(None, 0.3) is None


def test_mean_over_nothing():
    assert mean_over([np.nan], absent_class="exclude") is None
    assert mean_over([np.nan, 0.5], absent_class="zero") == 0.25


def random_pair(classes=12, ignored=0.1):
    generator = torch.Generator().manual_seed(3)
    truth = torch.randint(0, classes - 1, (6, 40, 30), generator=generator)  # the last class only in predictions
    prediction = torch.where(
        torch.rand(truth.shape, generator=generator) < 0.6,
        truth,
        torch.randint(0, classes, truth.shape, generator=generator),
    )
    truth[torch.rand(truth.shape, generator=generator) < ignored] = -100
    return truth, prediction


def test_equal_to_torchmetrics():
    truth, prediction = random_pair()
    confusion = ConfusionMatrix([str(number) for number in range(12)])
    for image, predicted in zip(truth, prediction, strict=True):
        confusion.update(truth=image, prediction=predicted)
    result = confusion.metrics(seen=[True] * 12, things=[False] * 12, absent_class="exclude")
    settings: Any = {"num_classes": 12, "ignore_index": -100}
    assert np.array_equal(confusion.counts, MulticlassConfusionMatrix(**settings)(prediction, truth).numpy())
    assert result["miou"] == pytest.approx(float(MulticlassJaccardIndex(**settings)(prediction, truth)), abs=1e-6)
    weighted = MulticlassJaccardIndex(**settings, average="weighted")(prediction, truth)
    assert result["fw_iou"] == pytest.approx(float(weighted), abs=1e-6)
    micro = MulticlassAccuracy(**settings, average="micro")(prediction, truth)
    assert result["pixel_accuracy"] == pytest.approx(float(micro), abs=1e-6)


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_equal_to_scikit_learn():
    truth, prediction = random_pair()
    confusion = ConfusionMatrix([str(number) for number in range(12)])
    confusion.update(truth=truth, prediction=prediction)
    kept = truth != -100
    true, predicted = truth[kept].numpy(), prediction[kept].numpy()
    assert np.array_equal(confusion.counts, confusion_matrix(true, predicted, labels=range(12)))
    per_class: Any = None  # the type stubs know strings only
    assert confusion.iou.tolist() == pytest.approx(
        np.asarray(jaccard_score(true, predicted, average=per_class)).tolist()
    )
    result = confusion.metrics(seen=[True] * 12, things=[False] * 12, absent_class="exclude")
    # Classes without true pixels have no accuracy, in scikit-learn as here.
    assert result["mean_accuracy"] == pytest.approx(balanced_accuracy_score(true, predicted))


def test_confusions_are_sorted_by_pixels():
    confusion = counted([0] * 6 + [1] * 4 + [2] * 2, [1, 1, 1, 2, 0, 0, 0, 1, 1, 1, 2, 2])
    assert confusion.confusions() == [
        {"true": "sky", "predicted": "grass", "pixels": 3, "share": 0.5},
        {"true": "sky", "predicted": "ring", "pixels": 1, "share": pytest.approx(1 / 6)},
        {"true": "grass", "predicted": "sky", "pixels": 1, "share": 0.25},
    ]
    assert len(confusion.confusions(limit=1)) == 1
    assert counted([0], [0]).confusions() == []


@pytest.mark.parametrize(
    ("truth", "prediction", "found"),
    [([0, 4], [0, 0], "the label 4"), ([0, -1], [0, 0], "the label -1"), ([0, 1], [0, 9], "the predicted class 9")],
)
def test_values_outside_the_classes_are_refused(truth, prediction, found):
    with pytest.raises(DataError) as caught:
        counted(truth, prediction)
    assert found in caught.value.found
    assert "0..3 (sky, grass, ring, star)" in caught.value.allowed
    assert "same vocabulary" in caught.value.fix


def test_shapes_have_to_agree():
    with pytest.raises(DataError, match=r"shape \(3,\) for a truth of shape \(2,\)") as caught:
        counted([0, 1], [0, 1, 1])
    assert caught.value.allowed == "equal shapes"
    assert "upsample" in caught.value.fix


def test_predictions_on_ignored_pixels_may_be_anything():
    assert counted([0, -100], [0, 99]).counts.sum() == 1


def test_pixels_of_no_class_are_wrong_wherever_they_are():
    confusion = ConfusionMatrix(CLASSES, unnamed=True)
    confusion.update(truth=np.array([0, 0, 1, 1, -100, 2]), prediction=np.array([0, 4, 4, 1, 4, 2]))
    assert confusion.counts.shape == (4, 5)
    assert confusion.iou[:3].tolist() == [0.5, 0.5, 1]
    assert confusion.predicted_pixels.tolist() == [1, 1, 1, 0]
    assert confusion.true_pixels.tolist() == [2, 2, 1, 0]
    metrics = confusion.metrics(seen=[True] * 4, things=[False] * 4, absent_class="exclude")
    assert metrics["pixel_accuracy"] == pytest.approx(3 / 5)
    assert metrics["fw_iou"] == pytest.approx(3 / 5)
    assert confusion.confusions() == [
        {"true": "sky", "predicted": "(no class)", "pixels": 1, "share": 0.5},
        {"true": "grass", "predicted": "(no class)", "pixels": 1, "share": 0.5},
    ]
    with pytest.raises(DataError, match="the predicted class 5") as caught:
        confusion.update(truth=np.array([0]), prediction=np.array([5]))
    assert "0..4 (sky, grass, ring, star, (no class))" in caught.value.allowed
    with pytest.raises(DataError, match="the label 4"):
        confusion.update(truth=np.array([4]), prediction=np.array([4]))
