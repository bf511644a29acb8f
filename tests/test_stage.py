from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from helpers.small_graph import Settings, Stages, code_of, make_small_graph

import lexiseg
from lexiseg.checkpoint import checkpoint_file
from lexiseg.errors import SettingsError, StageError
from lexiseg.history import recall
from lexiseg.pipeline import read_graph
from lexiseg.settings import parse, read_yaml
from lexiseg.stage import (
    Job,
    check_package,
    clean,
    execute,
    fingerprint_of,
    import_code,
    job_of,
    run_in_working_tree,
    value_at,
)
from lexiseg.storage import hash_tree, read_json, refused_write, write_text


class Tree:
    """A working tree whose stages are run without dvc's command."""

    def __init__(self, root: Path) -> None:
        self.root, self.stages = make_small_graph(root), Stages()
        self.work = root / ".lexiseg" / "work"

    def job(self, name: str) -> Job:
        values = read_yaml(self.root / "params.yaml")
        node = read_graph(self.root)[name]
        return job_of(self.root, node, self.stages.function(name), settings=parse(values, Settings), values=values)

    def run(self, *names: str) -> None:
        for name in names:
            run_in_working_tree(self.root, self.job(name))

    def change(self, old: str, new: str) -> None:
        text = (self.root / "params.yaml").read_text()
        assert old in text
        write_text(self.root / "params.yaml", text.replace(old, new))

    def outputs(self) -> dict[str, str]:
        return hash_tree(self.root / "outputs")

    def left_over(self) -> list[str]:
        return [path.name for path in self.root.rglob("*.part")]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tree]:
    monkeypatch.delenv("LEXISEG_HOME", raising=False)
    tree = Tree(tmp_path / "tree")
    with code_of(tree.root, monkeypatch):
        yield tree


def test_outs_are_published_where_dvc_expects_them(tree):
    tree.run("first", "second", "third")
    assert (tree.root / "outputs/third/text.txt").read_text() == "ab 4"
    assert sorted(tree.outputs()) == ["first/text.txt", "second/length.txt", "second/parts/text.txt", "third/text.txt"]
    assert not tree.left_over()


def test_a_finished_result_is_only_linked(tree, capsys):
    tree.run("first", "second")
    shutil.rmtree(tree.root / "outputs/second")
    tree.run("second")
    assert tree.stages.ran == ["first", "second"]
    assert "second: finished before, linking the result" in capsys.readouterr().err
    published = tree.root / "outputs/second/length.txt"
    assert published.read_text() == "4"
    assert published.stat().st_nlink == 2  # the work folder's file itself, no copy


def test_a_change_and_back_needs_no_new_run(tree):
    tree.run("first")
    tree.change("word: b", "word: c")
    tree.run("first")
    assert (tree.root / "outputs/first/text.txt").read_text() == "ac"
    tree.change("word: c", "word: b")
    tree.run("first")
    assert (tree.root / "outputs/first/text.txt").read_text() == "ab"
    assert tree.stages.ran == ["first", "first"]


@pytest.mark.parametrize("change", ["data/raw/raw.txt", "src/lexiseg/code.py", "word: b"])
def test_data_code_and_declared_parameters_are_the_fingerprint(tree, change):
    tree.run("first")
    if change.startswith("word"):
        tree.change(change, "word: c")
    else:
        write_text(tree.root / change, "changed")
    tree.run("first")
    assert tree.stages.ran == ["first", "first"]


def test_other_parameters_are_not(tree):
    tree.run("first", "second")
    tree.change("unread: 0", "unread: 1")
    tree.run("second")
    assert tree.stages.ran == ["first", "second"]


def test_a_fingerprint_depends_on_all_it_is_made_of():
    one = fingerprint_of("a", params={"x": 1, "y": 2}, deps={"d": "1"})
    assert one == fingerprint_of("a", params={"y": 2, "x": 1}, deps={"d": "1"})
    others = [
        ("b", {"x": 1, "y": 2}, {"d": "1"}),
        ("a", {"x": 1, "y": 3}, {"d": "1"}),
        ("a", {"x": 1, "y": 2}, {"d": "2"}),
    ]
    assert one not in [fingerprint_of(name, params=params, deps=deps) for name, params, deps in others]


def test_an_undeclared_parameter_cannot_be_read(tree, monkeypatch):
    monkeypatch.setattr(Stages, "second", lambda self, settings, inputs, outputs: settings.second.unread)
    tree.run("first")
    with pytest.raises(SettingsError, match=r"`second\.unread`, which its entry in dvc\.yaml does not declare"):
        tree.run("second")


def test_a_result_changed_on_disk_is_made_again(tree, capsys):
    tree.run("first")
    (tree.root / "outputs/first/text.txt").write_text("edited in place, so the linked work too")
    tree.run("first")
    assert tree.stages.ran == ["first", "first"]
    assert "changed on disk, running again" in capsys.readouterr().err
    assert (tree.root / "outputs/first/text.txt").read_text() == "ab"


def test_a_stage_that_fails_publishes_nothing_and_can_be_repeated(tree):
    tree.run("first")
    before = tree.outputs()
    tree.change("word: b", "word: c")
    tree.stages.meanwhile = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        tree.run("first")
    assert tree.outputs() == before
    tree.stages.meanwhile = lambda: None
    tree.run("first")
    assert (tree.root / "outputs/first/text.txt").read_text() == "ac"


def test_what_an_interrupted_run_left_is_not_taken_over(tree):
    tree.run("first")
    work = next(path for path in tree.work.iterdir() if path.is_dir())
    (work / "finished.json").unlink()  # as after SIGKILL, with half of the outputs written
    write_text(work / "outputs" / "half.txt", "half")
    tree.run("first")
    assert sorted(tree.outputs()) == ["first/text.txt"]
    assert tree.stages.ran == ["first", "first"]


def test_a_declared_out_that_is_not_written(tree, monkeypatch):
    monkeypatch.setattr(
        Stages, "second", lambda self, settings, inputs, outputs: write_text(outputs / "length.txt", "1")
    )
    tree.run("first")
    with pytest.raises(StageError) as caught:
        tree.run("second")
    assert caught.value.found == "second did not write parts"
    assert "every out that dvc.yaml declares" in caught.value.allowed
    assert "dvc.yaml" in caught.value.fix
    assert "second/length.txt" not in tree.outputs()


@pytest.mark.parametrize(
    ("changed", "kept"), [("data/raw", False), ("src/lexiseg/code.py", True), ("`word` of params.yaml", True)]
)
def test_a_result_is_not_published_when_something_changed_while_it_was_made(tree, changed, kept):
    files = {"data/raw": "data/raw/raw.txt", "src/lexiseg/code.py": "src/lexiseg/code.py"}
    file = tree.root / files.get(changed, "params.yaml")
    before = file.read_text()
    tree.stages.meanwhile = lambda: write_text(file, before.replace("b", "c") if "word" in changed else "changed")
    with pytest.raises(StageError) as caught:
        tree.run("first")
    assert caught.value.found == f"{changed} changed while first ran"
    assert "stay as they are until the stage ends" in caught.value.allowed
    assert "run `dvc repro` again" in caught.value.fix
    assert ("the result is kept" in caught.value.fix) == kept
    assert not (tree.root / "outputs").exists()
    # After the change is undone, a result that is certainly of the old state is found.
    tree.stages.meanwhile = lambda: None
    write_text(file, before)
    tree.run("first")
    assert tree.stages.ran == ["first"] * (1 if kept else 2)
    assert (tree.root / "outputs/first/text.txt").read_text() == "ab"


def test_what_the_stage_does_not_declare_may_change_while_it_runs(tree):
    tree.stages.meanwhile = lambda: tree.change("unread: 0", "unread: 1")
    tree.run("first")
    assert "first/text.txt" in tree.outputs()


def full_disk(*paths: object, **_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(paths[-1]))


@pytest.mark.parametrize(
    "calls", [["os.link", "shutil.copy2"], ["os.replace", "pathlib.Path.rename"], ["pathlib.Path.mkdir"]]
)
def test_a_full_disk_while_publishing_leaves_the_old_outputs(tree, monkeypatch, calls):
    tree.run("first", "second")
    before = tree.outputs()
    tree.change("times: 2", "times: 3")
    execute(tree.job("second"))  # the result is there; only publishing is left
    job = tree.job("second")
    with monkeypatch.context() as patch:
        for call in calls:
            patch.setattr(call, full_disk)
        with pytest.raises(OSError, match="No space left") as caught:
            run_in_working_tree(tree.root, job)
    refused = refused_write(caught.value)
    assert refused
    assert "No space left on device" in refused.found
    assert tree.outputs() == before
    assert not tree.left_over()
    tree.run("second")
    assert (tree.root / "outputs/second/length.txt").read_text() == "6"
    assert tree.stages.ran == ["first", "second", "second"]


def test_a_disk_that_fills_up_half_way_publishes_no_half(tree, monkeypatch):
    tree.run("first", "second")
    before = tree.outputs()
    tree.change("times: 2", "times: 3")
    link, seen = os.link, []

    def filling(source, target):
        seen.append(target)
        return full_disk(target) if len(seen) > 1 else link(source, target)

    monkeypatch.setattr(os, "link", filling)
    monkeypatch.setattr(shutil, "copy2", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tree.run("second")
    assert len(seen) == 2
    assert tree.outputs() == before
    assert not tree.left_over()


def test_a_disk_that_fills_up_while_the_stage_runs(tree):
    tree.run("first")
    before = tree.outputs()
    tree.change("word: b", "word: c")
    tree.stages.meanwhile = lambda: full_disk("text.txt")
    with pytest.raises(OSError, match="No space left"):
        tree.run("first")
    assert tree.outputs() == before
    tree.stages.meanwhile = lambda: None
    tree.run("first")
    assert (tree.root / "outputs/first/text.txt").read_text() == "ac"


def test_without_hard_links_files_are_copied(tree, monkeypatch):
    def refuse(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    tree.run("first")
    assert (tree.root / "outputs/first/text.txt").read_text() == "ab"
    assert (tree.root / "outputs/first/text.txt").stat().st_nlink == 1


def test_the_same_work_is_waited_for(tree, capsys):
    inside, leave = threading.Event(), threading.Event()

    def meanwhile() -> None:
        inside.set()
        assert leave.wait(60)

    tree.stages.meanwhile = meanwhile
    jobs = [tree.job("first"), tree.job("first")]
    results: list[Path] = []
    threads = [threading.Thread(target=lambda job=job: results.append(execute(job))) for job in jobs]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    said = ""
    while "waiting for it" not in said:  # pytest-timeout ends a wait that is in vain
        said += capsys.readouterr().err
        time.sleep(0.01)
    assert results == []
    leave.set()
    for thread in threads:
        thread.join(60)
    assert tree.stages.ran == ["first"]
    assert results[0] == results[1]
    said += capsys.readouterr().err
    assert "first: the same work is going on in another process, waiting for it" in said
    assert "first: finished before, linking the result" in said


def test_the_code_of_another_tree_is_refused(tree, monkeypatch):
    monkeypatch.setattr(lexiseg, "__file__", "/elsewhere/lexiseg/__init__.py")
    with pytest.raises(StageError) as caught:
        tree.run("first")
    assert "/elsewhere/lexiseg" in caught.value.found
    assert str(tree.root / "src/lexiseg") in caught.value.allowed
    assert f"PYTHONPATH={tree.root / 'src'}" in caught.value.fix
    assert tree.stages.ran == []


def test_the_own_code_is_accepted_through_links(tree, tmp_path):
    (tmp_path / "link").symlink_to(tree.root)
    check_package(tmp_path / "link")


def test_clean_removes_work_and_keeps_what_runs(tree, capsys):
    tree.run("first", "second")
    second = next(path for path in tree.work.iterdir() if path.is_dir() and path.name.startswith("second"))
    with FileLock(f"{second}.lock"):
        removed, freed = clean(tree.root / ".lexiseg")
    assert removed == 1
    assert freed > 0
    assert f"kept {second.name}: a stage is running there" in capsys.readouterr().err
    assert second.is_dir()
    assert clean(tree.root / ".lexiseg")[0] == 1
    assert clean(tree.root / ".lexiseg") == (0, 0)
    assert sorted(tree.outputs()) == ["first/text.txt", "second/length.txt", "second/parts/text.txt"]
    tree.run("first")
    assert tree.stages.ran == ["first", "second", "first"]


def test_clean_where_nothing_ran(tmp_path):
    assert clean(tmp_path) == (0, 0)


def test_the_record_of_a_finished_result_names_its_files(tree):
    tree.run("first", "second")
    work = next(path for path in tree.work.iterdir() if path.is_dir() and path.name.startswith("second"))
    record = read_json(work / "finished.json")
    assert work.name == f"second-{record['fingerprint'][:20]}"
    assert sorted(record["files"]) == ["length.txt", "parts/text.txt"]


def test_a_value_by_its_dotted_key():
    assert value_at({"a": {"b": 1}}, "a.b") == 1
    assert value_at({"a": {"b": 1}}, "a") == {"b": 1}
    assert value_at({"a": 1}, "a.b") is None
    assert value_at({}, "a.b") is None


def test_the_module_needs_no_torch():
    code = "import sys, lexiseg.stage, lexiseg.stages.registry; sys.exit('torch' in sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0


def test_a_result_without_a_fingerprint_leaves_no_checkpoint_to_bring_it_back(tree):
    checkpoint = []

    def meanwhile() -> None:
        checkpoint.append(checkpoint_file("train"))
        write_text(checkpoint[0], "state")
        write_text(tree.root / "data/raw/raw.txt", "changed")

    tree.stages.meanwhile = meanwhile
    with pytest.raises(StageError, match="data/raw changed while first ran"):
        tree.run("first")
    assert not checkpoint[0].exists()


def test_a_stage_that_waited_looks_again_before_it_links(tree):
    tree.run("first")
    job = tree.job("first")
    started = job.identify()
    answers = iter([started, {**started, "data/raw": "another"}])
    with pytest.raises(StageError, match="data/raw changed while first ran"):
        run_in_working_tree(tree.root, replace(job, identify=lambda: next(answers)))
    assert tree.stages.ran == ["first"]
    tree.change("word: b", "word: c")
    with pytest.raises(StageError, match=r"`word` of params\.yaml changed"):
        run_in_working_tree(tree.root, job)


def test_code_that_changed_before_it_was_imported_is_refused_before_the_stage_runs(tree):
    job = tree.job("first")
    first, second = job.identify(), {**job.identify(), "src/lexiseg/code.py": "another"}
    answers = iter([first, second])
    with pytest.raises(StageError, match=r"src/lexiseg/code\.py changed while first ran"):
        execute(replace(job, identify=lambda: next(answers)))
    assert tree.stages.ran == []


def test_code_with_data_beside_it_and_code_of_other_processes_is_not_taken_as_read(tree):
    node = tree.job("first").node
    assert import_code(tree.root, node) == {"src/lexiseg/code.py"}
    assert import_code(tree.root, replace(node, params=("data.workers",))) == frozenset()
    folder = replace(node, deps=("src/lexiseg/cards",))
    write_text(tree.root / "src/lexiseg/cards/__init__.py", "")
    assert import_code(tree.root, folder) == {"src/lexiseg/cards"}
    write_text(tree.root / "src/lexiseg/cards/one.yaml", "")
    assert import_code(tree.root, folder) == frozenset()


def test_what_a_run_took_is_remembered_once(tree):
    tree.run("first", "second")
    assert recall(tree.root / ".lexiseg") == []  # no process of its own, so no time to compare with
    tree.change("times: 2", "times: 3")
    for _ in range(2):  # the second time it is only linked
        job = replace(tree.job("second"), started=time.time() - 5)
        run_in_working_tree(tree.root, job)
    (took,) = recall(tree.root / ".lexiseg")
    assert (took.stage, took.params, took.whole) == ("second", {"second.times": 3}, True)
    assert 5 <= took.seconds < 60
    assert took.disk == len("ababab6")
    assert took.memory > 10e6
