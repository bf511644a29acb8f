from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lexiseg.errors import ModelError
from lexiseg.storage import (
    atomic_path,
    hash_tree,
    load_tensors,
    read_json,
    refused_write,
    save_tensors,
    sha256_of_file,
    sha256_of_json,
    write_json,
    write_text,
)


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole(tmp_path):
    target = tmp_path / "new" / "file.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        assert not target.exists()
        temporary.write_text("whole")
    assert target.read_text() == "whole"
    assert names(target.parent) == ["file.txt"]


@pytest.mark.parametrize("old", ["file", "folder", None])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_whatever_was_there_is_replaced(tmp_path, old, new):
    target = tmp_path / "old"
    if old == "file":
        target.write_text("before")
    elif old == "folder":
        write_text(target / "before.txt", "before")
    with atomic_path(target) as temporary:
        if new == "file":
            temporary.write_text("after")
        else:
            write_text(temporary / "after.txt", "after")
    assert target.read_text() == "after" if new == "file" else names(target) == ["after.txt"]
    assert names(tmp_path) == ["old"]


def write_half(folder: Path) -> None:
    write_text(folder / "new.txt", "new")
    raise ZeroDivisionError


def test_after_an_error_everything_is_as_it_was(tmp_path):
    write_text(tmp_path / "out" / "old.txt", "old")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "out") as temporary:
        write_half(temporary)
    assert names(tmp_path) == ["out"]
    assert hash_tree(tmp_path / "out").keys() == {"old.txt"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_rename_that_fails_loses_nothing(tmp_path, monkeypatch, kind):
    target = tmp_path / "out"
    place = target if kind == "file" else target / "inner.txt"
    write_text(place, "old")
    rename = Path.rename

    def full(source, goal):
        if Path(goal) == target and ".old" not in str(source):
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(source, goal)

    monkeypatch.setattr(Path, "rename", full)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"), atomic_path(target) as temporary:
        write_text(temporary if kind == "file" else temporary / "inner.txt", "new")
    assert place.read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_equal_values_give_equal_json(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1.5, None], "a": "ü"})
    write_json(tmp_path / "b.json", {"a": "ü", "b": [1.5, None]})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_json(tmp_path / "a.json") == {"a": "ü", "b": [1.5, None]}
    assert sha256_of_json({"b": 1, "a": 2}) == sha256_of_json({"a": 2, "b": 1})


def test_the_hashes_of_a_tree_are_keyed_by_relative_paths(tmp_path):
    write_text(tmp_path / "one" / "b" / "x", "1")
    write_text(tmp_path / "one" / "a", "2")
    write_text(tmp_path / "two" / "b" / "x", "1")
    write_text(tmp_path / "two" / "a", "2")
    assert list(hash_tree(tmp_path / "one")) == ["a", "b/x"]
    assert hash_tree(tmp_path / "one") == hash_tree(tmp_path / "two")


def test_some_files_of_a_tree(tmp_path):
    write_text(tmp_path / "a.json", "1")
    write_text(tmp_path / "b.txt", "1")
    assert list(hash_tree(tmp_path, pattern="*.json")) == ["a.json"]


def test_the_hash_of_several_files_is_the_one_of_their_bytes_in_a_row(tmp_path):
    for name, text in {"a": "12", "b": "3", "ab": "123"}.items():
        write_text(tmp_path / name, text)
    assert sha256_of_file(tmp_path / "a", tmp_path / "b") == sha256_of_file(tmp_path / "ab")
    assert sha256_of_file(tmp_path / "b", tmp_path / "a") != sha256_of_file(tmp_path / "ab")


@pytest.mark.parametrize(
    ("number", "allowed", "fix"),
    [(errno.ENOSPC, "enough free space", "lexiseg clean"), (errno.EACCES, "may write", "permissions")],
)
def test_a_refused_write_is_told_in_three_parts(number, allowed, fix):
    error = refused_write(OSError(number, os.strerror(number), "/disk/file"))
    assert error is not None
    assert error.found == f"{os.strerror(number)}: /disk/file"
    assert allowed in error.allowed
    assert fix in error.fix


def test_of_a_copy_the_goal_is_named():
    error = refused_write(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/from", None, "/to"))
    assert error is not None
    assert error.found.endswith(": /to")


def test_other_errors_of_the_system_are_no_refused_writes():
    assert refused_write(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None
    assert refused_write(OSError("without a number")) is None


def test_tensors_come_back_and_equal_ones_give_equal_bytes(tmp_path):
    tensors = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.ones(2, dtype=torch.int64)}
    save_tensors(tmp_path / "one.safetensors", tensors)
    save_tensors(tmp_path / "two.safetensors", dict(reversed(tensors.items())))
    assert sha256_of_file(tmp_path / "one.safetensors") == sha256_of_file(tmp_path / "two.safetensors")
    found = load_tensors(tmp_path / "one.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_weights_have_the_permissions_of_other_files(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    write_text(tmp_path / "a.txt", "")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "a.txt").stat().st_mode


@pytest.mark.parametrize("wrap", [dict, lambda state: {"state_dict": state, "epoch": 3}])
def test_a_checkpoint_of_tensors_is_read(tmp_path, wrap):
    torch.save(wrap({"a": torch.ones(2)}), tmp_path / "a.pt")
    assert torch.equal(load_tensors(tmp_path / "a.pt")["a"], torch.ones(2))


def test_a_missing_weight_file(tmp_path):
    with pytest.raises(ModelError) as caught:
        load_tensors(tmp_path / "no.pt")
    assert caught.value.found == f"no weight file at {tmp_path / 'no.pt'}"
    assert ".safetensors" in caught.value.allowed
    assert "lexiseg weights add" in caught.value.fix


def test_another_hash_is_refused_before_the_file_is_opened(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"not weights at all")
    with pytest.raises(ModelError) as caught:
        load_tensors(path, sha256="0" * 64)
    assert sha256_of_file(path) in caught.value.found
    assert "0" * 64 in caught.value.allowed
    assert "fetch the file again" in caught.value.fix


def test_the_right_hash_is_accepted(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    assert load_tensors(tmp_path / "a.safetensors", sha256=sha256_of_file(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("size", [0, 5, 40])
def test_damaged_safetensors(tmp_path, size):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(8)}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError) as caught:
        load_tensors(path)
    assert f"{path} is not a readable safetensors file" in caught.value.found
    assert "complete" in caught.value.allowed
    assert "again" in caught.value.fix


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_damaged_checkpoints(tmp_path, zipped, keep):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(8)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ModelError, match="damaged or holds more than tensors"):
        load_tensors(path)


@pytest.mark.parametrize("content", [b"a line of text\n", b"\x80\x02.", b"\x80\x02K\x01a."])
def test_files_that_are_no_checkpoints(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ModelError, match="damaged or holds more than tensors"):
        load_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path, zipped):
    mark = tmp_path / "the code ran"
    torch.save({"state_dict": Code(mark)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError) as caught:
        load_tensors(tmp_path / "a.pt")
    assert not mark.exists()
    assert "more than tensors and plain data" in caught.value.found
    assert "code in a weight file is never executed" in caught.value.allowed
    assert "export the weights as safetensors" in caught.value.fix


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"state_dict": {"a": "b"}}, 5])
def test_plain_data_without_tensors(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ModelError) as caught:
        load_tensors(tmp_path / "a.pt")
    assert "holds no table of tensors" in caught.value.found
    assert "state_dict" in caught.value.allowed
    assert "model.state_dict()" in caught.value.fix
