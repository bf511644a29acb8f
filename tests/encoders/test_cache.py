import sqlite3
import subprocess
import sys
from pathlib import Path

import diskcache
import numpy as np
import pytest
import torch

from lexiseg.encoders import cache as cache_module
from lexiseg.encoders.cache import EmbeddingCache

# Embeds 60 texts ten at a time, in an order of its own, and writes what it got.
WRITER = """
import sys, numpy as np, torch
from pathlib import Path
from lexiseg.encoders.cache import EmbeddingCache
folder, seed, out = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
cache = EmbeddingCache(folder)
compute = lambda texts: torch.stack([torch.full((64,), float(text)) / 7 for text in texts])
rows = np.zeros((60, 64), np.float32)
order = np.random.default_rng(seed).permutation(60)
for start in range(0, 60, 10):
    chunk = order[start : start + 10]
    rows[chunk] = cache.fetch("encoder", [str(number) for number in chunk], compute).numpy()
np.save(out, rows)
"""


class Counting:
    """Embeds a text as its length, and remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, texts):
        self.asked.append(texts)
        return torch.tensor([[len(text), 1 / 3] for text in texts], dtype=torch.float32)


def test_computed_once_and_given_back_in_order(tmp_path):
    compute, cache = Counting(), EmbeddingCache(tmp_path)
    first = cache.fetch("e", ["a", "bbb", "a", "cc"], compute)
    assert compute.asked == [["a", "bbb", "cc"]]
    assert first[:, 0].tolist() == [1, 3, 1, 2]
    again = EmbeddingCache(tmp_path).fetch("e", ["cc", "dddd", "a"], compute)
    assert compute.asked[1:] == [["dddd"]]
    assert again[:, 0].tolist() == [2, 4, 1]
    assert torch.equal(again[2], first[0])
    assert again.dtype == torch.float32


def test_another_encoder_has_its_own_vectors(tmp_path):
    compute, cache = Counting(), EmbeddingCache(tmp_path)
    cache.fetch("one", ["a"], compute)
    cache.fetch("other", ["a"], compute)
    assert compute.asked == [["a"], ["a"]]


class Payload:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_pickle_in_the_cache_is_not_loaded(tmp_path):
    with diskcache.Cache(str(tmp_path / "cache")) as foreign:
        foreign.set("e:a", Payload(tmp_path / "ran"))
    compute = Counting()
    cache = EmbeddingCache(tmp_path / "cache")
    assert cache.fetch("e", ["a"], compute)[0, 0] == 1
    assert compute.asked == [["a"]]
    assert not (tmp_path / "ran").exists()
    cache.fetch("e", ["a"], compute)
    assert compute.asked == [["a"]]  # the vector took its place


@pytest.mark.parametrize("fault", ["damaged", "closed", "full"])
def test_a_cache_that_cannot_be_used_is_done_without(tmp_path, monkeypatch, capsys, fault):
    folder = tmp_path / "cache"
    if fault == "damaged":
        folder.mkdir()
        (folder / "cache.db").write_bytes(b"no database" * 1000)
    elif fault == "closed":
        folder.write_text("a file where the folder should be")
    cache, compute = EmbeddingCache(folder), Counting()
    if fault == "full":

        def full(*_arguments):
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(diskcache.Cache, "set", full)
    for _ in range(2):
        assert cache.fetch("e", ["a", "bbb"], compute)[:, 0].tolist() == [1, 3]
    said = capsys.readouterr().err
    assert said.count("warning: the cache of text embeddings is not used") == 1
    assert str(folder) in said


def test_without_a_folder_vectors_are_kept_as_long_as_the_cache():
    compute, cache = Counting(), EmbeddingCache(None)
    for _ in range(2):
        cache.fetch("e", ["a"], compute)
    assert compute.asked == [["a"]]
    EmbeddingCache(None).fetch("e", ["a"], compute)
    cache.fetch("other", ["a"], compute)
    assert len(compute.asked) == 3


def test_memory_is_limited(monkeypatch):
    monkeypatch.setattr(cache_module, "MEMORY_ROWS", 3)
    compute, cache = Counting(), EmbeddingCache(None)
    for texts in (["a", "b"], ["c", "d"], ["c"], ["a", "bb", "ccc", "dddd"]):
        rows = cache.fetch("e", texts, compute)
        assert rows[:, 0].tolist() == [len(text) for text in texts]
    assert compute.asked == [["a", "b"], ["c", "d"], ["a", "bb", "ccc", "dddd"]]


def test_what_is_fetched_may_be_changed(tmp_path):
    compute, cache = Counting(), EmbeddingCache(tmp_path)
    cache.fetch("e", ["a"], compute).mul_(0)
    assert cache.fetch("e", ["a"], compute)[0, 0] == 1


def test_text_of_any_script(tmp_path):
    compute, cache = Counting(), EmbeddingCache(tmp_path)
    texts = ["Gemüse", "草地", "🙂", "a\nb", ""]
    assert torch.equal(cache.fetch("e", texts, compute), cache.fetch("e", texts, compute))
    assert len(compute.asked) == 1


def test_the_cache_of_the_working_tree(tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "params.yaml").touch()
    monkeypatch.delenv("LEXISEG_HOME", raising=False)
    monkeypatch.chdir(tmp_path / "inside")
    EmbeddingCache.of_working_tree().fetch("e", ["a"], Counting())
    assert (tmp_path / ".lexiseg/cache/text/cache.db").is_file()


def test_two_processes_that_write_at_once(tmp_path):
    outs = [tmp_path / f"{seed}.npy" for seed in range(2)]
    running = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "cache"), str(seed), str(out)])
        for seed, out in enumerate(outs)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    one, other = (np.load(out) for out in outs)
    assert (one == other).all()
    compute = Counting()
    kept = EmbeddingCache(tmp_path / "cache").fetch("encoder", [str(number) for number in range(60)], compute)
    assert (kept.numpy() == one).all()
    assert not compute.asked
