from itertools import islice

import numpy as np
import pytest

from lexiseg.data.adapters import open_adapter
from lexiseg.errors import DataError


@pytest.fixture(scope="module")
def adapter(world_folder):
    return open_adapter("world", world_folder)


def test_splits_and_vocabulary(adapter):
    assert adapter.splits() == ["train", "iconic", "val", "test", "stress"]
    vocabulary = adapter.vocabulary()
    assert len(vocabulary) == 20
    assert vocabulary.unseen_names == ("water", "wood", "star", "crescent", "hourglass")
    assert vocabulary.things == (False,) * 10 + (True,) * 10
    assert "{}" in vocabulary.templates
    assert vocabulary.synonyms == {}
    assert adapter.licence.startswith("Apache-2.0")


def test_samples_hold_what_the_world_renders(adapter, world):
    samples = list(islice(adapter.samples("val"), 3))
    assert [sample.id for sample in samples] == ["val-000000", "val-000001", "val-000002"]
    assert {sample.file for sample in samples} == {"world.yaml"}
    content, scene = samples[2].load(), world.render("val", 2)
    for name in ("image", "semantic", "panoptic"):
        assert np.array_equal(getattr(content, name), getattr(scene, name))
    for name in ("segments", "captions", "phrases", "questions"):
        assert getattr(content, name) == list(getattr(scene, name))
    assert sum(1 for _ in adapter.samples("val")) == 512


def test_iconic_samples_have_captions_only(adapter):
    content = next(adapter.samples("iconic")).load()
    assert content.image.shape == (32, 32, 3)
    assert len(content.captions) == 3
    for name in ("semantic", "panoptic", "segments", "phrases", "questions"):
        assert getattr(content, name) is None


def test_unknown_split(adapter):
    with pytest.raises(DataError) as caught:
        next(adapter.samples("nosuch"))
    assert caught.value.found == "the split `nosuch`"
    assert caught.value.allowed == "one of train, iconic, val, test, stress"
    assert "world.yaml" in caught.value.fix


def test_folder_without_recipe(tmp_path):
    with pytest.raises(DataError) as caught:
        open_adapter("world", tmp_path / "empty").splits()
    assert caught.value.found == "no world.yaml in empty/"
    assert "dvc pull" in caught.value.fix
