import json
import pickle
import tarfile

import pytest
from helpers.shards import pair, picture, shard

from lexiseg.data.shards import Incomplete, TarPairs
from lexiseg.errors import DataError


def several(folder, *, shards: int, pairs: int):
    paths = []
    for first in range(0, shards * pairs, pairs):
        files = [file for number in range(first, first + pairs) for file in pair(number)]
        paths.append(shard(folder / f"{first:05d}.tar", files))
    return TarPairs(paths)


def test_pairs_come_with_their_text(tmp_path):
    pairs = several(tmp_path, shards=2, pairs=3)
    assert len(pairs) == 6
    for index in range(6):
        image, text = pairs.read(index)
        assert (image == index).all()
        assert image.shape == (6, 8, 3)
        assert text == f"picture {index}"
    assert pairs.incomplete == Incomplete(0, 0, ())


def test_the_ways_of_writing_a_text(tmp_path):
    path = shard(
        tmp_path / "a.tar",
        [
            ("x/1.png", picture(1)),
            ("x/1.json", json.dumps({"caption": "one  of\njson", "url": "u"}).encode()),
            ("x/2.png", picture(2)),
            ("x/2.json", b'{"caption": "not this one"}'),
            ("x/2.txt", "twö".encode()),
            # The same name in another folder is another sample.
            ("y/1.JPG", picture(3)),
            ("y/1.txt", b"three"),
        ],
    )
    pairs = TarPairs([path])
    assert [pairs.read(index)[1] for index in range(len(pairs))] == ["one of json", "twö", "three"]


@pytest.mark.parametrize(
    ("cut", "left"),
    # A sample is a header, a block of picture, a header and a block of text.
    [(600, 0), (1200, 0), (1540, 0), (1700, 1), (2100, 1), (2600, 1), (4096, 2)],
)
def test_a_shard_that_ends_early_gives_what_comes_before(tmp_path, cut, left):
    whole = shard(tmp_path / "b.tar", [*pair(5), *pair(6)]).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:cut])
    pairs = TarPairs([shard(tmp_path / "a.tar", pair(1)), tmp_path / "b.tar"])
    assert len(pairs) == 1 + left
    assert pairs.incomplete.broken == ("b.tar",)
    assert [pairs.read(1 + index)[1] for index in range(left)] == ["picture 5", "picture 6"][:left]


def test_a_damaged_header_ends_a_shard(tmp_path):
    content = bytearray(shard(tmp_path / "b.tar", [*pair(5), *pair(6)]).read_bytes())
    content[2048:2100] = b"x" * 52
    (tmp_path / "b.tar").write_bytes(content)
    pairs = TarPairs([tmp_path / "b.tar"])
    assert (len(pairs), pairs.incomplete.broken) == (1, ("b.tar",))


def test_two_files_one_behind_the_other_are_no_whole_shard(tmp_path):
    first, second = (shard(tmp_path / f"{n}.tar", pair(n)).read_bytes() for n in (1, 2))
    (tmp_path / "both.tar").write_bytes(first + second)
    pairs = TarPairs([tmp_path / "both.tar"])
    assert (len(pairs), pairs.incomplete.broken) == (1, ("both.tar",))


def test_a_shard_that_changes_after_it_was_looked_through(tmp_path):
    pairs = TarPairs([shard(tmp_path / "a.tar", pair(1))])
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[:1540])
    with pytest.raises(DataError, match="shorter than it was"):
        pairs.read(0)
    (tmp_path / "a.tar").unlink()
    pairs = TarPairs([shard(tmp_path / "b.tar", pair(1))])
    (tmp_path / "b.tar").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        pairs.read(0)


def test_what_is_incomplete_is_counted(tmp_path):
    first = shard(tmp_path / "a.tar", [*pair(1), ("2.png", picture(2)), ("3.txt", b"three"), ("4.cls", b"5")])
    (tmp_path / "c.tar").write_bytes(b"no tar at all" * 100)
    pairs = TarPairs([first, tmp_path / "c.tar"])
    assert len(pairs) == 1
    assert pairs.incomplete == Incomplete(without_text=1, without_picture=1, broken=("c.tar",))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("1.png", b"no picture"),
        ("1.png", picture(1)[:40]),
        ("1.txt", b"   "),
        ("1.txt", "\u200b".encode()),
        ("1.txt", b"\xff\xfe\x00"),
        ("1.json", b'{"text": "no caption"}'),
        ("1.json", b'{"caption": 5}'),
        ("1.json", b"[1"),
    ],
)
def test_a_damaged_member_is_told_of(tmp_path, name, content):
    files = {"1.png": picture(1), "1.txt": b"one"} if name != "1.json" else {"1.png": picture(1)}
    pairs = TarPairs([shard(tmp_path / "a.tar", list({**files, name: content}.items()))])
    with pytest.raises(DataError, match=r"a\.tar, pair 0"):
        pairs.read(0)


def test_an_epoch_visits_each_pair_once_and_the_next_in_another_order(tmp_path):
    pairs = several(tmp_path, shards=19, pairs=3)
    first, second = pairs.order(0, 57, seed=0), pairs.order(57, 57, seed=0)
    assert sorted(first) == sorted(second) == list(range(57))
    assert list(first) != list(second)
    assert list(pairs.order(0, 57, seed=1)) != list(first)
    # Eight shards at a time, in an order of their own, and mixed.
    shards = first // 3
    assert len(set(shards[:24])) == 8
    assert list(shards[:24]) != sorted(shards[:24])
    assert set(shards[:24]) != set(range(8))


def test_any_part_of_the_order_can_be_asked_for(tmp_path):
    pairs = several(tmp_path, shards=5, pairs=2)
    whole = list(pairs.order(0, 40, seed=3))
    assert [int(pairs.order(k, 1, seed=3)[0]) for k in range(40)] == whole
    assert list(pairs.order(7, 16, seed=3)) == whole[7:23]


def test_a_loader_process_opens_the_files_itself(tmp_path):
    pairs = several(tmp_path, shards=1, pairs=2)
    pairs.read(0)
    again = pickle.loads(pickle.dumps(pairs))
    assert again.read(1)[1] == "picture 1"


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("lexiseg.data.shards.OPEN", 2)
    pairs = several(tmp_path, shards=4, pairs=1)
    assert [pairs.read(index)[1] for index in (0, 1, 2, 3, 0)] == [f"picture {n}" for n in (0, 1, 2, 3, 0)]
    assert len(pairs._files) == 2


def test_what_is_no_shard(tmp_path):
    with pytest.raises(DataError, match="no shards"):
        TarPairs([])
    with pytest.raises(DataError, match="no file"):
        TarPairs([tmp_path / "lacking.tar"])
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("1.png"))
    with pytest.raises(DataError, match="not one picture with its text in 1 shards") as caught:
        TarPairs([tmp_path / "packed.tar"])
    assert "not compressed" in caught.value.fix
