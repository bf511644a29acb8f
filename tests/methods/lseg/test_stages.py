import pickle

import numpy as np
import pytest
import torch
from helpers.tiny import (
    encoded,
    prepare_again,
    prepared,
    prepared_photos,
    prepared_with_fault,
    settings,
    text_table,
    vocabulary_of,
)
from PIL import Image

from lexiseg.data.adapters.base import Episodes
from lexiseg.data.dataset import PreparedSplit
from lexiseg.data.episodes import read_episodes, resize_ids, resize_picture
from lexiseg.errors import DataError
from lexiseg.methods.lseg.build import load_model
from lexiseg.methods.lseg.stages import EpisodeBatches, SeenBatches, train
from lexiseg.settings import View
from lexiseg.storage import hash_tree, load_tensors, read_json

DECLARED = ["seed", "threads", "lseg.model", "lseg.train"]  # as in dvc.yaml
STATISTICS = {"mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    prepare = prepared(root, counts={"train": 5, "test": 2})
    return {"prepare": prepare, "encode": encoded(root / "encode", vocabulary=vocabulary_of(prepare))}


def trained(inputs, out, **changes):
    train(View(settings({f"lseg.train.{key}": value for key, value in changes.items()}), DECLARED), inputs, out)
    return hash_tree(out)


def batches(inputs, *, split="train", **changes):
    recipe = settings({f"lseg.train.{key}": value for key, value in changes.items()}).lseg.train
    return SeenBatches(PreparedSplit(inputs["prepare"], split), recipe, config=STATISTICS, seed=3)


# ---- batches -----------------------------------------------------------------------------------------------------


def test_pictures_and_targets_of_the_seen_classes(inputs):
    made = batches(inputs, flip=False, batch=5)
    assert made.labels == ("grass", "sky")
    batch = made(0)
    split = PreparedSplit(inputs["prepare"], "train")
    pictures = {split.image(i).tobytes(): i for i in range(5)}
    assert len(pictures) == 5
    for image, target in zip(batch["image"], batch["target"], strict=True):
        pixels = np.rint((image.permute(1, 2, 0).numpy() + 1) * 127.5).astype(np.uint8)
        truth = split[pictures[pixels.tobytes()]]["semantic"]
        # ring, the third class, is not seen: its pixels count for nothing
        assert (target.numpy() == np.where(truth == 2, -100, truth)).all()
    assert batch["image"].shape == (5, 3, 16, 16)
    assert batch["image"].dtype == torch.float32
    assert batch["target"].dtype == torch.int64


def test_a_batch_depends_on_its_step_alone(inputs):
    made = batches(inputs, photometric=0.3, crop=[8, 12], scale=[0.5, 2.0])
    first, other, again = made(4), made(0), batches(inputs, photometric=0.3, crop=[8, 12], scale=[0.5, 2.0])(4)
    for key in ("image", "target"):
        assert torch.equal(first[key], again[key])
    assert not torch.equal(first["image"], other["image"])
    assert first["image"].shape == (2, 3, 8, 12)
    assert first["target"].shape == (2, 8, 12)


def test_a_worker_can_be_sent_the_batches(inputs):
    made = batches(inputs)
    copy = pickle.loads(pickle.dumps(made))
    assert torch.equal(copy(1)["target"], made(1)["target"])


def test_the_base_size_is_what_scale_one_means(inputs):
    made = batches(inputs, base_size=32, scale=[1.0, 1.0], crop=[32, 32], flip=False)
    # 16 x 16 pictures become 32 x 32: nothing of the crop is padding, which would be ignored as a whole
    rows = (made(0)["target"] == -100).all(dim=2)
    assert not rows.any()
    small = batches(inputs, base_size=8, scale=[1.0, 1.0], crop=[32, 32], flip=False)(0)
    assert (small["target"][:, 8:] == -100).all()
    assert (small["image"][:, :, 8:] == -1).all()


def test_pictures_are_mirrored_with_their_labels(inputs):
    plain, flipped = batches(inputs, flip=False), batches(inputs, flip=True)
    mirrored = 0
    for step in range(6):
        a, b = plain(step), flipped(step)
        for k in range(2):
            turned = torch.equal(a["image"][k].flip(-1), b["image"][k])
            assert turned or torch.equal(a["image"][k], b["image"][k])
            assert torch.equal(a["target"][k].flip(-1) if turned else a["target"][k], b["target"][k])
            mirrored += turned
    assert 2 <= mirrored <= 10


def test_pictures_of_one_size_without_their_aspect(inputs):
    made = batches(inputs, flip=False, batch=5, resize=[24, 8])(0)
    split = PreparedSplit(inputs["prepare"], "train")
    expected = {resize_picture(split[i]["image"], (24, 8)).tobytes(): split[i]["semantic"] for i in range(5)}
    for image, target in zip(made["image"], made["target"], strict=True):
        pixels = np.rint((image.permute(1, 2, 0).numpy() + 1) * 127.5).astype(np.uint8)
        truth = resize_ids(expected[pixels.tobytes()], (24, 8))
        assert (target.numpy() == np.where(truth == 2, -100, truth)).all()


# ---- batches of two labels ---------------------------------------------------------------------------------------


def questions(inputs, *, episodes=None, **changes):
    recipe = settings({f"lseg.train.{key}": value for key, value in changes.items()}).lseg.train
    episodes = episodes or read_episodes(inputs["prepare"], "train")
    return EpisodeBatches(PreparedSplit(inputs["prepare"], "train"), episodes, recipe, config=STATISTICS, seed=3)


def pictures_of(inputs, batch):
    """The samples that the pictures of a batch are, without augmentation."""
    split = PreparedSplit(inputs["prepare"], "train")
    known = {split.image(row).tobytes(): split[row] for row in range(len(split))}
    return [
        known[np.rint((image.permute(1, 2, 0).numpy() + 1) * 127.5).astype(np.uint8).tobytes()]
        for image in batch["image"]
    ]


def test_every_picture_is_asked_about_one_seen_class(inputs):
    made = questions(inputs, flip=False, batch=10)
    assert made.labels == ("others", "grass", "sky")
    assert made.size == 10  # five pictures with both
    batch = made(0)
    asked = []
    for sample, labels, target in zip(pictures_of(inputs, batch), batch["labels"], batch["target"], strict=True):
        assert labels[0] == 0
        name = made.labels[labels[1]]
        assert (target.numpy() == (sample["semantic"] == ("grass", "sky").index(name))).all()
        asked.append((sample["id"], name))
    assert sorted(asked) == sorted(read_episodes(inputs["prepare"], "train").pairs)  # an epoch, each question once
    assert batch["labels"].dtype == batch["target"].dtype == torch.int64


def test_questions_depend_on_their_step_alone(inputs):
    changes = {"photometric": 0.3, "crop": [8, 12], "scale": [0.5, 2.0], "batch": 4}
    made = pickle.loads(pickle.dumps(questions(inputs, **changes)))
    first, other, again = made(4), made(0), questions(inputs, **changes)(4)
    assert all(torch.equal(first[key], again[key]) for key in ("image", "target", "labels"))
    assert not torch.equal(first["image"], other["image"])


def test_the_border_of_objects_is_others(tmp_path):
    prepared(tmp_path, counts={"train": 2})
    for path in (tmp_path / "raw/masks/train").iterdir():
        mask = np.zeros((16, 16), np.uint8)
        mask[:8], mask[8] = 1, 255
        Image.fromarray(mask).save(path)
    inputs = {"prepare": prepare_again(tmp_path)}
    batch = questions(inputs, flip=False, batch=4)(0)
    for labels, target in zip(batch["labels"], batch["target"], strict=True):
        rows = slice(9, 16) if labels[1] == 1 else slice(0, 8)  # grass below, sky above
        expected = torch.zeros(16, 16, dtype=torch.int64)
        expected[rows] = 1
        assert torch.equal(target, expected)
    # What padding adds is no pixel of the picture, and counts nowhere.
    padded = questions(inputs, flip=False, batch=4, crop=[20, 16])(0)["target"]
    assert (padded[:, 16:] == -100).all()
    assert (padded[:, :16] >= 0).all()


def test_rare_classes_are_as_frequent_where_the_data_set_says_so(inputs):
    ids = PreparedSplit(inputs["prepare"], "train").ids
    pairs = (*((id, "grass") for id in ids), (ids[0], "sky"))
    share = {}
    for by_class in (False, True):
        made = questions(inputs, episodes=Episodes(("grass", "sky"), pairs, by_class), batch=64)
        share[by_class] = float((torch.cat([made(step)["labels"] for step in range(5)])[:, 1] == 2).float().mean())
        assert made.size == (5 if by_class else 6)
    assert share[False] == pytest.approx(1 / 6, abs=0.05)
    assert share[True] == pytest.approx(1 / 2, abs=0.1)


# ---- the stage ---------------------------------------------------------------------------------------------------


def test_what_training_writes(inputs, tmp_path):
    files = trained(inputs, tmp_path, steps=3)
    assert sorted(files) == ["curve.csv", "model.json", "model.safetensors"]
    config = read_json(tmp_path / "model.json")
    assert config["vocabulary"] == vocabulary_of(inputs["prepare"]).to_json()
    assert (config["method"], config["stand_ins"], config["text_dim"]) == ("lseg", {}, 24)
    assert (tmp_path / "curve.csv").read_text().splitlines()[0] == "step,loss"
    assert len((tmp_path / "curve.csv").read_text().splitlines()) == 4
    model, _ = load_model(tmp_path)
    assert model.head.weight.abs().sum() > 0


def test_twice_gives_equal_bytes(inputs, tmp_path):
    assert trained(inputs, tmp_path / "a") == trained(inputs, tmp_path / "b")
    assert str(tmp_path) not in (tmp_path / "a/model.json").read_text()


@pytest.mark.parametrize("labels", ["dataset", "episode"])
def test_loader_workers_have_no_effect(inputs, tmp_path, labels):
    one = trained(inputs, tmp_path / "a", workers=0, labels=labels)
    assert one == trained(inputs, tmp_path / "b", workers=2, labels=labels)


def test_another_seed_gives_other_weights(inputs, tmp_path):
    one = trained(inputs, tmp_path / "a")
    train(View(settings({"seed": 1}), DECLARED), inputs, tmp_path / "b")
    assert hash_tree(tmp_path / "b")["model.safetensors"] != one["model.safetensors"]


def test_epochs_instead_of_steps(inputs, tmp_path):
    # 5 pictures, batches of 2 and 1 step for each: 2 steps in an epoch
    trained(inputs, tmp_path, steps=None, epochs=3)
    assert (tmp_path / "curve.csv").read_text().splitlines()[-1].startswith("6,")


def test_the_papers_recipe_runs(inputs, tmp_path):
    recipe = {"optimiser": "sgd", "schedule": "poly", "schedule_unit": "epoch", "lr_batch": 16, "accumulate": 2}
    trained(inputs, tmp_path, **recipe, steps=None, epochs=2)
    assert all(torch.isfinite(value).all() for value in load_tensors(tmp_path / "model.safetensors").values())


def test_training_with_two_labels(inputs, tmp_path):
    for folder in "ab":
        trained(inputs, tmp_path / folder, labels="episode", steps=3)
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b")
    assert hash_tree(tmp_path / "a") != trained(inputs, tmp_path / "c", steps=3)
    # 5 pictures with two classes each, batches of 2: 5 steps in an epoch
    trained(inputs, tmp_path / "d", labels="episode", steps=None, epochs=1)
    assert (tmp_path / "d/curve.csv").read_text().splitlines()[-1].startswith("5,")


def test_stand_ins_of_a_table_are_noted(inputs, tmp_path):
    table = text_table(tmp_path, ["grass", "sky", "circle"])
    encode = encoded(tmp_path / "encode", changes={**table, "encode.text.stand_ins": {"ring": "circle"}})
    trained({**inputs, "encode": encode}, tmp_path / "out")
    assert read_json(tmp_path / "out/model.json")["stand_ins"] == {"ring": "circle"}


def test_a_split_without_labels_learns_nothing_and_does_not_break(tmp_path):
    prepared(tmp_path, counts={"train": 2})
    for path in (tmp_path / "raw/masks/train").iterdir():
        Image.fromarray(np.full((16, 16), 2, np.uint8)).save(path)  # only the unseen class
    prepare = prepare_again(tmp_path)
    inputs = {"prepare": prepare, "encode": encoded(tmp_path / "encode", vocabulary=vocabulary_of(prepare))}
    trained(inputs, tmp_path / "out", weight_decay=0.0)
    model, _ = load_model(tmp_path / "out")
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert (model.head.weight == 0).all()


def test_no_class_to_ask_for(tmp_path):
    prepared(tmp_path, counts={"train": 2})
    for path in (tmp_path / "raw/masks/train").iterdir():
        Image.fromarray(np.full((16, 16), 2, np.uint8)).save(path)  # only the unseen class
    inputs = {"prepare": prepare_again(tmp_path), "encode": encoded(tmp_path / "encode")}
    with pytest.raises(DataError, match="no episode in the split `train`"):
        trained(inputs, tmp_path / "out", labels="episode")


@pytest.mark.parametrize(
    ("fault", "found", "fix"),
    [
        ("mask", "without a label map: 1", "remove the pictures"),
        ("size", "different sizes: 12 x 16, 16 x 16", "lseg.train.crop"),
    ],
)
def test_pictures_that_cannot_be_trained_on(tmp_path, fault, found, fix):
    inputs = {"prepare": prepared_with_fault(tmp_path, fault), "encode": encoded(tmp_path / "encode")}
    with pytest.raises(DataError) as caught:
        trained(inputs, tmp_path / "out")
    assert found in caught.value.found
    assert caught.value.allowed
    assert fix in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_a_data_set_without_classes(inputs, tmp_path):
    with pytest.raises(DataError) as error:
        trained({**inputs, "prepare": prepared_photos(tmp_path)}, tmp_path / "out")
    assert error.value.found == "LSeg on a data set without classes"
    assert "classes.txt" in error.value.fix
    assert "`lseg.run: false`" in error.value.fix
    assert not (tmp_path / "out").exists()


def test_no_train_split(tmp_path):
    inputs = {"prepare": prepared(tmp_path, counts={"test": 2}), "encode": encoded(tmp_path / "encode")}
    with pytest.raises(DataError, match="`train`"):
        trained(inputs, tmp_path / "out")
