from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from dvc.repo import Repo
from helpers.small_graph import DVC_YAML, make_small_graph
from helpers.working_tree import change

from lexiseg.errors import StageError
from lexiseg.pipeline import Node, hash_dependencies, node_of, read_graph, read_lock, remove_orphans, run_dvc
from lexiseg.storage import hash_tree, write_text


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LEXISEG_HOME", raising=False)
    return make_small_graph(tmp_path / "my tree")


def node(**fields) -> Node:
    return Node(**{"name": "x", "cmd": "true", "deps": (), "params": (), "outs": (), **fields})


def test_the_graph_comes_in_an_order_that_can_be_run(tree):
    graph = read_graph(tree)
    assert list(graph) == ["first", "second", "third"]
    assert graph["first"].deps == ("data/raw", "src/lexiseg/code.py")
    assert graph["second"].params == ("second.times",)
    assert graph["second"].outs == ("outputs/second/length.txt", "outputs/second/parts")
    assert graph["third"].params == ()


def test_a_stage_sees_its_inputs_by_short_names(tree):
    graph = read_graph(tree)
    assert graph["first"].inputs == {"data": "data/raw"}
    assert graph["first"].code == ("src/lexiseg/code.py",)
    assert graph["third"].inputs == {"first": "outputs/first", "second/length.txt": "outputs/second/length.txt"}


@pytest.mark.parametrize(
    ("outs", "folder"),
    [
        (("outputs/a/train",), "outputs/a/train"),
        (("outputs/a/metrics.json",), "outputs/a"),
        (("outputs/a/metrics.json", "outputs/a/tables"), "outputs/a"),
    ],
)
def test_the_folder_of_a_stage(outs, folder):
    assert node(outs=outs).folder == folder


def test_outs_in_two_folders_are_refused():
    with pytest.raises(StageError) as caught:
        _ = node(outs=("outputs/a/x", "outputs/b/x")).folder
    assert "stage x has outs in outputs/a, outputs/b" in caught.value.found
    assert "in one folder" in caught.value.allowed
    assert "dvc.yaml" in caught.value.fix


def test_a_folder_that_holds_outs_comes_after_their_stages(tree):
    text = (tree / "dvc.yaml").read_text()
    above = "  above:\n    cmd: x\n    deps:\n      - outputs/second\n    outs:\n      - outputs/above\n"
    write_text(tree / "dvc.yaml", text + above)
    assert list(read_graph(tree))[:3] == ["first", "second", "above"]


def test_a_list_without_baselines_makes_no_stages(tree):
    group = "  fourth:\n    foreach: ${baselines}\n    do:\n      cmd: lexiseg stage fourth@${item}\n"
    write_text(tree / "dvc.yaml", f"{DVC_YAML}{group}      outs:\n        - outputs/fourth/${{item}}\n")
    assert list(read_graph(tree)) == ["first", "second", "third"]
    change(tree / "params.yaml", {"baselines": ["a"]})
    assert "fourth@a" in read_graph(tree)


def test_an_unknown_stage_is_refused_with_those_there_are(tree):
    with pytest.raises(StageError) as caught:
        node_of(read_graph(tree), "frist")
    assert node_of(read_graph(tree), "first").name == "first"
    assert "no stage `frist`" in caught.value.found
    assert caught.value.allowed == "first, second, third"
    assert "dvc stage list" in caught.value.fix


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("dvc.yaml", "stages: [1"),
        ("dvc.yaml", "stages:\n  x:\n    cmmd: y\n"),
        ("dvc.yaml", "stages:\n  x:\n    cmd: ${nothing.there}\n"),
        (
            "dvc.yaml",
            "stages:\n  x:\n    cmd: x\n    deps: [y]\n    outs: [z]\n  y:\n    cmd: y\n    deps: [z]\n    outs: [y]\n",
        ),
        ("params.yaml", "data: [1"),
    ],
)
def test_a_graph_that_cannot_be_read(tree, file, content):
    write_text(tree / file, content)
    with pytest.raises(StageError) as caught:
        read_graph(tree)
    assert "dvc cannot read the graph" in caught.value.found
    assert "valid dvc.yaml and params.yaml" in caught.value.allowed
    assert "dvc stage list" in caught.value.fix


def test_a_folder_that_dvc_does_not_know(tmp_path):
    with pytest.raises(StageError, match="not inside of a DVC repository"):
        read_graph(tmp_path)


def test_the_graph_is_the_same_from_everywhere(tree, monkeypatch):
    monkeypatch.chdir(tree / "data")
    assert read_graph(tree)["first"].deps == ("data/raw", "src/lexiseg/code.py")


def test_hashes_are_those_of_dvc(tree, monkeypatch):
    monkeypatch.chdir(tree)
    for name in (
        "outputs/first/text.txt",
        "outputs/second/length.txt",
        "outputs/second/parts/x",
        "outputs/third/text.txt",
    ):
        write_text(tree / name, name)
    with Repo(str(tree)) as repo:
        repo.commit(force=True)
    lock = read_lock(tree)
    assert sorted(lock) == ["first", "second", "third"]
    recorded = {entry["path"]: entry["md5"] for stage in lock.values() for entry in stage["deps"]}
    assert hash_dependencies(tree, list(recorded)) == recorded
    assert recorded["data/raw"].endswith(".dir")


def test_hashes_follow_the_content_and_nothing_else(tree, tmp_path):
    before = hash_dependencies(tree, ["data/raw"])
    assert hash_dependencies(make_small_graph(tmp_path / "other"), ["data/raw"]) == before
    write_text(tree / "data/raw/raw.txt", "other")
    assert hash_dependencies(tree, ["data/raw"]) != before


@pytest.mark.parametrize(
    ("path", "fix"),
    [
        ("data/photos", "lexiseg data add photos PATH"),
        ("data/photos", "dvc pull data/photos"),
        ("outputs/nothing", "`dvc repro` makes it"),
        ("src/lexiseg/gone.py", "`git checkout src/lexiseg/gone.py`"),
    ],
)
def test_a_missing_dependency(tree, path, fix):
    with pytest.raises(StageError) as caught:
        hash_dependencies(tree, [path])
    assert caught.value.found == f"the dependency {path} does not exist"
    assert "in place" in caught.value.allowed
    assert fix in caught.value.fix


def test_what_no_stage_makes_any_more_is_removed_where_it_would_be_read(tree):
    text = "stages:\n"
    for name in ("a", "b"):
        text += (
            f"  {name}:\n    cmd: x\n    outs:\n      - outputs/all/{name}/model\n      - outputs/all/{name}/m.json\n"
        )
    write_text(
        tree / "dvc.yaml", text + "  top:\n    cmd: x\n    deps:\n      - outputs/all\n    outs:\n      - outputs/top\n"
    )
    kept = ["all/a/model/w", "all/a/m.json", "all/b/model/deep/w", "top/x", "other/y"]
    for name in [*kept, "all/gone/model/w", "all/a/old.json", "all/stray"]:
        write_text(tree / "outputs" / name, name)
    graph = read_graph(tree)
    assert remove_orphans(tree, graph, graph["a"]) == []
    removed = remove_orphans(tree, graph, graph["top"])
    assert removed == ["outputs/all/a/old.json", "outputs/all/gone", "outputs/all/stray"]
    assert sorted(hash_tree(tree / "outputs")) == sorted(kept)
    assert remove_orphans(tree, graph, graph["top"]) == []


def test_folders_of_one_stage_are_left_alone(tree):
    write_text(tree / "outputs/first/anything", "x")
    graph = read_graph(tree)
    assert remove_orphans(tree, graph, graph["third"]) == remove_orphans(tree, graph, graph["second"]) == []


def test_no_lock_file_means_nothing_ran(tree):
    assert read_lock(tree) == {}


def test_dvc_is_run_in_the_tree(tree):
    assert run_dvc(tree, ["stage", "list", "--name-only"], capture=True).split() == ["first", "second", "third"]


def test_a_dvc_that_fails(tree):
    with pytest.raises(StageError) as caught:
        run_dvc(tree, ["repro", "nothing"])
    assert caught.value.found.startswith("`dvc repro nothing` failed: ERROR:")
    assert "without an error" in caught.value.allowed
    assert "message of dvc" in caught.value.fix


class Dvc:
    """Stands in for subprocess.run; busy for a while."""

    def __init__(self, busy: int) -> None:
        self.busy, self.calls = busy, []

    def __call__(self, command, **_):
        self.calls.append(command)
        stderr = "ERROR: Unable to acquire lock. Most likely another DVC process is running"
        return SimpleNamespace(returncode=255 if len(self.calls) <= self.busy else 0, stderr=stderr, stdout="done")


def test_a_busy_dvc_is_asked_again(tree, monkeypatch):
    dvc = Dvc(busy=2)
    monkeypatch.setattr(subprocess, "run", dvc)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert run_dvc(tree, ["repro"], capture=True) == "done"
    assert dvc.calls == [[sys.executable, "-m", "dvc", "repro"]] * 3


def test_patience_ends(tree, monkeypatch):
    monkeypatch.setattr(subprocess, "run", Dvc(busy=10))
    with pytest.raises(StageError) as caught:
        run_dvc(tree, ["repro"], patience=0)
    assert "Unable to acquire lock" in caught.value.found
    assert "wait for the other dvc to end" in caught.value.fix
