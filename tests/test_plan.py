"""Plans against what dvc then does, on a graph of shell commands."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.shell_graph import DVC_YAML, make_shell_graph, repro, set_params

from lexiseg.checkpoint import Checkpoint, save_checkpoint
from lexiseg.errors import StageError
from lexiseg.history import Took, remember
from lexiseg.pipeline import hash_dependencies, read_graph, upstream_of
from lexiseg.plan import Step, _scale, plan, plan_lines
from lexiseg.stage import FINISHED, fingerprint_of, value_at, work_folder
from lexiseg.storage import write_json, write_text

FOLDER = """\
  left:
    cmd: mkdir -p outputs/sides && cp data/raw/raw.txt outputs/sides/left.txt
    deps:
      - data/raw
    outs:
      - outputs/sides/left.txt
  right:
    cmd: mkdir -p outputs/sides && echo right > outputs/sides/right.txt
    deps:
      - data/other.txt
    outs:
      - outputs/sides/right.txt
  fold:
    cmd: cat outputs/sides/* > outputs/fold.txt
    deps:
      - outputs/sides
    outs:
      - outputs/fold.txt
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LEXISEG_HOME", raising=False)
    return make_shell_graph(tmp_path / "tree")


def actions(root: Path, *targets: str) -> dict[str, str]:
    return {step.stage: step.action for step in plan(root, targets)}


def why(root: Path, stage: str) -> tuple[str, ...]:
    return next(step.why for step in plan(root) if step.stage == stage)


def place(root: Path, stage: str) -> Path:
    """The work folder that the stage would have now."""
    node = read_graph(root)[stage]
    values = {"word": "b", "second": {"steps": 2, "batch": 8}}
    params = {key: value_at(values, key) for key in node.params}
    deps = hash_dependencies(root, node.deps)
    return work_folder(root / ".lexiseg", stage, fingerprint_of(stage, params=params, deps=deps))


def test_a_new_tree_runs_everything(tree):
    assert actions(tree) == {"first": "run", "second": "run", "third": "run"}
    assert why(tree, "first") == ("dvc.lock has no run of it",)
    assert why(tree, "second") == ("dvc.lock has no run of it", "after first")
    assert repro(tree) == dict.fromkeys(("first", "second", "third"), "run")
    assert actions(tree) == dict.fromkeys(("first", "second", "third"), "nothing")


def test_a_change_runs_its_stage_and_perhaps_those_after_it(tree):
    repro(tree)
    set_params(tree, steps=5)
    assert actions(tree) == {"first": "nothing", "second": "run", "third": "follow"}
    assert why(tree, "second") == ("second.steps 2 -> 5",)
    assert why(tree, "third") == ("after second",)
    # The length does not depend on it, so dvc has nothing to do for the third.
    assert repro(tree) == {"first": "nothing", "second": "run", "third": "nothing"}


def test_changed_data_runs_its_stage(tree):
    repro(tree)
    write_text(tree / "data/raw/raw.txt", "another\nlonger\n")
    assert actions(tree) == {"first": "run", "second": "follow", "third": "follow"}
    assert why(tree, "first") == ("data/raw changed",)


def test_a_change_undone_is_restored_all_the_way(tree):
    repro(tree)
    write_text(tree / "data/raw/raw.txt", "another\nlonger\n")
    repro(tree)
    write_text(tree / "data/raw/raw.txt", "a\n")
    # Seen from the files that are there now, the second would not have to run at all.
    assert actions(tree) == dict.fromkeys(("first", "second", "third"), "restore")
    assert repro(tree) == dict.fromkeys(("first", "second", "third"), "restore")


def test_lost_and_edited_outputs_are_restored(tree):
    repro(tree)
    (tree / "outputs/third/text.txt").unlink()
    (tree / "outputs/second/length.txt").chmod(0o644)
    write_text(tree / "outputs/second/length.txt", "edited")
    assert actions(tree) == {"first": "nothing", "second": "restore", "third": "restore"}
    assert why(tree, "second") == ("outputs/second/length.txt was changed",)
    assert why(tree, "third") == ("outputs/third/text.txt is not there",)
    assert repro(tree) == {"first": "nothing", "second": "restore", "third": "restore"}


def test_another_command_and_a_new_out_run_their_stage(tree):
    repro(tree)
    text = (tree / "dvc.yaml").read_text()
    write_text(tree / "dvc.yaml", text.replace("cat outputs/second/length.txt >", "cp outputs/second/length.txt"))
    assert why(tree, "third") == ("its command changed",)
    assert repro(tree)["third"] == "run"
    more = text.replace("cat outputs/second/length.txt >", "tee outputs/third/more.txt < outputs/second/length.txt >")
    write_text(tree / "dvc.yaml", more + "      - outputs/third/more.txt\n")
    assert actions(tree)["third"] == "run"
    assert repro(tree)["third"] == "run"


def test_a_folder_of_several_stages_is_known_where_its_parts_are(tree):
    write_text(tree / "dvc.yaml", DVC_YAML + FOLDER)
    write_text(tree / "data/other.txt", "b")
    repro(tree)
    (tree / "outputs/sides/left.txt").unlink()
    (tree / "outputs/fold.txt").unlink()
    assert actions(tree, "fold") == {"left": "restore", "right": "nothing", "fold": "restore"}
    assert repro(tree, "fold") == {"left": "restore", "right": "nothing", "fold": "restore"}
    write_text(tree / "data/raw/raw.txt", "another\n")
    assert actions(tree, "fold") == {"left": "run", "right": "nothing", "fold": "follow"}
    assert next(step.why for step in plan(tree) if step.stage == "fold") == ("after left",)


def test_what_is_no_longer_declared_runs_nothing(tree):
    repro(tree)
    text = (tree / "dvc.yaml").read_text()
    write_text(tree / "dvc.yaml", text.replace("    params:\n      - second\n", ""))
    assert actions(tree) == dict.fromkeys(("first", "second", "third"), "nothing")
    assert repro(tree) == dict.fromkeys(("first", "second", "third"), "nothing")


def test_missing_data_stops_what_needs_it(tree):
    (tree / "data/raw/raw.txt").unlink()
    (tree / "data/raw").rmdir()
    assert actions(tree) == dict.fromkeys(("first", "second", "third"), "blocked")
    assert why(tree, "first") == ("data/raw is missing",)
    assert why(tree, "third") == ("first cannot run", "second cannot run")


def test_targets_take_what_they_need(tree):
    assert list(actions(tree, "second")) == ["first", "second"]
    with pytest.raises(StageError, match="no stage `fourth`"):
        plan(tree, ["fourth"])


def test_a_finished_result_is_linked_and_a_checkpoint_gone_on_with(tree):
    repro(tree, "first")
    work = place(tree, "second")
    checkpoint = Checkpoint(
        step=30, batches=40, module={}, optimisers=[], schedulers=[], curve=[], torch=str(torch.__version__)
    )
    save_checkpoint(work / "checkpoints" / "train.ckpt", checkpoint)
    remember(tree / ".lexiseg", took(seconds=100.0))
    second = plan(tree)[1]
    assert (second.action, second.seconds) == ("resume", 25.0)
    assert second.why[-1] == "75% of the training is done"
    write_json(work / FINISHED, {})
    assert actions(tree)["second"] == "link"


def took(**changes) -> Took:
    params = {"second": {"steps": 2, "batch": 8}}
    return replace(
        Took("second", params, 10.0, memory=5, disk=7, whole=True, finished="2026-01-01T00:00:00+00:00"), **changes
    )


def test_costs_are_those_of_the_earlier_run(tree):
    remember(tree / ".lexiseg", took())
    second = plan(tree)[1]
    assert (second.seconds, second.memory, second.disk, second.basis) == (10.0, 5, 7, "as on 2026-01-01")
    assert plan(tree)[0].seconds is None


def test_time_grows_with_the_steps(tree):
    remember(tree / ".lexiseg", took())
    set_params(tree, steps=6)
    second = plan(tree)[1]
    assert second.seconds == 30.0
    assert second.basis == "as on 2026-01-01 with other settings, times 3"


def test_steps_of_another_item_do_not_count(tree):
    item = took(stage="fit@one", params={"fit": {"one": {"steps": 2}, "two": {"steps": 2}}})
    assert _scale(item, {"fit": {"one": {"steps": 4}, "two": {"steps": 8}}})[0] == 2.0


def test_settings_that_all_items_share_count():
    probe = took(stage="kmeans-predict@raw", params={"stego.probe": {"steps": 100, "batch": 8}})
    assert _scale(probe, {"stego.probe": {"steps": 1000, "batch": 8}})[0] == 10.0
    for item, factor in (("linear", 3.0), ("maskclip", 1.0)):
        one = took(stage=f"baseline-predict@{item}", params={"baseline": {"linear": {"steps": 2}}})
        assert _scale(one, {"baseline": {"linear": {"steps": 6}}})[0] == factor


def test_the_table_adds_up():
    steps = [
        Step("first", "nothing"),
        Step("second", "run", ("a", "b", "c", "d"), seconds=90.0, memory=3 * 10**9, disk=10**6, basis="as on …"),
        Step("third", "follow", ("after second",)),
    ]
    text = plan_lines(steps, free_memory=4 * 10**9, free_disk=10**10)
    assert text[1] == "first   up to date"
    assert re.fullmatch(r"second  runs +1 m 30 s +3\.0 GB +1\.0 MB  a; b; c; and 1 more \(as on …\)", text[2])
    assert "2 of 3 stages compute, about 1 m 30 s one after the other; no earlier run is known of third" in text
    assert "memory 3.0 GB of 4.0 GB available" in text[-1]
    assert plan_lines(steps, free_memory=10**9, free_disk=10**10)[-1] == "warning: that is more than there is"
    assert plan_lines(steps[:1], free_memory=0, free_disk=0)[-1] == "nothing is computed"


def test_upstream_is_in_the_order_of_the_graph(tree):
    graph = read_graph(tree)
    assert upstream_of(graph, "third") == ["first", "second"]
    assert upstream_of(graph, "third", direct=True) == ["second"]
    assert upstream_of(graph, "first") == []
