import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.micro import save
from helpers.tiny import prepare_again, prepared, settings

from lexiseg.data.dataset import PreparedSplit
from lexiseg.encoders import pretrain as module
from lexiseg.encoders.pretrain import CaptionedImages, ClipPretraining, contrastive_loss, pretrain, retrieval_recall
from lexiseg.encoders.tokenizer import END
from lexiseg.errors import DataError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("data"))


def splits(data, *names):
    return {name: PreparedSplit(data, name) for name in names}


def recipe(**changes):
    return settings({f"encode.pretrain.{key}": value for key, value in changes.items()}).encode.pretrain


# ---- the loss ----------------------------------------------------------------------------------------------------


def test_different_captions_give_infonce():
    logits = torch.randn(5, 5)
    target = torch.arange(5)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert contrastive_loss(logits, target) == pytest.approx(float(expected), abs=1e-6)


def test_equal_captions_share_the_target():
    group = torch.tensor([0, 1, 0, 2])
    logits = torch.full((4, 4), -50.0)
    logits[group[:, None] == group] = 0.0
    # A perfect encoder cannot tell the two apart and is not asked to: log 2 for them, 0 for the others.
    assert float(contrastive_loss(logits, group)) == pytest.approx(np.log(2) / 2, abs=1e-6)
    wrong = logits.clone()
    wrong[0, 2] = wrong[2, 0] = -50.0
    assert contrastive_loss(wrong, group) > contrastive_loss(logits, group)


def test_images_and_texts_count_alike():
    logits, group = torch.randn(4, 4), torch.tensor([0, 1, 1, 2])
    assert contrastive_loss(logits, group) == pytest.approx(float(contrastive_loss(logits.T, group)), abs=1e-6)
    order = torch.tensor([2, 0, 3, 1])
    moved = contrastive_loss(logits[order][:, order], group[order])
    assert moved == pytest.approx(float(contrastive_loss(logits, group)), abs=1e-6)


# ---- retrieval ---------------------------------------------------------------------------------------------------


def test_recall_at_one_and_more():
    text = F.normalize(torch.eye(4) + 0.01, dim=1)
    image = text[[0, 1, 3, 2]]  # the last two are exchanged
    found = retrieval_recall(image, text, ["a", "b", "c", "d"], ranks=(1, 4))
    assert found == {"image_to_text_r1": 0.5, "image_to_text_r4": 1, "text_to_image_r1": 0.5, "text_to_image_r4": 1}


def test_the_two_directions_differ():
    text = torch.eye(2)
    image = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.5]]), dim=1)
    found = retrieval_recall(image, text, ["a", "b"], ranks=(1,))
    assert found == {"image_to_text_r1": 0.5, "text_to_image_r1": 1.0}


def test_any_picture_with_the_same_caption_is_right():
    text = torch.eye(3)[[0, 0, 2]]
    image = torch.eye(3)[[0, 1, 2]]
    assert retrieval_recall(image, text, ["a", "a", "b"], ranks=(1,))["text_to_image_r1"] == 1.0


def test_an_encoder_that_gives_all_texts_one_vector_is_not_perfect():
    same = F.normalize(torch.ones(10, 3), dim=1)
    found = retrieval_recall(same, same, [str(number) for number in range(10)], ranks=(1,))
    assert found["image_to_text_r1"] == pytest.approx(0.1)


def test_fewer_pairs_than_the_rank():
    assert retrieval_recall(torch.eye(2), torch.eye(2), ["a", "b"], ranks=(5,))["image_to_text_r5"] == 1.0


# ---- the batches -------------------------------------------------------------------------------------------------


def batches(monkeypatch, data, names, **changes):
    """The batch function that `pretrain` trains with."""
    caught = {}

    def fake_fit(trained, *, batch, **_):
        caught["batch"] = batch
        return []

    monkeypatch.setattr(module, "fit", fake_fit)
    model, tokenizer, _ = pretrain(splits(data, *names), recipe(**changes), seed=5)
    return caught["batch"], model, tokenizer


def test_iconic_first_then_in_turn(monkeypatch, data):
    batch, _, _ = batches(
        monkeypatch, data, ["train", "iconic"], steps=10, iconic_share=0.4, iconic_batch=3, scene_batch=2
    )
    sizes = [tuple(batch(step)["images"].shape) for step in range(8)]
    iconic, scene = (3, 3, 8, 8), (2, 3, 16, 16)
    assert sizes == [iconic] * 4 + [iconic, scene, iconic, scene]


def test_each_source_is_passed_over_whole(monkeypatch, data):
    """4 scenes, 2 a batch, and 4 iconic pictures, 4 a batch: in every two turns each picture comes once."""
    batch, _, _ = batches(
        monkeypatch, data, ["train", "iconic"], steps=10, iconic_share=0.2, iconic_batch=4, scene_batch=2
    )
    made = [batch(step)["images"].flatten(1) for step in range(10)]
    for chunks in ([made[3], made[5]], [made[7], made[9]], [made[2]], [made[4]]):
        assert len(torch.cat(chunks).unique(dim=0)) == 4


def test_a_batch_depends_on_its_step_alone(monkeypatch, data):
    batch, _, _ = batches(monkeypatch, data, ["train", "iconic"])
    first = [batch(step) for step in (3, 0, 3)]
    assert torch.equal(first[0]["images"], first[2]["images"])
    assert torch.equal(first[0]["tokens"], first[2]["tokens"])
    assert first[0]["crop"] == first[2]["crop"]
    assert not torch.equal(first[0]["tokens"], first[1]["tokens"])


def test_what_a_batch_holds(monkeypatch, data):
    batch, model, tokenizer = batches(monkeypatch, data, ["train", "iconic"], steps=40, iconic_share=0.5)
    crops = set()
    for step in range(20):
        made = batch(step)
        assert made["images"].dtype == torch.uint8
        same = (made["tokens"][:, None] == made["tokens"]).all(dim=-1)
        assert torch.equal(same, made["group"][:, None] == made["group"])
        end = tokenizer.tokenizer.token_to_id(END)
        assert (made["tokens"][:, -1] == end).any()  # cut to the longest caption
        crops.add(made["crop"])
    assert crops == {(0, 0), (0, 1), (1, 0), (1, 1)}  # of an 8 x 8 picture in a grid of 2 x 2 patches
    assert batch(21)["crop"] is None
    assert model.config.image_size == 16


def test_without_iconic_pictures_scenes_are_all(monkeypatch, data):
    batch, _, _ = batches(monkeypatch, data, ["train"], scene_batch=2, iconic_batch=3)
    assert {tuple(batch(step)["images"].shape) for step in range(4)} == {(2, 3, 16, 16)}
    assert batch(0)["crop"] is None


def test_the_words_of_both_splits(monkeypatch, data):
    _, model, tokenizer = batches(monkeypatch, data, ["train", "iconic"])
    assert tokenizer.unknown_words("a small red ring on grass sky over") == []
    assert model.config.vocab_size == tokenizer.vocab_size == 12
    assert model.config.context_length == 32


def test_pictures_without_a_caption_are_left_out(tmp_path):
    prepared(tmp_path)
    lines = (tmp_path / "raw/captions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "raw/captions.jsonl").write_text("".join(line for line in lines if "train/2" not in line))
    split = PreparedSplit(prepare_again(tmp_path), "train")
    images = CaptionedImages(split, name="train")
    assert images.images.shape == (3, 3, 16, 16)
    assert torch.equal(images.images[2], torch.from_numpy(split.image(3)).permute(2, 0, 1))
    assert len(images.captions) == 3


@pytest.mark.parametrize("fault", ["sizes", "captions"])
def test_pictures_that_cannot_be_one_batch(tmp_path, fault):
    prepared(tmp_path)
    if fault == "sizes":
        save(tmp_path / "raw/images/train/1.png", np.zeros((20, 16, 3), np.uint8))
        save(tmp_path / "raw/masks/train/1.png", np.zeros((20, 16), np.uint8))
    else:
        (tmp_path / "raw/captions.jsonl").unlink()
    again = prepare_again(tmp_path)
    with pytest.raises(DataError) as caught:
        pretrain(splits(again, "train"), recipe(), seed=0)
    expected = {"sizes": "4 captioned images of 2 sizes", "captions": "0 captioned images"}[fault]
    assert f"split `train` has {expected}" in caught.value.found
    assert "one size" in caught.value.allowed
    assert "`encode.clip.source`" in caught.value.fix


def test_photographs_are_resized_to_one_size(tmp_path):
    prepared(tmp_path)
    save(tmp_path / "raw/images/train/1.png", np.full((20, 40, 3), 200, np.uint8))
    save(tmp_path / "raw/masks/train/1.png", np.zeros((20, 40), np.uint8))
    split = PreparedSplit(prepare_again(tmp_path), "train")
    images = CaptionedImages(split, name="train", size=24).images
    assert images.shape == (4, 3, 24, 24)
    assert (images[split.ids.index("1")] == 200).all()
    model, _, _ = pretrain({"train": split}, recipe(size=24, steps=1, warmup=0), seed=0)
    assert model.config.image_size == 24


# ---- training ----------------------------------------------------------------------------------------------------


def test_twice_gives_equal_weights(data):
    one, other = (pretrain(splits(data, "train", "iconic"), recipe(steps=3), seed=1) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(one[0].state_dict().values(), other[0].state_dict().values(), strict=True)
    )
    assert one[1].to_json() == other[1].to_json()
    assert one[2] == other[2]
    assert [row["step"] for row in one[2]] == [1, 2, 3]


def test_it_learns(data):
    curve = pretrain(splits(data, "train"), recipe(steps=10), seed=0)[2]
    assert np.mean([row["loss"] for row in curve[-3:]]) < 0.8 * curve[0]["loss"]


def test_weight_decay_is_for_matrices(monkeypatch, data):
    _, model, _ = batches(monkeypatch, data, ["train"])
    optimiser = ClipPretraining(model, recipe(weight_decay=0.3)).configure_optimizers()["optimizer"]
    matrices, others = optimiser.param_groups
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim >= 2 for p in matrices["params"])
    assert all(p.ndim < 2 for p in others["params"])
    assert any(p is model.logit_scale for p in others["params"])
    assert len(matrices["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_the_scale_is_clamped(monkeypatch, data):
    batch, model, _ = batches(monkeypatch, data, ["train"])
    training = ClipPretraining(model.eval(), recipe(max_scale=20.0))
    monkeypatch.setattr(training, "log", lambda *_: None)
    losses = []
    for scale in (20.0, 1000.0):
        model.logit_scale.data.fill_(np.log(scale))
        losses.append(float(training.training_step(batch(1), 1).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
