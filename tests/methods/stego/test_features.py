"""Features on disk: what the trunk gave, whatever the shards, and after an interruption too."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from helpers.micro import picture, save
from helpers.tiny import prepare_again, prepared, prepared_photos, settings

from lexiseg.checkpoint import checkpoints_in
from lexiseg.data.crops import centre_square, five_crops
from lexiseg.data.dataset import PreparedSplit
from lexiseg.encoders.tiny_trunk import TinyTrunk
from lexiseg.errors import DataError
from lexiseg.methods.stego import features
from lexiseg.methods.stego.features import FeatureStore, Pieces, grid_size, to_grid, write_features
from lexiseg.storage import hash_tree, read_json

WIDTH = 16
CELL_BYTES = 2 * WIDTH


def pieces(prepare, changes=None, *, split="train") -> Any:
    changes = {f"stego.features.{name}": value for name, value in (changes or {}).items()}
    return Pieces(PreparedSplit(prepare, split), settings(changes).stego.features)


def trunk() -> Any:
    torch.manual_seed(0)
    return TinyTrunk(image_size=16, width=WIDTH, layers=1).eval()


def given(images, network):
    """What the trunk gives for pictures (B, H, W, 3) that need no resizing, as half precision holds it."""
    with torch.no_grad():
        return network(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)).half().float()


def close(found, expected):
    # A batch of another size may round another way, by a step of half precision.
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Five pictures of 16 x 24 pixels."""
    return prepared(tmp_path_factory.mktemp("wide"), width=24, counts={"train": 5})


# ---- pieces ------------------------------------------------------------------------------------------------------


def test_whole_pictures(wide):
    split, found = PreparedSplit(wide, "train"), pieces(wide)
    assert len(found) == found.pictures == 5
    assert found.ids == split.ids
    assert found.split == "train"
    for number in range(5):
        assert found.picture_of(number) == number
        assert found.picture_id(number) == split.ids[number]
        assert np.array_equal(found.image(number), split[number]["image"])
        assert np.array_equal(found.labels(number), split[number]["semantic"])


def test_the_first_pictures(wide):
    found = pieces(wide, {"pictures": 2})
    assert len(found) == 2
    assert found.ids == PreparedSplit(wide, "train").ids[:2]
    assert len(pieces(wide, {"pictures": 100})) == 5


def test_five_crops_of_every_picture(wide):
    split, found = PreparedSplit(wide, "train"), pieces(wide, {"five_crop": True, "pictures": 2})
    assert (len(found), found.pictures) == (10, 2)
    assert found.ids == [f"{name} {number}" for name in split.ids[:2] for number in range(5)]
    assert [found.picture_of(piece) for piece in range(10)] == [0] * 5 + [1] * 5
    assert found.picture_id(7) == split.ids[1]
    for piece in range(10):
        sample = split[piece // 5]
        assert np.array_equal(found.image(piece), five_crops(sample["image"])[piece % 5])
        assert np.array_equal(found.labels(piece), five_crops(sample["semantic"])[piece % 5])


@pytest.mark.parametrize("kind", ["bilinear", "nearest"])
def test_centre_squares(wide, kind):
    sample, found = PreparedSplit(wide, "train")[1], pieces(wide, {"crop": 8, "filter": kind})
    assert np.array_equal(found.image(1), centre_square(sample["image"], 8, nearest=kind == "nearest"))
    assert np.array_equal(found.labels(1), centre_square(sample["semantic"], 8, nearest=True))


def test_centre_squares_of_five_crops(wide):
    sample, found = PreparedSplit(wide, "train")[0], pieces(wide, {"crop": 4, "five_crop": True})
    assert np.array_equal(found.image(3), centre_square(five_crops(sample["image"])[3], 4, nearest=False))
    assert found.labels(3).shape == (4, 4)


def test_pictures_without_labels(tmp_path):
    assert pieces(prepared_photos(tmp_path), {"five_crop": True}).labels(0) is None


def test_a_split_without_pictures_is_refused(wide):
    empty = PreparedSplit(wide, "train")
    empty.ids = []
    with pytest.raises(DataError) as error:
        Pieces(empty, settings().stego.features)
    assert error.value.found == "no picture in the split `train`"
    assert error.value.allowed == "at least one"
    assert "stego.features.split" in error.value.fix


# ---- store -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", [1, 2, 100], ids=["five shards", "three shards", "one shard"])
def test_the_store_gives_what_the_trunk_gave(wide, tmp_path, monkeypatch, pictures):
    monkeypatch.setattr(features, "_SHARD_BYTES", pictures * 6 * CELL_BYTES + 1)
    monkeypatch.setattr(features, "BATCH_PIXELS", 2 * 16 * 24)
    seen, network = pieces(wide), trunk()
    write_features(seen, network, tmp_path)
    expected = given([seen.image(number) for number in range(5)], network)
    store = FeatureStore(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == -(-5 // pictures)
    assert (len(store), store.ids, store.channels, store.grid, store.cells) == (5, seen.ids, WIDTH, (2, 3), 30)
    close(store.maps(range(5)), expected)
    # Any order, and the same one twice.
    for chosen in ([4, 0, 0, 3], torch.tensor([2])):
        assert torch.equal(store.maps(chosen), store.maps(range(5))[torch.as_tensor(chosen)])
    assert store.maps([3]).dtype == torch.float32
    # Cells are counted through all pieces, row by row.
    rows = store.maps(range(5)).permute(0, 2, 3, 1).reshape(30, WIDTH)
    cells = torch.tensor([29, 0, 7, 7, 6, 13])
    assert torch.equal(store.tokens(cells), rows[cells])
    assert torch.equal(store.sample(30, generator=torch.Generator()), rows)
    assert torch.equal(store.sample(31, generator=torch.Generator()), rows)


def test_a_sample_is_of_different_cells_and_follows_from_its_generator(wide, tmp_path):
    write_features(pieces(wide), trunk(), tmp_path)
    store = FeatureStore(tmp_path)
    first, again, other = (store.sample(12, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    rows = store.tokens(torch.arange(30))
    places = [int((rows == row).all(dim=1).nonzero()[0]) for row in first]
    assert len(set(places)) == 12
    assert places == sorted(places)


def test_a_store_can_be_sent_to_a_worker(wide, tmp_path):
    write_features(pieces(wide), trunk(), tmp_path)
    store = FeatureStore(tmp_path)
    maps = store.maps([1])
    sent = pickle.dumps(store)
    assert len(sent) < 2000  # no features
    assert torch.equal(pickle.loads(sent).maps([1]), maps)


def test_the_index_names_pieces_and_shards(wide, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_SHARD_BYTES", 2 * 6 * CELL_BYTES)
    seen = pieces(wide)
    write_features(seen, trunk(), tmp_path)
    shards = [f"features-{number:05d}.safetensors" for number in range(3)]
    index = {"ids": seen.ids, "channels": WIDTH, "height": 2, "width": 3, "shards": shards}
    assert read_json(tmp_path / "index.json") == index
    assert sorted(hash_tree(tmp_path)) == [*shards, "index.json"]


class Stopping:
    """A trunk that counts pictures, and fails after some of them."""

    def __init__(self, network, *, after=None):
        self.network, self.left, self.seen = network, after, 0
        self.multiple, self.channels = network.multiple, network.channels

    def __call__(self, images):
        if self.left is not None and self.seen >= self.left:
            raise KeyboardInterrupt
        self.seen += len(images)
        return self.network(images)

    def to(self, device):
        self.network.to(device)

    def cpu(self):
        self.network.cpu()


def test_after_an_interruption_only_the_other_shards_are_computed(wide, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_SHARD_BYTES", 2 * 6 * CELL_BYTES)
    seen = pieces(wide)
    folders = [tmp_path / name for name in ("whole", "stopped", "finished")]
    for folder in folders:
        folder.mkdir()
    write_features(seen, trunk(), folders[0])
    with checkpoints_in(tmp_path / "checkpoints"):
        with pytest.raises(KeyboardInterrupt):
            write_features(seen, Stopping(trunk(), after=2), folders[1])
        assert not (folders[1] / "index.json").exists()
        # The stage begins anew in an empty folder.
        rest = Stopping(trunk())
        write_features(seen, rest, folders[2])
    assert rest.seen == 3
    assert hash_tree(folders[2]) == hash_tree(folders[0])


def test_a_finished_run_is_not_repeated(wide, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "again").mkdir()
    with checkpoints_in(tmp_path / "checkpoints"):
        write_features(pieces(wide), trunk(), tmp_path / "out")
        network = Stopping(trunk())
        write_features(pieces(wide), network, tmp_path / "again")
    assert network.seen == 0
    assert hash_tree(tmp_path / "again") == hash_tree(tmp_path / "out")


# ---- sizes -------------------------------------------------------------------------------------------------------


def test_a_size_that_is_no_multiple_of_the_patch_is_resized(tmp_path):
    seen, network = pieces(prepared(tmp_path, height=19, width=21, counts={"train": 2})), trunk()
    (tmp_path / "out").mkdir()
    write_features(seen, network, tmp_path / "out")
    store = FeatureStore(tmp_path / "out")
    assert store.grid == (2, 3)
    images = torch.from_numpy(np.stack([seen.image(number) for number in range(2)])).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(images.float(), size=(16, 24), mode="bilinear", antialias=True)
    close(store.maps([0, 1]), given(resized.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy(), network))


@pytest.mark.parametrize(("side", "nearest"), [(8, 8), (11, 8), (13, 16), (16, 16), (500, 496)])
def test_the_nearest_multiple_of_the_patch(side, nearest):
    assert grid_size(side, 8, 8) == (nearest, 8)
    assert grid_size(16, side, 8) == (16, nearest)


def test_pictures_of_that_size_are_left_as_they_are():
    images = torch.from_numpy(picture(0, height=16, width=8)).permute(2, 0, 1)[None]
    assert to_grid(images, (16, 8)) is images
    constant = torch.full((1, 3, 5, 9), 201, dtype=torch.uint8)
    assert torch.equal(to_grid(constant, (8, 8)), torch.full((1, 3, 8, 8), 201, dtype=torch.uint8))


def test_pictures_smaller_than_a_patch_are_refused(wide, tmp_path):
    with pytest.raises(DataError) as error:
        write_features(pieces(wide, {"crop": 7}), trunk(), tmp_path)
    assert error.value.found == "a picture of 7 x 7 pixels"
    assert error.value.allowed == "sides of at least 8 pixels, a patch of the trunk"
    assert "data.min_side" in error.value.fix


def test_pictures_of_different_sizes_are_refused_unless_cropped(tmp_path):
    prepared(tmp_path, counts={"train": 3})
    save(tmp_path / "raw/images/train/1.png", np.zeros((24, 16, 3), np.uint8))
    save(tmp_path / "raw/masks/train/1.png", np.zeros((24, 16), np.uint8))
    mixed = prepare_again(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError) as error:
        write_features(pieces(mixed), trunk(), tmp_path / "out")
    assert error.value.found.startswith("pictures of different sizes: 16 x 16, 24 x 16 (near ")
    assert error.value.allowed == "pictures of one size, or crops of one"
    assert "stego.features.crop" in error.value.fix
    write_features(pieces(mixed, {"crop": 16}), trunk(), tmp_path / "out")
    assert len(FeatureStore(tmp_path / "out")) == 3


def test_features_that_half_precision_cannot_hold_are_refused(wide, tmp_path):
    network = trunk()
    with torch.no_grad():
        network.vision.ln_post.weight.fill_(1e6)
    with pytest.raises(DataError) as error:
        write_features(pieces(wide), network, tmp_path)
    assert "features beyond +-65504 or not finite" in error.value.found
    assert "half precision" in error.value.allowed
    assert "`encode.trunk`" in error.value.fix
    assert not list(tmp_path.iterdir())


def test_features_that_are_not_there(tmp_path):
    with pytest.raises(DataError) as error:
        FeatureStore(tmp_path)
    assert error.value.found == f"no index.json in {tmp_path}"
    assert error.value.allowed == "finished features"
    assert "dvc repro stego-features" in error.value.fix
