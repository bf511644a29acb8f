from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from lexiseg.data.dataset import PreparedSplit
from lexiseg.data.episodes import read_episodes
from lexiseg.storage import write_json
from lexiseg.sweeps.subset import write_subset


@pytest.fixture
def prepared(micro_tree):
    return micro_tree / "outputs/prepare"


def test_a_few_pictures_of_a_split_and_all_of_the_others(prepared, tmp_path):
    write_subset(prepared, "val", pictures=2, target=tmp_path / "few")
    whole, few = PreparedSplit(prepared, "val"), PreparedSplit(tmp_path / "few", "val")
    assert few.ids == [whole.ids[0], whole.ids[2]]
    assert np.array_equal(few.image(1), whole.image(2))
    assert few.vocabulary == whole.vocabulary
    assert PreparedSplit(tmp_path / "few", "train").ids == PreparedSplit(prepared, "train").ids


def test_all_where_there_are_not_so_many(prepared, tmp_path):
    write_subset(prepared, "val", pictures=128, target=tmp_path / "few")
    assert PreparedSplit(tmp_path / "few", "val").ids == PreparedSplit(prepared, "val").ids


def test_labelled_ones_where_not_all_are(prepared, tmp_path):
    whole = PreparedSplit(prepared, "val")
    rows = [whole._row(index) for index in range(len(whole))]
    for index in (0, 2):
        rows[index]["semantic"] = None
    folder = tmp_path / "prepare"
    write_subset(prepared, "val", pictures=4, target=folder)
    table = Dataset.from_list(rows, features=whole._table.features)
    table.save_to_disk(str(tmp_path / "table"))
    (folder / "dataset/val").rename(tmp_path / "old")
    (tmp_path / "table").rename(folder / "dataset/val")
    write_subset(folder, "val", pictures=4, target=tmp_path / "few")
    assert PreparedSplit(tmp_path / "few", "val").ids == [whole.ids[1], whole.ids[3]]


def test_its_episodes_are_those_of_its_pictures(prepared, tmp_path):
    whole = PreparedSplit(prepared, "val")
    pairs = [[sample, "grass"] for sample in whole.ids]
    folder = tmp_path / "prepare"
    write_subset(prepared, "val", pictures=4, target=folder)
    write_json(folder / "episodes.json", {"val": {"classes": ["grass"], "pairs": pairs, "by_class": False}})
    write_subset(folder, "val", pictures=2, target=tmp_path / "few", episodes=True)
    found = read_episodes(tmp_path / "few", "val")
    assert [sample for sample, _ in found.pairs] == [whole.ids[0], whole.ids[2]]
