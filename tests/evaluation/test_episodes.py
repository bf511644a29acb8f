import numpy as np
import pytest
import torch

from lexiseg.data.adapters.base import Episodes
from lexiseg.data.episodes import LABELS, episode_id, write_episodes
from lexiseg.errors import DataError
from lexiseg.evaluation.episodes import EpisodeMeter, evaluate_episodes
from lexiseg.evaluation.evaluate import SplitResult
from lexiseg.evaluation.predictions import PredictionWriter
from lexiseg.evaluation.protocol import load_protocol
from lexiseg.vocabulary import Vocabulary

WORDS = Vocabulary(names=("sky", "dog", "cat", "cow"), seen=(True, False, False, False))

# ---- the meter -----------------------------------------------------------------------------------------------------


def test_by_hand():
    meter = EpisodeMeter(["dog", "cat", "cow"])
    meter.update([[1, 1, 0, 0]], [[1, 0, 0, 1]], None, "dog")  # class 1 of 3, others 1 of 3
    meter.update([[1, 1, 1, 0]], [[1, 1, 1, 0]], [[0, 0, 1, 0]], "dog")  # class 2 of 2, others 1 of 1
    meter.update([[0, 0, 0, 0]], [[0, 1, 1, 0]], None, "cat")  # class 0 of 2, others 2 of 4
    assert meter.episodes.tolist() == [2, 1, 0]
    assert meter.intersection.tolist() == [[2, 3], [2, 0], [0, 0]]
    assert meter.union.tolist() == [[4, 5], [4, 2], [0, 0]]
    assert meter.iou[:2].tolist() == [0.6, 0]
    assert np.isnan(meter.iou[2])
    # The official mean counts a class that was never asked for as 0.
    assert meter.result() == {"miou": pytest.approx(0.6 / 3), "fb_iou": pytest.approx((4 / 8 + 3 / 7) / 2)}
    assert meter.miou(absent_class="exclude") == pytest.approx(0.6 / 2)


def test_an_episode_that_is_asked_twice_counts_twice():
    one, two = EpisodeMeter(["dog"]), EpisodeMeter(["dog"])
    one.update([[1, 0]], [[1, 1]], None, "dog", times=2)
    for _ in range(2):
        two.update(torch.tensor([[1.0, 0.0]]), np.array([[True, True]]), torch.tensor([[False, False]]), "dog")
    assert (one.intersection == two.intersection).all()
    assert (one.union == two.union).all()
    assert one.episodes.tolist() == two.episodes.tolist() == [2]


def test_nothing_measured():
    meter = EpisodeMeter(["dog"])
    assert meter.result() == {"miou": 0.0, "fb_iou": None}
    assert meter.result(absent_class="exclude") == {"miou": None, "fb_iou": None}


@pytest.mark.parametrize(
    ("prediction", "truth", "ignore", "name"),
    [([[1]], [[1, 0]], None, "dog"), ([[1]], [[1]], [[0, 0]], "dog"), ([[1]], [[1]], None, "horse")],
)
def test_what_does_not_fit(prediction, truth, ignore, name):
    with pytest.raises(DataError) as error:
        EpisodeMeter(["dog"]).update(prediction, truth, ignore, name)
    assert f"an episode of {name!r}" in error.value.found
    assert "dog" in error.value.allowed
    assert error.value.fix


# ---- a split -------------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluate(tmp_path, write_prepared):
    """Evaluate (sample, class) pairs from truths and the predicted maps of 0 and 1 by pair."""

    def run(truths, pairs, maps, *, size=(8, 8), card="episodes", labels=LABELS, **changes) -> SplitResult:
        prepared = write_prepared(WORDS, truths)
        write_episodes(prepared, {"test": Episodes(WORDS.unseen_names, tuple(pairs))}, WORDS)
        with PredictionWriter(tmp_path / "predict") as writer:
            for pair, found in maps.items():
                scores = np.stack([1 - found, found]).astype(np.float32)
                writer.add("test", labels, episode_id(*pair), scores)
        protocol = load_protocol(card).resolve(
            vocabulary=WORDS,
            dataset="micro",
            adapter="pascal5i",
            templates=("{}",),
            boundary_tolerance=0.01,
            episodes=size,
        )
        return evaluate_episodes(
            predictions=tmp_path / "predict", prepared=prepared, split="test", protocol=protocol, **changes
        )

    return run


def columns(*, dog: int, cat: int = 0) -> np.ndarray:
    """8 x 8: the first `dog` columns dog, the last `cat` cat, sky between."""
    truth = np.zeros((8, 8), np.int64)
    truth[:, :dog] = 1
    truth[:, 8 - cat :] = 2
    return truth


def test_a_split_by_hand(evaluate):
    truths = {"a": columns(dog=4, cat=2), "b": columns(dog=2)}
    truths["b"][0] = -100
    pairs = [("a", "dog"), ("a", "cat"), ("b", "dog"), ("a", "dog")]  # the first one again
    maps = {("a", "dog"): columns(dog=4), ("a", "cat"): columns(dog=0, cat=4) // 2, ("b", "dog"): columns(dog=4)}
    result = evaluate(truths, pairs, maps, pictures=3)
    # dog: 2 x 32 of 32, and 14 of 28 pixels; cat: 16 of 32
    dog, cat = (64 + 14) / (64 + 28), 16 / 32
    others = (2 * 32 + 28 + 32) / (2 * 32 + 42 + 48)
    assert result.metrics == {
        "miou": pytest.approx((dog + cat) / 2),
        "fb_iou": pytest.approx((others + (64 + 14 + 16) / (64 + 28 + 32)) / 2),
        "episodes": 4,
    }
    assert result.per_class[0] == {
        "class": "dog",
        "seen": False,
        "episodes": 3,
        "iou": pytest.approx(dog),
        "intersection": 78,
        "union": 92,
    }
    assert result.per_class[2]["iou"] is None  # nobody asked for a cow
    assert (result.images, result.confusions) == (3, [])
    example = result.examples[1]
    assert (example.id, result.classes) == ("a, cat", ("others", "dog", "cat", "cow"))
    assert (example.truth == np.where(truths["a"] == 2, 2, 0)).all()
    assert np.unique(example.prediction).tolist() == [0, 2]
    assert (result.examples[2].truth[0] == -100).all()


def test_the_benchmarks_count_a_class_that_nobody_asked_for(evaluate):
    maps = {("a", "dog"): columns(dog=4)}
    result = evaluate({"a": columns(dog=4)}, list(maps), maps, card="pascal5i", size=(480, 480))
    assert result.metrics["miou"] == pytest.approx(1 / 3, abs=0.01)


def test_pictures_and_labels_are_resized_before_they_are_compared(evaluate):
    truth = columns(dog=4)[:, :6]
    maps = {("a", "dog"): columns(dog=4)}
    result = evaluate({"a": truth}, list(maps), maps, size=(16, 8), pictures=1)
    assert result.examples[0].truth.shape == result.examples[0].image.shape[:2] == (16, 8)
    assert result.per_class[0]["union"] == 16 * 6


@pytest.mark.parametrize(
    ("maps", "labels", "found"),
    [
        ({("a", "dog"): columns(dog=4)}, ("sky", "dog"), "for the labels sky, dog"),
        ({("a", "dog"): columns(dog=4)}, LABELS, r"no prediction for 1 episode\(s\) of the split 'test': a cat"),
        ({("b", "dog"): columns(dog=4)}, LABELS, "a prediction for 'b dog', which is no episode"),
    ],
)
def test_predictions_of_something_else(evaluate, maps, labels, found):
    truths = {"a": columns(dog=4, cat=2)}
    with pytest.raises(DataError, match=found) as error:
        evaluate(truths, [("a", "dog"), ("a", "cat")], maps, labels=labels)
    assert error.value.allowed
    assert "dvc repro" in error.value.fix
