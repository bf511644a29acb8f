import numpy as np
import pytest
import torch
from helpers.tiny import prepared
from PIL import Image
from torch.nn import functional

from lexiseg.data.adapters.base import Episodes
from lexiseg.data.dataset import PreparedSplit
from lexiseg.data.episodes import episode_id, read_episodes, resize_ids, resize_picture, write_episodes
from lexiseg.errors import DataError
from lexiseg.storage import hash_tree
from lexiseg.vocabulary import Vocabulary

ABC = Vocabulary(names=("a", "b", "c"), seen=(True, True, False))


def test_there_and_back(tmp_path):
    listed = {
        "train": Episodes(("a", "b"), (("1", "a"), ("1", "b"), ("1", "a")), by_class=True),
        "test": Episodes(("c",), (("2", "c"),)),
    }
    for name in ("x", "y"):
        write_episodes(tmp_path / name, listed, ABC)
    assert {split: read_episodes(tmp_path / "x", split) for split in listed} == listed
    assert hash_tree(tmp_path / "x") == hash_tree(tmp_path / "y")


def test_training_is_not_asked_about_what_it_must_not_see(tmp_path):
    listed = Episodes(("a", "b"), (("1", "a"), ("1", "b"), ("2", "b")))
    held_out = Vocabulary(names=ABC.names, seen=(True, False, False))
    write_episodes(tmp_path, {"train": listed, "test": Episodes(("c",), (("2", "c"),))}, held_out)
    assert read_episodes(tmp_path, "train") == Episodes(("a",), (("1", "a"),))
    assert read_episodes(tmp_path, "test").classes == ("c",)


def test_other_data_sets_are_asked_about_what_is_in_their_pictures(tmp_path):
    folder = prepared(tmp_path)  # grass and sky, and the unseen ring
    for split, names in (("train", ("grass", "sky")), ("test", ("ring",))):
        data, asked = PreparedSplit(folder, split), read_episodes(folder, split)
        assert asked.classes == names
        expected = [
            (data.ids[row], data.vocabulary.names[id])
            for row in range(len(data))
            for id in np.unique(data[row]["semantic"])
            if data.vocabulary.names[id] in names
        ]
        assert asked.pairs == tuple(expected)
        assert expected


def test_no_episodes(tmp_path):
    write_episodes(tmp_path, {"train": Episodes(("a",), (("1", "a"),))}, ABC)
    with pytest.raises(DataError) as error:
        read_episodes(tmp_path, "val")
    assert "no episode in the split `val`" in error.value.found
    assert "unseen classes" in error.value.allowed
    assert "data.unseen" in error.value.fix


def test_an_id_for_each_question():
    assert len({episode_id(sample, name) for sample in ("1", "2") for name in ("cat", "dog")}) == 4


@pytest.mark.parametrize(("height", "width"), [(375, 500), (480, 640), (13, 7), (1, 1), (481, 479)])
def test_sizes_are_those_of_the_official_code(height, width):
    rng = np.random.default_rng(0)
    ids, image = rng.integers(0, 81, (height, width)), rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    tensor = torch.from_numpy(ids)[None, None].float()
    assert (resize_ids(ids, (480, 96)) == functional.interpolate(tensor, (480, 96), mode="nearest")[0, 0].numpy()).all()
    expected = np.asarray(Image.fromarray(image).resize((96, 480), Image.Resampling.BILINEAR))
    assert (resize_picture(image, (480, 96)) == expected).all()


def test_nothing_is_done_at_the_right_size():
    image = np.zeros((4, 6, 3), np.uint8)
    assert resize_picture(image, (4, 6)) is image
