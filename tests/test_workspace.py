from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lexiseg.errors import StageError
from lexiseg.workspace import find_root, main_checkout, private_folder, require_root, resolve_weights, setting_path


def working_tree(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name in ("dvc.yaml", "params.yaml"):
        (root / name).touch()
    return root


@pytest.fixture(autouse=True)
def _at_home(monkeypatch):
    monkeypatch.delenv("LEXISEG_HOME", raising=False)


def test_the_root_is_found_from_below(tmp_path, monkeypatch):
    root = working_tree(tmp_path / "tree")
    inner = root / "docs" / "pictures"
    inner.mkdir(parents=True)
    (root / "docs" / "dvc.yaml").touch()  # half of a working tree is none
    monkeypatch.chdir(inner)
    assert require_root() == root
    assert find_root(tmp_path) is None


def test_outside_of_a_working_tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError) as caught:
        require_root()
    assert f"no dvc.yaml and params.yaml in {tmp_path}" in caught.value.found
    assert "inside a lexiseg working tree" in caught.value.allowed
    assert "change into the cloned repository" in caught.value.fix


def test_an_experiment_of_dvc_belongs_to_the_main_checkout(tmp_path):
    root = working_tree(tmp_path / "tree")
    copy = working_tree(root / ".dvc/tmp/exps/standalone/tmpabc")
    assert main_checkout(copy) == root
    assert private_folder(copy) == private_folder(root) == root / ".lexiseg"


@pytest.mark.parametrize("form", [(), ("-c", "worktree.useRelativePaths=true")])
def test_a_git_worktree_belongs_to_the_main_checkout(tmp_path, form):
    root, other = working_tree(tmp_path / "tree"), tmp_path / "other"
    who = ("-c", "user.name=t", "-c", "user.email=t@localhost")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"], ["worktree", "add", "-q", str(other)]):
        subprocess.run(["git", *who, *form, *command], cwd=root, check=True, capture_output=True)
    assert main_checkout(other) == root
    assert main_checkout(working_tree(other / ".dvc/tmp/exps/standalone/tmpabc")) == root


def test_relative_pointers_of_worktrees_are_followed(tmp_path):
    root, other = working_tree(tmp_path / "tree"), working_tree(tmp_path / "other")
    (root / ".git/worktrees/other").mkdir(parents=True)
    (other / ".git").write_text("gitdir: ../tree/.git/worktrees/other\n")
    assert main_checkout(other) == root


def test_a_submodule_is_a_checkout_of_its_own(tmp_path):
    root = working_tree(tmp_path / "tree")
    (root / ".git").write_text("gitdir: ../.git/modules/tree\n")
    assert main_checkout(root) == root


@pytest.mark.parametrize("home", ["elsewhere", "/somewhere/else"])
def test_the_private_folder_can_be_moved(tmp_path, monkeypatch, home):
    root = working_tree(tmp_path / "tree")
    monkeypatch.setenv("LEXISEG_HOME", home)
    monkeypatch.chdir(tmp_path)
    assert private_folder(root) == root / home
    assert private_folder(working_tree(root / ".dvc/tmp/exps/a/b")) == private_folder(root)


def test_weights_lie_in_the_main_checkout(tmp_path, monkeypatch):
    root = working_tree(tmp_path / "tree")
    copy = working_tree(root / ".dvc/tmp/exps/standalone/tmpabc")
    monkeypatch.chdir(copy)
    assert resolve_weights("weights/a.pt") == root / "weights/a.pt"
    assert resolve_weights("/models/a.pt") == Path("/models/a.pt")
    assert setting_path(root / "models/demo") == "models/demo"
    assert setting_path(root / "demo") == "./demo"
    (root / "linked").symlink_to(tmp_path)
    assert setting_path(root / "linked/demo") == "linked/demo"
    assert setting_path(copy / "models/demo") == ".dvc/tmp/exps/standalone/tmpabc/models/demo"
    assert setting_path(tmp_path / "demo") == str(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    assert resolve_weights("weights/a.pt") == Path("weights/a.pt")
