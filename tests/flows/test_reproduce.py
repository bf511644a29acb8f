"""The flow on a small working tree, with Prefect's server of a test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from helpers.micro import picture, save
from helpers.working_tree import change, run
from mlflow import MlflowClient
from prefect import get_client
from prefect.exceptions import ParameterTypeError

from flows import reproduce as module
from flows.reproduce import RETRIES, methods_of, percent, reproduce, setting, stages_of, worth_repeating
from lexiseg.driver import StoppedError
from lexiseg.errors import DataError, SettingsError, StageError, StorageError
from lexiseg.pipeline import read_graph
from lexiseg.settings import read_yaml
from lexiseg.storage import hash_tree, write_json

ROOT = Path(__file__).parents[2]
LSEG = ["prepare", "validate", "encode", "lseg-train", "lseg-predict", "lseg-evaluate", "lseg-register"]


@pytest.fixture
def tree(current_tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished working tree, the current one."""
    # Tests wait for no second try.
    for name in ("run_stage", "publish"):
        monkeypatch.setattr(module, name, getattr(module, name).with_options(retries=0))
    return current_tree


def artifacts() -> dict[str, str]:
    with get_client(sync_client=True) as client:
        return {str(artifact.key): str(artifact.data) for artifact in client.read_artifacts()}


def runs(tree: Path) -> list:
    client = MlflowClient(f"sqlite:///{tree}/.lexiseg/mlflow.db")
    return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


def test_a_method_is_what_it_needs_and_makes():
    graph = read_graph(ROOT)
    assert stages_of(graph, "lseg") == [name for name in graph if name in LSEG]
    assert stages_of(graph, "all") == list(graph)
    assert stages_of(graph, "linear") == [
        *("prepare", "validate", "encode"),
        *("baseline-predict@linear", "baseline-evaluate@linear"),
    ]
    with pytest.raises(SettingsError, match="no method `encode`") as caught:
        stages_of(graph, "encode")
    assert caught.value.allowed == ", ".join(["all", *methods_of(graph)])


def test_baselines_of_a_method_have_its_groups_name():
    graph = read_graph(ROOT)
    assert {"linear", "stego", "kmeans-whitened"} <= set(methods_of(graph))
    assert "whitened" not in methods_of(graph)
    wanted = stages_of(graph, "kmeans-whitened")
    assert wanted[-2:] == ["kmeans-predict@whitened", "kmeans-evaluate@whitened"]
    assert {"encode-trunk", "stego-features"} <= set(wanted)
    assert not {"stego-train", "kmeans-evaluate@raw"} & set(wanted)


@pytest.mark.parametrize(
    ("stage", "folder", "method"),
    [
        ("baseline-evaluate@linear", "baselines/linear", "linear"),
        ("kmeans-evaluate@raw", "baselines/kmeans-raw", "kmeans-raw"),
        ("stego-evaluate", "stego", "stego"),
    ],
)
def test_artifacts_are_those_of_the_methods_folder(tmp_path, monkeypatch, stage, folder, method):
    made: dict[str, Any] = {}
    for kind in ("table", "markdown"):
        keep = partial(lambda kind, **given: made.update({given["key"]: given[kind]}), kind)
        monkeypatch.setattr(module, f"create_{kind}_artifact", keep)
    result = {"method": folder, "splits": {"test": {"miou": 0.5, "usage_entropy": None, "episodes": 7}}}
    write_json(tmp_path / f"outputs/{folder}/evaluate/metrics.json", result)
    save(tmp_path / f"outputs/{folder}/evaluate/pictures/test_overview.png", picture(0))
    module.publish_artifacts(stage, tmp_path)
    assert made[f"{method}-metrics"] == [{"split": "test", "miou": 50.0, "usage_entropy": None}]
    assert "data:image/png;base64," in made[f"{method}-pictures"]


def test_only_what_may_pass_is_tried_again():
    def state(error: Exception) -> SimpleNamespace:
        return SimpleNamespace(result=lambda raise_on_failure: error)

    texts = {"found": "a", "allowed": "b", "fix": "c"}
    assert worth_repeating(None, None, state(StageError(**texts)))
    assert worth_repeating(None, None, state(StoppedError("it", expired=True)))
    assert not worth_repeating(None, None, state(StoppedError("it", expired=False)))
    assert not worth_repeating(None, None, state(DataError(**texts)))
    assert not worth_repeating(None, None, state(StorageError(**texts)))
    assert module.run_stage.retries == RETRIES
    assert module.run_stage.retry_delay_seconds == [10, 20]


def test_settings_of_the_command_line_are_json_or_text():
    assert setting("lseg.train.lr=0.002") == ("lseg.train.lr", 0.002)
    assert setting("encode.clip.model=ViT-B-16") == ("encode.clip.model", "ViT-B-16")
    assert setting("lseg.train.crop=[64, 64]") == ("lseg.train.crop", [64, 64])
    assert percent({"miou": 0.1234, "boundary_f": None, "pixels": 3}) == {"miou": 12.3, "boundary_f": None}


@pytest.mark.timeout(600)
def test_a_finished_graph_is_published_and_nothing_runs(tree, prefect):
    before = hash_tree(tree / "outputs")
    assert reproduce() == dict.fromkeys(read_graph(tree), "unchanged")
    assert hash_tree(tree / "outputs") == before
    beside = ["baselines/kmeans-raw", "baselines/kmeans-whitened", "baselines/linear"]
    names = sorted(run.info.run_name for run in runs(tree))
    assert names == [*beside, "baselines/maskclip", "lseg", "stego", "tcl"]
    made = artifacts()
    assert {"results", "lseg-metrics", "lseg-pictures", "linear-metrics", "maskclip-pictures"} <= made.keys()
    shown = json.loads(made["results"])
    report = read_yaml(tree / "outputs/report/results.json")["results"]  # JSON is YAML
    assert [(row["method"], row["split"]) for row in shown] == [(row["method"], row["split"]) for row in report]
    assert made["lseg-pictures"].startswith("![stress_overview](data:image/png;base64,")


def test_a_stage_that_fails_once_is_tried_again(tree, prefect, monkeypatch):
    tried = []

    def flaky(root: Path, name: str, **arguments) -> str:
        tried.append(name)
        if tried.count("validate") == 1 and name == "validate":
            raise StageError(found="once", allowed="never", fix="again")
        return "unchanged"

    monkeypatch.setattr(module, "reproduce_stage", flaky)
    monkeypatch.setattr(module, "publish_artifacts", lambda name, root: None)
    again = module.run_stage.with_options(retries=1, retry_delay_seconds=0)
    monkeypatch.setattr(module, "run_stage", again)
    assert set(reproduce(method="linear").values()) == {"unchanged"}
    assert tried.count("validate") == 2
    assert tried.count("prepare") == 1


@pytest.mark.timeout(600)
def test_a_stage_that_takes_too_long_is_stopped_and_the_run_says_so(tree, prefect):
    change(tree / "params.yaml", {"lseg": {"train": {"steps": 5000}}})
    with pytest.raises(StageError, match=r"a stage took longer than 0\.004 h") as caught:
        reproduce(method="lseg", timeout_hours=0.004)
    assert "timeout_hours" in caught.value.fix
    assert not [one for one in psutil.process_iter(["cmdline"]) if str(tree) in " ".join(one.info["cmdline"] or ())]


def test_stages_wait_for_memory_and_not_when_they_are_alone(monkeypatch):
    monkeypatch.setattr(module, "remembered_memory", lambda root: dict.fromkeys("abcd", 10**15))
    assert most_at_once(monkeypatch, at_once=4) == 1
    monkeypatch.setattr(module, "remembered_memory", lambda root: dict.fromkeys("abcd", 1))
    assert most_at_once(monkeypatch, at_once=4) == 3
    assert most_at_once(monkeypatch, at_once=2) == 2


def most_at_once(monkeypatch: pytest.MonkeyPatch, *, at_once: int) -> int:
    """How many of three independent stages and one that needs them run at the same time."""
    most = 0

    class Future:
        def __init__(self, name: str) -> None:
            self.name, self.state = name, SimpleNamespace(is_completed=lambda: True)

        def wait(self) -> None:
            return None

    def completed(running: list[Future]) -> Iterator[Future]:
        nonlocal most
        most = max(most, len(running))
        assert "d" not in [future.name for future in running] or len(running) == 1
        return iter(running[:1])

    monkeypatch.setattr(module, "as_completed", completed)
    stage = SimpleNamespace(submit=lambda name, root, timeout, wait_for: Future(name))
    monkeypatch.setattr(module, "run_stage", stage)
    monkeypatch.setattr(module, "upstream_of", lambda graph, name, direct: ["a", "b", "c"] if name == "d" else [])
    result = module.run_stages({}, ["a", "b", "c", "d"], Path(), timeout=1.0, at_once=at_once)
    assert list(result) == ["a", "b", "c", "d"]
    return most


def test_parameters_out_of_range_are_refused(tree, prefect):
    for number in (-1, 0):
        with pytest.raises(ParameterTypeError):
            reproduce(parallel=number)
        with pytest.raises(ParameterTypeError):
            reproduce(timeout_hours=number)


@pytest.mark.timeout(600)
def test_data_that_was_changed_in_its_place_is_recorded(tree, prefect, monkeypatch):
    monkeypatch.setattr(module, "run_stages", lambda *arguments, **options: {})
    change(tree / "data/world/world.yaml", {"seed": 99})
    reproduce(method="linear")
    assert run(tree, "dvc", "status", "data.dvc", "--json").stdout.strip() == "{}"
    change(tree / "data/world/world.yaml", {"seed": 98})
    with pytest.raises(StageError, match=r"not as data\.dvc records it"):
        reproduce(method="linear", settings={"seed": 3})


@pytest.mark.timeout(600)
def test_other_settings_work_in_a_copy(tree, prefect):
    before = hash_tree(tree / "outputs")
    params = (tree / "params.yaml").read_bytes()
    result = reproduce(method="lseg", settings={"lseg.train.steps": 4})
    assert result == {name: "ran" if name in LSEG[3:] else "restored" for name in read_graph(tree) if name in LSEG}
    assert hash_tree(tree / "outputs") == before
    assert (tree / "params.yaml").read_bytes() == params
    assert run(tree, "dvc", "status", "--json").stdout.strip() == "{}"
    assert [path for path in (tree / ".lexiseg/copies").iterdir() if path.is_dir()] == []
    (published,) = runs(tree)
    assert published.data.params["lseg.train.steps"] == "4"


@pytest.mark.timeout(600)
def test_a_failed_stage_stops_what_needs_it_and_nothing_else(tree, prefect, monkeypatch):
    change(tree / "params.yaml", {"lseg": {"train": {"steps": 4}}, "evaluate": {"boundary_tolerance": 0.01}})
    monkeypatch.setenv("LEXISEG_CHECKPOINT_SECONDS", "soon")
    with pytest.raises(SettingsError, match="LEXISEG_CHECKPOINT_SECONDS=soon"):
        reproduce()
    stale = json.loads(run(tree, "dvc", "status", "--json").stdout)
    assert set(stale) == {"lseg-train", "lseg-predict", "lseg-evaluate", "lseg-register", "report"}
    assert {"baselines/linear", "baselines/maskclip"} <= {run.info.run_name for run in runs(tree)}


@pytest.mark.timeout(600)
def test_without_mlflow_the_stages_run_and_a_sync_repairs(tree, prefect, monkeypatch):
    change(tree / "params.yaml", {"lseg": {"train": {"steps": 4}}})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(StageError, match="`lexiseg sync` failed"):
        reproduce(method="lseg")
    assert run(tree, "dvc", "status", "lseg-register", "--json").stdout.strip() == "{}"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert "created run lseg" in run(tree, "lexiseg", "sync").stdout
    (published,) = [run for run in runs(tree) if run.info.run_name == "lseg"]
    assert published.data.params["lseg.train.steps"] == "4"


def test_a_run_that_crashes_again_and_again_is_given_up(tree, prefect, monkeypatch):
    monkeypatch.setattr(module, "flow_run", SimpleNamespace(run_count=module.MOST_STARTS + 1))
    with pytest.raises(StageError, match="started 6 times"):
        reproduce()
