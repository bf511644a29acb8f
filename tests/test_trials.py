from __future__ import annotations

from pathlib import Path

import pytest
from dvc.repo import Repo
from helpers.small_graph import Settings, Stages, code_of, make_small_graph

from lexiseg import trials as module
from lexiseg.errors import SettingsError, StageError
from lexiseg.pipeline import read_graph, read_lock
from lexiseg.settings import parse, read_yaml
from lexiseg.stage import job_of, run_in_working_tree
from lexiseg.storage import hash_tree, write_text
from lexiseg.training import Onlooker
from lexiseg.trials import Progress, Trials


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    stages = Stages()
    monkeypatch.setattr(module, "stage_function", stages.function)
    monkeypatch.setattr(module, "parse_settings", lambda values, source: parse(values, Settings, source=source))
    return stages


@pytest.fixture
def tree(tmp_path: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small graph after a `dvc repro`."""
    monkeypatch.delenv("LEXISEG_HOME", raising=False)
    monkeypatch.setattr("lexiseg.stage.check_package", lambda root: None)
    root = make_small_graph(tmp_path / "tree")
    monkeypatch.chdir(root)
    values = read_yaml(root / "params.yaml")
    with code_of(root, monkeypatch):
        for name, node in read_graph(root).items():
            settings = parse(values, Settings)
            run_in_working_tree(root, job_of(root, node, stages.function(name), settings=settings, values=values))
    with Repo(str(root)) as repo:
        repo.commit(force=True)
    assert list(read_lock(root)) == ["first", "second", "third"]
    stages.ran.clear()
    return root


def text(trials: Trials, changes: dict, target: str = "third") -> str:
    return (trials.run(changes, [target])[target] / "text.txt").read_text()


def test_without_changes_the_outputs_are_the_result(tree, stages):
    found = Trials(tree).run({}, ["third", "first"])
    assert found == {"third": tree / "outputs/third", "first": tree / "outputs/first"}
    assert stages.ran == []


def test_only_what_a_change_touches_is_run(tree, stages):
    before = hash_tree(tree / "outputs")
    assert text(Trials(tree), {"second.times": 5}) == "ab 10"
    assert stages.ran == ["second", "third"]
    assert hash_tree(tree / "outputs") == before
    assert read_yaml(tree / "params.yaml")["second"]["times"] == 2


def test_a_change_at_the_start_goes_through(tree, stages):
    assert text(Trials(tree), {"word": "cc"}) == "acc 6"
    assert stages.ran == ["first", "second", "third"]


def test_what_would_stay_is_known_in_advance(tree, stages):
    trials = Trials(tree)
    assert trials.needed(["third"]) == ["first", "second", "third"]
    assert trials.kept({}, ["third"]) == ["first", "second", "third"]
    assert trials.kept({"second.times": 5}, ["third"]) == ["first"]
    assert trials.kept({"word": "c"}, ["third"]) == []
    assert stages.ran == []
    trials.run({"second.times": 5}, ["third"])
    assert set(trials.folders) == {"second", "third"}
    assert {folder.parent for folder in trials.folders.values()} == {tree / ".lexiseg/work"}


def test_later_stages_can_be_tried_on_what_a_stage_would_write(tree, stages, tmp_path):
    trials, seen = Trials(tree), []

    def onlooker(progress: Progress) -> Onlooker:
        seen.append(progress)
        return Onlooker((), lambda share, save: None)

    trials.run({"word": "c", "second.times": 3}, ["third"], onlooker=onlooker)
    assert [progress.stage for progress in seen] == ["first", "second", "third"]
    stages.ran.clear()
    made, other = tmp_path / "made", tmp_path / "other"
    write_text(made / "length.txt", "99")
    write_text(other / "text.txt", "stand-in")
    progress = seen[1]
    found = progress.preview(made, "third", tmp_path / "scratch", instead={})
    assert (found / "text.txt").read_text() == "ac 99"
    found = progress.preview(made, "third", tmp_path / "again", instead={"first": other})
    assert (found / "text.txt").read_text() == "stand-in 99"
    assert stages.ran == ["third", "third"]
    assert text(trials, {"word": "c", "second.times": 3}) == "ac 6"


def test_upstream_of_the_targets_is_enough(tree, stages):
    found = Trials(tree).run({"word": "c"}, ["first"])
    assert stages.ran == ["first"]
    assert (found["first"] / "text.txt").read_text() == "ac"


def test_a_parameter_that_no_stage_reads_changes_nothing(tree, stages):
    assert Trials(tree).run({"second.unread": 9}, ["third"]) == {"third": tree / "outputs/third"}
    assert stages.ran == []


def test_repeated_trials_share_results(tree, stages):
    trials = Trials(tree)
    assert text(trials, {"word": "c"}) == "ac 4"
    assert text(trials, {"word": "c", "second.times": 3}) == "ac 6"
    assert stages.ran == ["first", "second", "third", "second", "third"]
    assert text(Trials(tree), {"word": "c", "second.times": 3}) == "ac 6"
    assert text(Trials(tree), {"word": "c"}) == "ac 4"
    assert len(stages.ran) == 5


def test_a_trial_that_ends_at_the_same_result_stops_there(tree, stages):
    # The length is the same, the text is not: the third stage depends on both.
    write_text(tree / "params.yaml", (tree / "params.yaml").read_text().replace("unread: 0", "unread: 1"))
    assert text(Trials(tree), {"word": "c"}) == "ac 4"
    assert stages.ran == ["first", "second", "third"]


def test_trials_and_dvc_share_the_first_stages_work(tree, stages):
    # A trial of a stage that rests on the working tree alone has the fingerprint that `dvc repro` would give it.
    Trials(tree).run({"word": "c"}, ["first"])
    write_text(tree / "params.yaml", (tree / "params.yaml").read_text().replace("word: b", "word: c"))
    values = read_yaml(tree / "params.yaml")
    job = job_of(
        tree, read_graph(tree)["first"], stages.function("first"), settings=parse(values, Settings), values=values
    )
    run_in_working_tree(tree, job)
    assert stages.ran == ["first"]
    assert (tree / "outputs/first/text.txt").read_text() == "ac"


def test_outputs_that_are_not_as_recorded_are_not_used(tree, stages):
    output = tree / "outputs/first/text.txt"
    output.unlink()  # the finished work shares the file
    write_text(output, "other")
    assert text(Trials(tree), {}) == "ab 4"
    assert "first" not in stages.ran  # its finished work is still there


@pytest.mark.parametrize("change", ["data/raw/raw.txt", "src/lexiseg/code.py"])
def test_outputs_of_other_data_or_code_are_not_used(tree, stages, change):
    write_text(tree / change, "other")
    Trials(tree).run({}, ["third"])
    assert stages.ran[0] == "first"


def test_a_graph_that_never_ran_can_have_trials(tmp_path, stages, monkeypatch):
    monkeypatch.delenv("LEXISEG_HOME", raising=False)
    root = make_small_graph(tmp_path / "new")
    assert text(Trials(root), {}) == "ab 4"
    assert stages.ran == ["first", "second", "third"]
    assert not (root / "outputs").exists()


def test_wrong_changes_are_refused(tree, stages):
    with pytest.raises(SettingsError) as caught:
        Trials(tree).run({"second.tmies": 3, "word": 5}, ["third"])
    assert "2 fault(s) in params.yaml with {'second.tmies': 3, 'word': 5}" in caught.value.found
    assert "did you mean `times`" in caught.value.found
    assert stages.ran == []


@pytest.mark.parametrize(("key", "value"), [("data.name", "other"), ("baselines", ["linear"])])
def test_a_change_of_the_graph_itself_is_refused(tree, stages, key, value):
    with pytest.raises(SettingsError) as caught:
        Trials(tree).run({key: value}, ["third"])
    assert caught.value.found == f"a trial changes `{key}`"
    assert "leave the stages and their inputs as they are" in caught.value.allowed
    assert "params.yaml" in caught.value.fix
    assert stages.ran == []


@pytest.mark.parametrize("change", ["data/raw/raw.txt", "src/lexiseg/code.py"])
def test_what_the_trials_rest_on_must_not_change_meanwhile(tree, stages, change):
    trials = Trials(tree)
    assert text(trials, {"word": "c"}) == "ac 4"
    write_text(tree / change, "other")
    with pytest.raises(StageError) as caught:
        trials.run({"word": "d"}, ["third"])
    assert "changed since the trials began" in caught.value.found
    assert "until the last trial ends" in caught.value.allowed
    assert "run them again" in caught.value.fix
    assert stages.ran == ["first", "second", "third"]


def test_a_change_while_a_stage_of_a_trial_runs_is_found(tree, stages):
    stages.meanwhile = lambda: write_text(tree / "data/raw/raw.txt", "other")
    with pytest.raises(StageError, match="data/raw changed since the trials began"):
        Trials(tree).run({"word": "d"}, ["third"])
    assert stages.ran == ["first"]
