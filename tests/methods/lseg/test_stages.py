import pickle

import numpy as np
import pytest
import torch
from helpers.tiny import encoded, prepare_again, prepared, prepared_with_fault, settings, text_table, vocabulary_of
from PIL import Image

from lexiseg.data.dataset import PreparedSplit
from lexiseg.errors import DataError
from lexiseg.methods.lseg.build import load_model
from lexiseg.methods.lseg.stages import SeenBatches, train
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


def test_loader_workers_have_no_effect(inputs, tmp_path):
    assert trained(inputs, tmp_path / "a", workers=0) == trained(inputs, tmp_path / "b", workers=2)


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


def test_no_train_split(tmp_path):
    inputs = {"prepare": prepared(tmp_path, counts={"test": 2}), "encode": encoded(tmp_path / "encode")}
    with pytest.raises(DataError, match="`train`"):
        trained(inputs, tmp_path / "out")
