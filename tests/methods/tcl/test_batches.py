import json
from typing import Any

import numpy as np
import pytest
import torch
from helpers.shards import pair, picture, shard
from helpers.tiny import prepare_again, prepared, settings

from lexiseg.data.dataset import PreparedSplit
from lexiseg.data.shards import TarPairs
from lexiseg.errors import DataError, SettingsError
from lexiseg.methods.tcl.batches import CaptionBatches, ShardBatches, random_resized_crop

CONFIG = {"mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture(scope="module")
def prepare(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("data"), counts={"train": 4, "iconic": 4})


def recipe(**changes):
    return settings({f"tcl.train.{key}": value for key, value in changes.items()}).tcl.train


def texts_of(seen):
    """A tokenizer that notes what it is given."""

    def tokenize(texts):
        seen.append(list(texts))
        return torch.zeros(len(texts), 3, dtype=torch.int64)

    return tokenize


def batches(prepare, *, splits=("train",), seed=3, seen=None, **changes):
    return CaptionBatches(
        [PreparedSplit(prepare, name) for name in splits],
        tokenize=texts_of([] if seen is None else seen),
        settings=recipe(**changes),
        config=CONFIG,
        patch_size=(4, 4),
        seed=seed,
    )


def test_each_picture_with_its_own_caption(prepare):
    seen = []
    batch = batches(prepare, seen=seen, batch=4)(0)
    split = PreparedSplit(prepare, "train")
    of = {split.image(i).tobytes(): split.captions[i] for i in range(4)}
    for image, text in zip(batch["image"], seen[0], strict=True):
        pixels = np.rint((image.permute(1, 2, 0).numpy() + 1) * 127.5).astype(np.uint8)
        assert [text] == of[pixels.tobytes()]
    assert set(batch) == {"image", "tokens", "step"}
    assert batch["image"].shape == (4, 3, 16, 16)


def test_nouns_and_what_the_captions_mention(prepare):
    # Captions: "a small ring on grass", "grass", "a red ring", "sky over grass"; classes grass | lawn, sky, ring.
    seen = []
    made = batches(prepare, seen=seen, batch=4, text="noun")
    batch, split = made(0), PreparedSplit(prepare, "train")
    mentions = {
        "a small ring on grass": [True, False, True],
        "grass": [True, False, False],
        "a red ring": [False, False, True],
        "sky over grass": [True, True, False],
    }
    of = {split.image(i).tobytes(): split.captions[i] for i in range(4)}
    for row, image in enumerate(batch["image"]):
        pixels = np.rint((image.permute(1, 2, 0).numpy() + 1) * 127.5).astype(np.uint8)
        (caption,) = of[pixels.tobytes()]  # type: ignore[misc]
        assert batch["mentioned"][row].tolist() == mentions[caption]
        assert batch["mentioned"][row, batch["noun"][row]]
        assert split.vocabulary.names[batch["noun"][row]] in seen[0][row]
    assert {int(noun) for step in range(20) for noun in made(step)["noun"]} == {0, 1, 2}


@pytest.mark.parametrize("text", ["caption", "noun"])
def test_a_batch_depends_on_seed_and_step_alone(prepare, text):
    chosen: dict[str, Any] = {"text": text, "size": [12, 12], "crop_scale": [0.3, 1.0], "flip": True, "batch": 3}
    chosen |= {"auto_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.5, "splits": ["train"]}
    made = batches(prepare, **chosen)
    first = made(5)
    np.random.seed(9)
    torch.manual_seed(9)
    made(6)
    for key, value in batches(prepare, **chosen)(5).items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(first[key]))
    assert not torch.equal(batches(prepare, seed=4, **chosen)(5)["image"], first["image"])


def test_other_generators_are_left_alone(prepare):
    made = batches(prepare, size=[12, 12], auto_augment="rand-m9-mstd0.5-inc1", erasing=1.0)
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    made(0)
    assert (torch.rand(1), np.random.rand()) == expected


def test_augmentations_change_the_picture(prepare):
    plain = batches(prepare, batch=4)(0)["image"]
    several: list[dict[str, Any]] = [
        {"size": [16, 16], "crop_scale": [0.2, 0.5]},
        {"flip": True},
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
        {"erasing": 1.0},
    ]
    for changes in several:
        assert not torch.equal(batches(prepare, batch=4, **changes)(0)["image"], plain), changes


def test_pictures_of_two_sizes(prepare):
    with pytest.raises(DataError, match=r"8 x 8, 16 x 16") as caught:
        batches(prepare, splits=("train", "iconic"), batch=8)(0)
    assert "tcl.train.size" in caught.value.fix
    assert batches(prepare, splits=("train", "iconic"), batch=8, size=[16, 16])(0)["image"].shape == (8, 3, 16, 16)


def test_pictures_that_are_no_whole_patches(prepare):
    with pytest.raises(DataError, match="training pictures of 14 x 16 pixels") as caught:
        batches(prepare, size=[14, 16])(0)
    assert "4 x 4" in caught.value.allowed
    assert "tcl.train.size" in caught.value.fix


def test_no_captions(tmp_path):
    folder = prepared(tmp_path, counts={"train": 2})
    (tmp_path / "raw/captions.jsonl").write_text("")
    prepare_again(tmp_path)
    with pytest.raises(DataError, match="no picture with a caption at all in train"):
        batches(folder)


def test_captions_that_nobody_can_see_are_none(tmp_path):
    folder = prepared(tmp_path, counts={"train": 3})
    lines = [{"image": f"train/{n}.png", "captions": [text]} for n, text in enumerate(["   ", "\u200b", "a ring"])]
    (tmp_path / "raw/captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare_again(tmp_path)
    seen = []
    batches(folder, seen=seen, batch=1)(0)
    assert seen == [["a ring"]]


def test_more_pairs_asked_for_than_there_are(prepare):
    with pytest.raises(DataError, match="4 captioned pictures for batches of 5") as caught:
        batches(prepare, batch=5)
    assert "tcl.train.batch" in caught.value.fix


def test_a_crop_has_the_share_and_the_size_that_were_asked_for():
    image = np.arange(40 * 60 * 3, dtype=np.uint32).reshape(40, 60, 3).astype(np.uint8)
    for seed in range(20):
        crop = random_resized_crop(image, np.random.default_rng(seed), scale=(0.1, 1.0), size=(8, 12))
        assert crop.shape == (8, 12, 3)
        assert crop.dtype == np.uint8
    # A share that no rectangle of these ratios can have: the whole picture.
    narrow = np.zeros((4, 400, 3), np.uint8)
    assert random_resized_crop(narrow, np.random.default_rng(0), scale=(1.0, 1.0), size=(4, 400)).shape == (4, 400, 3)


# ---- shards --------------------------------------------------------------------------------------------------------


def shard_batches(paths, *, seen=None, seed=0, **changes):
    chosen = recipe(splits=[], shards="pairs/*.tar", **changes)
    return ShardBatches(
        TarPairs(paths),
        tokenize=texts_of([] if seen is None else seen),
        settings=chosen,
        config=CONFIG,
        patch_size=(2, 2),
        seed=seed,
    )


def test_pairs_of_shards(tmp_path):
    seen = []
    path = shard(tmp_path / "a.tar", [file for number in range(6) for file in pair(number)])
    made = shard_batches([path], seen=seen, batch=3)
    epoch = [made(step) for step in range(2)]
    found = [int((image[0, 0, 0] + 1) * 127.5 + 0.5) for batch in epoch for image in batch["image"]]
    assert sorted(found) == list(range(6))
    assert [f"picture {number}" for number in found] == seen[0] + seen[1]
    assert [batch["skipped"] for batch in epoch] == [0, 0]


def test_damaged_pairs_are_replaced_and_counted_alike_on_every_reading(tmp_path):
    files = [file for number in range(6) for file in pair(number)]
    files[2] = ("00001.png", b"damaged")
    files[9] = ("00004.txt", b"")
    path = shard(tmp_path / "a.tar", files)
    seen, again = [], []
    first = [shard_batches([path], seen=seen, batch=3)(step) for step in range(4)]
    # From the middle on, as a training that goes on does it.
    later = shard_batches([path], seen=again, batch=3)(3)
    assert sum(batch["skipped"] for batch in first) >= 4  # two epochs
    assert torch.equal(first[3]["image"], later["image"])
    assert seen[3] == again[0]
    assert not {"picture 1", "", "picture 4"} & {text for texts in seen for text in texts}


def test_shards_of_damaged_pairs_alone(tmp_path):
    path = shard(tmp_path / "a.tar", [("1.png", picture(1)[:20]), ("1.txt", b"one")])
    with pytest.raises(DataError, match="20 damaged pairs one after the other"):
        shard_batches([path], batch=1)(0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"splits": []}, "either `splits`"),
        ({"shards": "pairs/*.tar"}, "either `splits`"),
        ({"splits": [], "shards": "pairs/*.tar", "text": "noun"}, "goes with `splits`"),
        ({"splits": ["train", "train"]}, "each of `splits` once"),
        ({"auto_augment": "augmix-m3"}, "RandAugment policy of timm"),
        ({"size": [0, 8]}, "tcl.train.size"),
        ({"crop_scale": [0.5, 1.0]}, "needs `size`"),
        ({"size": [8, 8], "crop_scale": [1.0, 0.5]}, r"\[low, high\]"),
    ],
)
def test_recipes_that_contradict_themselves(changes, words):
    with pytest.raises(SettingsError, match=words):
        recipe(**changes)
