from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from helpers.working_tree import change, environment, run

from lexiseg.copies import remove_copies, working_copy
from lexiseg.errors import SettingsError, StageError
from lexiseg.settings import read_yaml
from lexiseg.workspace import main_checkout


@pytest.fixture
def tree(micro_tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished working tree with an edit, a new and a deleted file; commands of ours find its tools."""
    for name, value in environment(micro_tree).items():
        monkeypatch.setenv(name, value)
    for name in [name for name in os.environ if name.startswith("LEXISEG")]:
        monkeypatch.delenv(name)
    change(micro_tree / "params.yaml", {"evaluate": {"pictures": 2}})
    (micro_tree / "src/lexiseg/staged.py").write_text("# staged\n", encoding="utf-8")
    (micro_tree / "Makefile").write_text("# staged\n", encoding="utf-8")
    run(micro_tree, "git", "add", "src/lexiseg/staged.py", "Makefile")
    run(micro_tree, "git", "rm", "--quiet", "--cached", "prefect.yaml")
    (micro_tree / "prefect.yaml").unlink()
    (micro_tree / "src/lexiseg/new.py").write_text("# new\n", encoding="utf-8")
    (micro_tree / "link").symlink_to("docs")
    (micro_tree / "LICENSE").unlink()
    hook = micro_tree / ".git/hooks/post-checkout"
    hook.write_text("#!/bin/sh\nexit 3\n")
    hook.chmod(0o755)
    return micro_tree


def copies(tree: Path) -> list[Path]:
    return sorted(path for path in (tree / ".lexiseg/copies").glob("*") if path.is_dir())


def leave(tree: Path, name: str) -> Path:
    """A copy whose run ended in an error."""
    with pytest.raises(RuntimeError), working_copy(tree, name, settings={"seed": 7}):
        raise RuntimeError
    return tree / ".lexiseg/copies" / name


def test_a_copy_is_the_working_tree_under_other_settings(tree):
    before = (tree / "params.yaml").read_text(encoding="utf-8")
    with working_copy(tree, "one", settings={"lseg.train.steps": 5}) as copy:
        values = read_yaml(copy / "params.yaml")
        assert values["lseg"]["train"]["steps"] == 5
        assert values["evaluate"]["pictures"] == 2
        assert (copy / "src/lexiseg/new.py").is_file()
        assert (copy / "src/lexiseg/staged.py").is_file()
        assert (copy / "Makefile").read_text(encoding="utf-8") == "# staged\n"
        assert (copy / "link").readlink() == Path("docs")
        assert not (copy / "LICENSE").exists()
        assert not (copy / "prefect.yaml").exists()
        assert (copy / "data/world/world.yaml").read_bytes() == (tree / "data/world/world.yaml").read_bytes()
        assert not (copy / "outputs").exists()
        assert main_checkout(copy) == tree
        # What the original has done is in the cache they share.
        assert "cached - skipping run" in run(copy, "dvc", "repro", "--single-item", "prepare").stdout
    assert copies(tree) == []
    assert (tree / "params.yaml").read_text(encoding="utf-8") == before
    assert run(tree, "git", "worktree", "list").stdout.count("\n") == 1
    assert run(tree, "dvc", "status", "prepare", "--json").stdout.strip() == "{}"


def test_a_profile_is_taken_whole(tree):
    with working_copy(tree, "one", profile="embedded") as copy:
        assert read_yaml(copy / "params.yaml")["evaluate"]["pictures"] == 1


def test_a_copy_that_was_left_behind_is_made_anew(tree):
    copy = leave(tree, "one")
    (copy / "params.yaml").unlink()
    (tree / "src/lexiseg/new.py").write_text("# mended\n", encoding="utf-8")
    with working_copy(tree, "one", settings={"seed": 7}) as again:
        assert again == copy
        assert read_yaml(again / "params.yaml")["seed"] == 7
        assert (again / "src/lexiseg/new.py").read_text(encoding="utf-8") == "# mended\n"
    shutil.rmtree(leave(tree, "one"))  # git still knows it
    with working_copy(tree, "one", settings={"seed": 7}) as again:
        assert (again / "params.yaml").is_file()


def test_what_a_killed_flow_left_at_work_in_a_copy_is_stopped(tree):
    copy = leave(tree, "one")
    orphan = subprocess.Popen(["sleep", "300"], cwd=copy / "src", start_new_session=True)
    try:
        assert remove_copies(tree) == 0  # somebody works there
        with working_copy(tree, "one", settings={"seed": 7}):
            assert orphan.wait(timeout=30) == -signal.SIGTERM
    finally:
        orphan.kill()


def test_one_process_per_copy(tree, capsys):
    entered = threading.Event()

    def second() -> None:
        with working_copy(tree, "one", settings={"seed": 7}):
            entered.set()

    thread = threading.Thread(target=second)
    with working_copy(tree, "one", settings={"seed": 7}):
        thread.start()
        deadline = time.monotonic() + 60
        while "waiting for it" not in capsys.readouterr().err:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not entered.is_set()
    thread.join(timeout=120)
    assert entered.is_set()


def test_wrong_settings_are_refused_with_their_names(tree):
    with (
        pytest.raises(SettingsError, match=r"lseg\.train\.stepz"),
        working_copy(tree, "one", settings={"lseg.train.stepz": 5}),
    ):
        pass


def test_data_in_no_cache_is_named(tree):
    change(tree / "data/world/world.yaml", {"seed": 99})
    run(tree, "dvc", "commit", "--quiet", "--force", "data.dvc")
    run(tree, "git", "commit", "--quiet", "--all", "--message", "other data")
    run(tree, "rm", "-rf", ".dvc/cache/files")
    with (
        pytest.raises(StageError, match="data/world is not in DVC's cache"),
        working_copy(tree, "one", settings={"seed": 7}),
    ):
        pass


def test_copies_in_use_are_not_removed(tree, capsys):
    leave(tree, "left")
    with working_copy(tree, "used", settings={"seed": 8}) as used:
        assert remove_copies(tree) == 1
        assert copies(tree) == [used]
        assert "kept the copy used" in capsys.readouterr().err
