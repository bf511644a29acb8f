import numpy as np
import pytest
import torch
from helpers.tiny import encoded, prepare_again, prepared, prepared_with_fault, settings, timm_backbone, vocabulary_of
from PIL import Image
from torch import nn

from lexiseg.encoders.features import load_features
from lexiseg.errors import DataError, LabelError
from lexiseg.methods.baselines.linear import LinearHead, LinearTraining, predictor
from lexiseg.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    prepare = prepared(root, counts={"train": 4, "test": 2})
    return {"prepare": prepare, "encode": encoded(root / "encode", vocabulary=vocabulary_of(prepare))}


@pytest.fixture(scope="module")
def head(inputs):
    return predictor(settings(), inputs)


def picture(height=16, width=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# ---- features ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stride", "size"), [(4, (4, 6)), (8, (2, 3)), (5, (4, 5))])
def test_all_maps_at_one_stride(inputs, stride, size):
    features = load_features(inputs["encode"], stride=stride)
    found = features(pixels(2, 3, 16, 24))
    assert found.shape == (2, features.channels, *size)
    assert features.channels == 32 + 64 + 32 + 32
    assert not any(value.requires_grad for value in features.parameters())


def test_each_map_has_unit_scale(inputs):
    features = load_features(inputs["encode"], stride=8)
    # at the stride of the two coarse maps nothing is interpolated
    coarse = features(pixels(1, 3, 16, 16))[:, -32:]
    assert torch.allclose(coarse.mean(dim=1), torch.zeros(1, 2, 2), atol=1e-4)
    assert torch.allclose(coarse.var(dim=1, unbiased=False), torch.ones(1, 2, 2), atol=1e-2)


def test_a_timm_backbone_with_its_statistics(tmp_path):
    features = load_features(encoded(tmp_path / "encode", changes=timm_backbone(tmp_path)), stride=8)
    assert features(pixels(1, 3, 33, 50)).shape == (1, features.channels, 5, 7)
    assert features.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])  # type: ignore[operator, union-attr]


# ---- the head ----------------------------------------------------------------------------------------------------


def test_only_seen_classes_ever_win(head):
    (scores,) = head.scores([picture()], ["ring", "sky", "grass"])
    assert scores.shape == (3, 4, 6)
    assert scores.dtype == np.float32
    assert (scores[0] < scores[1:].min(axis=0)).all()
    assert np.isfinite(scores.astype(np.float16)).all()


def test_the_order_and_number_of_labels(head):
    (scores,), (moved,), (alone,) = (head.scores([picture()], x) for x in (["grass", "sky"], ["sky", "grass"], ["sky"]))
    assert np.allclose(scores[::-1], moved, atol=1e-5)
    assert np.allclose(scores[1], alone[0], atol=1e-5)


def test_pictures_of_different_sizes(head):
    scores = head.scores([picture(16, 24), picture(24, 16)], ["grass"])
    assert [x.shape[1:] for x in scores] == [(4, 6), (6, 4)]


def test_a_word_of_no_class_is_refused(head):
    with pytest.raises(LabelError) as caught:
        head.scores([picture()], ["grass", "lawn", "sea"])
    assert "lawn, sea" in caught.value.found
    assert caught.value.allowed == "grass, sky, ring"
    assert "fitted on" in caught.value.fix


def test_twice_gives_equal_scores(inputs, head):
    again = predictor(settings(), inputs)
    assert (again.scores([picture()], ["grass", "sky"])[0] == head.scores([picture()], ["grass", "sky"])[0]).all()
    other = predictor(settings({"seed": 1}), inputs)
    assert (other.scores([picture()], ["grass"])[0] != head.scores([picture()], ["grass"])[0]).any()


def test_the_backbone_stays_as_it_is(inputs, head):
    fresh = load_features(inputs["encode"], stride=4).state_dict()
    for name, value in head.model.features.state_dict().items():
        assert torch.equal(value, fresh[name])  # running statistics of the stem too


def test_it_learns_what_is_easy(tmp_path):
    prepared(tmp_path, counts={"train": 4})
    for number in range(4):
        truth = np.zeros((16, 16), np.uint8)
        truth[:, 8:] = 1
        image = np.where(truth[..., None] == 1, 230, 20).astype(np.uint8).repeat(3, axis=2)
        Image.fromarray(image).save(tmp_path / f"raw/images/train/{number}.png")
        Image.fromarray(truth).save(tmp_path / f"raw/masks/train/{number}.png")
    prepare = prepare_again(tmp_path)
    encode = encoded(tmp_path / "encode", vocabulary=vocabulary_of(prepare))
    head = predictor(
        settings({"baseline.linear.steps": 20, "baseline.linear.lr": 0.05}), {"prepare": prepare, "encode": encode}
    )
    (scores,) = head.scores([image], ["grass", "sky"])
    assert (scores.argmax(0)[:, 0] == 0).all()
    assert (scores.argmax(0)[:, -1] == 1).all()


def test_a_batch_without_labels_does_no_harm(inputs, monkeypatch):
    module = LinearTraining(load_features(inputs["encode"], stride=8), classes=2, settings=None)
    monkeypatch.setattr(module, "log", lambda *_: None)
    loss = module.training_step({"image": pixels(1, 3, 16, 16), "target": torch.full((1, 16, 16), -100)}, 0)
    loss.backward()
    assert loss == 0
    assert (module.head.weight.grad == 0).all()


def test_an_unseen_class_never_wins_however_low_the_others_are(inputs):
    module = LinearTraining(load_features(inputs["encode"], stride=8), classes=1, settings=None)
    nn.init.constant_(module.head.bias, -500)  # type: ignore[arg-type]
    head = LinearHead(module, Vocabulary(names=("ring", "sky"), seen=(False, True)))
    (scores,) = head.scores([picture()], ["ring", "sky"])
    assert (scores.argmax(0) == 1).all()


@pytest.mark.parametrize(
    ("fault", "found", "fix"),
    [("mask", "without a label map: 1", "remove the pictures"), ("size", "different sizes", "baseline.linear.crop")],
)
def test_pictures_that_cannot_be_trained_on(tmp_path, fault, found, fix):
    inputs = {"prepare": prepared_with_fault(tmp_path, fault), "encode": encoded(tmp_path / "encode")}
    with pytest.raises(DataError) as caught:
        predictor(settings(), inputs)
    assert found in caught.value.found
    assert fix in caught.value.fix
    if fault == "size":
        predictor(settings({"baseline.linear.crop": [8, 8]}), inputs)
