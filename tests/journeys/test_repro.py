"""The graph from end to end in a small working tree: dvc, the stages' own processes, git.

Every test has its own copy of a tree in which everything ran once (`micro_tree`), and runs no more stages than
its question needs.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from helpers.working_tree import SOURCE, change, copy_of, environment, run

from lexiseg.pipeline import read_graph, read_lock
from lexiseg.storage import hash_tree, read_json, write_text

LSEG = ["lseg-train", "lseg-predict", "lseg-evaluate", "lseg-register"]
LINKED = "finished before, linking the result"

# Runs the stages named on the command line in one process: saves the start of a process with torch for each.
RUN_STAGES = """
import sys
from pathlib import Path
from lexiseg.pipeline import read_graph
from lexiseg.stage import job_of, run_in_working_tree
from lexiseg.stages.registry import stage_function
from lexiseg.stages.settings import parse_settings, read_values
root, values = Path.cwd(), read_values(Path.cwd())
for name, node in read_graph(root).items():
    job = job_of(root, node, stage_function(name), settings=parse_settings(values), values=values)
    run_in_working_tree(root, job)
"""

# Any write of the command after this finds the disk full.
FULL_DISK = """
import errno, os, shutil, sys
def full(*paths, **_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(paths[-1]))
os.link = shutil.copy2 = full
sys.argv = ["lexiseg", *sys.argv[1:]]
from lexiseg.cli import main
main()
"""


def dvc(tree: Path, *arguments: str) -> str:
    """Both streams of a dvc command that ends well."""
    done = run(tree, "dvc", *arguments)
    return done.stdout + done.stderr


def lexiseg(tree: Path, *arguments: str, program: tuple[str, ...] = ("-m", "lexiseg")) -> subprocess.CompletedProcess:
    """A lexiseg command that may fail."""
    command = [sys.executable, *program, *arguments]
    return subprocess.run(command, cwd=tree, env=environment(tree), text=True, capture_output=True, timeout=280)


def ran(text: str) -> list[str]:
    """The stages that dvc ran, in order."""
    return [line.split("'")[1] for line in text.splitlines() if line.startswith("Running stage")]


def set_steps(tree: Path, steps: int) -> None:
    change(tree / "params.yaml", {"lseg": {"train": {"steps": steps}}})


def start(tree: Path, log: Path, *command: str) -> subprocess.Popen:
    """A command in a process group of its own, both its streams in `log`."""
    with log.open("w") as stream:
        return subprocess.Popen(
            command, cwd=tree, env=environment(tree), stdout=stream, stderr=stream, start_new_session=True
        )


def wait_for(text: str, log: Path, process: subprocess.Popen) -> None:
    """Until a running process has said something."""
    deadline = time.monotonic() + 200
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@contextmanager
def repro_in_training(tree: Path, log: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """A `dvc repro lseg-train` whose training has begun, and the process id of its stage."""
    process = start(tree, log, "dvc", "repro", "lseg-train")
    try:
        wait_for("train LSeg:", log, process)
        yield process, stage_of(process)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


def stage_of(process: subprocess.Popen) -> int:
    """The process id of the stage that a dvc process runs."""
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.cmdline()[-2:] == ["stage", "lseg-train"]:
            return child.pid
    raise AssertionError("no stage is running")


def test_a_second_repro_does_nothing(micro_tree):
    before = hash_tree(micro_tree / "outputs")
    dvc(micro_tree, "repro")  # DVC meets the copied files for the first time and hashes them
    before_it = resource.getrusage(resource.RUSAGE_CHILDREN)
    text = dvc(micro_tree, "repro")
    after_it = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ran(text) == []
    assert "up to date" in text
    # Seconds of computing: unlike those of the clock, they hardly depend on what else the machine does. About 3.2 here.
    assert after_it.ru_utime + after_it.ru_stime - before_it.ru_utime - before_it.ru_stime < 6
    assert hash_tree(micro_tree / "outputs") == before
    assert run(micro_tree, "git", "status", "--short").stdout == ""


def test_a_killed_training_is_repeated_and_re_runs_what_rests_on_it(micro_tree, tmp_path):
    """An `lseg` parameter changes; the training is killed; the next repro runs LSeg's stages and the report only."""
    before = hash_tree(micro_tree / "outputs")
    set_steps(micro_tree, 4000)
    with repro_in_training(micro_tree, tmp_path / "log") as (process, stage):
        os.kill(stage, signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    # The first where the shell that dvc starts becomes the stage, the second where it waits for it.
    assert re.search(r"exited with (-9|137)\b", (tmp_path / "log").read_text())
    assert not (micro_tree / "outputs/lseg/train").exists()  # DVC removed it; nothing half-written came instead
    assert not list((micro_tree / "outputs").rglob("*.part"))

    set_steps(micro_tree, 2)
    assert sorted(ran(dvc(micro_tree, "repro"))) == sorted([*LSEG, "report"])
    after = hash_tree(micro_tree / "outputs")
    changed = {name.split("/")[0] for name in after if after[name] != before.get(name)}
    assert changed == {"lseg", "report"}
    assert (micro_tree / "outputs/lseg/train/curve.csv").read_text().count("\n") == 3  # the head and two steps
    assert ran(dvc(micro_tree, "repro")) == []


def test_a_training_that_outlives_its_dvc_is_waited_for(micro_tree, tmp_path):
    set_steps(micro_tree, 30)
    with repro_in_training(micro_tree, tmp_path / "log") as (process, stage):
        os.kill(stage, signal.SIGSTOP)
        process.kill()
        process.wait(timeout=30)
        again = start(micro_tree, tmp_path / "again", "dvc", "repro", "lseg-train")
        wait_for("lseg-train: the same work is going on in another process, waiting", tmp_path / "again", again)
        os.kill(stage, signal.SIGCONT)  # the training goes on, without a parent
        assert again.wait(timeout=200) == 0, (tmp_path / "again").read_text()
    text = (tmp_path / "again").read_text()
    assert f"lseg-train: {LINKED}" in text
    assert "train LSeg:" not in text
    assert (micro_tree / "outputs/lseg/train/curve.csv").read_text().count("\n") == 31  # the head and all steps
    assert dvc(micro_tree, "status", "lseg-train", "--json").strip() == "{}"


def test_deleted_outputs_are_linked_from_the_finished_work(micro_tree):
    before = hash_tree(micro_tree / "outputs/lseg/train")
    # Neither the outputs nor DVC's own cache of this stage's result: a DVC that was killed while it hashed.
    shutil.rmtree(micro_tree / "outputs/lseg/train")
    shutil.rmtree(micro_tree / ".dvc/cache/runs")
    for cached in (micro_tree / ".dvc/cache/files/md5").rglob("*"):
        if cached.is_file() and any(cached.stat().st_size == size for size in _sizes(micro_tree, "lseg-train")):
            cached.unlink()
    text = dvc(micro_tree, "repro", "lseg-train")
    assert ran(text) == ["lseg-train"]
    assert f"lseg-train: {LINKED}" in text
    assert "train LSeg:" not in text
    assert hash_tree(micro_tree / "outputs/lseg/train") == before
    assert dvc(micro_tree, "status", "lseg-train", "--json").strip() == "{}"


def _sizes(tree: Path, stage: str) -> set[int]:
    work = next(path for path in (tree / ".lexiseg/work").glob(f"{stage}-*") if path.is_dir())
    return {path.stat().st_size for path in (work / "outputs").iterdir()}


def test_deleted_outputs_come_from_the_cache_of_dvc_without_the_work(micro_tree):
    before = hash_tree(micro_tree / "outputs")
    shutil.rmtree(micro_tree / "outputs")
    assert run(micro_tree, "lexiseg", "clean").stdout.startswith("removed 30 work folders")
    assert ran(dvc(micro_tree, "repro")) == []
    assert hash_tree(micro_tree / "outputs") == before


def test_a_changed_raw_file_re_runs_prepare(micro_tree):
    recipe = micro_tree / "data/world/world.yaml"
    change(recipe, {"splits": {"val": {"count": 5}}})
    assert ran(dvc(micro_tree, "repro", "prepare")) == ["prepare"]
    assert read_json(micro_tree / "outputs/prepare/info.json")["splits"]["val"]["count"] == 5
    assert run(micro_tree, "git", "diff", "HEAD", "--name-only").stdout.split() == ["data.dvc", "dvc.lock"]


def test_a_clone_sees_no_changed_code_and_runs_every_stage_to_the_same_bytes(micro_tree, tmp_path):
    clone = tmp_path / "elsewhere" / "a clone"
    clone.parent.mkdir()
    run(tmp_path, "git", "clone", "--quiet", str(micro_tree), str(clone))
    states = json.loads(dvc(clone, "status", "--json"))
    assert states.keys() >= {"prepare", "lseg-train", "report"}
    assert found_states(states) <= {"deleted", "not in cache"}, states
    paths = {path for stage in states.values() for entry in stage for part in entry.values() for path in part}
    assert not [path for path in paths if path.startswith("src/")]

    # From the raw data alone: another folder, another process, another order of everything hashed.
    shutil.copytree(micro_tree / "data/world", clone / "data/world")
    variables = {**environment(clone), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LANG": "C"}
    done = subprocess.run(
        [sys.executable, "-c", RUN_STAGES], cwd=clone, env=variables, text=True, capture_output=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert LINKED not in done.stderr
    ours, theirs = hash_tree(clone / "outputs"), hash_tree(micro_tree / "outputs")
    assert {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)} == set()
    assert _stages_with_outputs(clone) == list(read_graph(SOURCE))
    # DVC compares with the dvc.lock that came with the clone: all that is left to say is that its cache is empty.
    assert found_states(json.loads(dvc(clone, "status", "--json"))) == {"not in cache"}


def found_states(status: dict) -> set[str]:
    """What DVC says of any path: "modified", "deleted", …"""
    return {state for stage in status.values() for entry in stage for part in entry.values() for state in part.values()}


def _stages_with_outputs(tree: Path) -> list[str]:
    graph = read_graph(tree)
    return [name for name, node in graph.items() if all((tree / out).exists() for out in node.outs)]


def test_outputs_name_no_place_time_or_machine(micro_tree):
    """Nothing a stage writes says where, when or by whom it was made."""
    words = [str(micro_tree), str(micro_tree.parent), str(SOURCE), "/tmp/", "localhost"]
    for path in (micro_tree / "outputs").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [word for word in words if word.encode() in content], path


def test_an_experiment_runs_in_a_copy_with_the_copys_own_code(micro_tree):
    # The installed package is another one; what the experiment runs must be the copy's code, edits included.
    code = micro_tree / "src/lexiseg/methods/lseg/stages.py"
    write_text(code, code.read_text() + "\nprint('the code of the copy')\n")
    before = hash_tree(micro_tree / "outputs")
    work = {path.name for path in (micro_tree / ".lexiseg/work").iterdir()}
    variables = {**environment(micro_tree), "PYTHONPATH": str(SOURCE / "src")}
    done = subprocess.run(
        ["dvc", "exp", "run", "--temp", "--name", "two", "-S", "lseg.train.steps=2", "lseg-train"],
        cwd=micro_tree,
        env=variables,
        text=True,
        capture_output=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the code of the copy" in done.stdout + done.stderr
    assert hash_tree(micro_tree / "outputs") == before
    assert "steps: 3 " in (micro_tree / "params.yaml").read_text()
    # The work of the copy is kept by the main checkout.
    new = [path for path in (micro_tree / ".lexiseg/work").iterdir() if path.name not in work and path.is_dir()]
    assert [path.name.rsplit("-", 1)[0] for path in new] == ["lseg-train"]
    assert (new[0] / "outputs/curve.csv").read_text().count("\n") == 3
    table = dvc(micro_tree, "exp", "show", "--json", "--no-pager")
    assert '"name": "two"' in table


def test_data_that_changes_while_a_stage_reads_it_is_not_published(micro_tree, tmp_path):
    recipe = micro_tree / "data/world/world.yaml"
    change(recipe, {"splits": {"train": {"count": 400}}})
    before = hash_tree(micro_tree / "outputs/prepare")
    command = [sys.executable, "-m", "lexiseg", "stage", "prepare"]
    with (tmp_path / "log").open("w") as stream:
        process = subprocess.Popen(command, cwd=micro_tree, env=environment(micro_tree), stderr=stream)
        while "prepare world:" not in (tmp_path / "log").read_text() and process.poll() is None:
            time.sleep(0.02)
        change(recipe, {"splits": {"train": {"count": 16}}})
        assert process.wait(timeout=120) == 1
    text = (tmp_path / "log").read_text()
    assert "error (ChangedError)\nfound: data/world changed while prepare ran" in text
    assert "allowed: " in text
    assert "to do: run `dvc repro` again" in text
    assert hash_tree(micro_tree / "outputs/prepare") == before


def test_a_full_disk_while_publishing(micro_tree, tmp_path):
    before = hash_tree(micro_tree / "outputs")
    (micro_tree / "outputs/report/results.json").unlink()
    shutil.copy(micro_tree / "outputs/prepare/info.json", micro_tree / "outputs/report/results.json")
    done = lexiseg(micro_tree, "stage", "report", program=("-c", FULL_DISK))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error (StorageError)\nfound: No space left on device" in done.stderr
    assert "allowed: enough free space; nothing is half-written" in done.stderr
    assert "to do: make room (`lexiseg clean`" in done.stderr
    results = micro_tree / "outputs/report/results.json"
    assert results.read_bytes() == (micro_tree / "outputs/prepare/info.json").read_bytes()
    assert sorted(path.name for path in results.parent.iterdir()) == ["results.json"]
    assert lexiseg(micro_tree, "stage", "report").returncode == 0
    assert hash_tree(micro_tree / "outputs") == before


def test_wrong_settings_stop_the_graph_before_anything_is_lost(micro_tree):
    change(micro_tree / "params.yaml", {"lseg": {"train": {"stepps": 3, "lr": "fast"}}})
    done = subprocess.run(
        ["dvc", "repro"], cwd=micro_tree, env=environment(micro_tree), text=True, capture_output=True, timeout=280
    )
    assert done.returncode != 0
    assert "found: 2 fault(s) in params.yaml:" in done.stderr
    assert "`lseg.train.stepps`: unknown key (did you mean `steps`?)" in done.stderr
    assert '`lseg.train.lr`: "fast"' in done.stderr
    assert "to do: edit params.yaml" in done.stderr
    run(micro_tree, "git", "checkout", "params.yaml")
    assert ran(dvc(micro_tree, "repro")) == []  # from DVC's cache, without running


def test_a_baseline_less_leaves_no_trace_in_the_report(micro_tree, tmp_path):
    change(micro_tree / "params.yaml", {"baselines": ["linear"]})
    text = dvc(micro_tree, "repro")
    assert ran(text) == ["report"]
    assert "report: removed outputs/baselines/maskclip, which no stage makes any more" in text
    methods = {row["method"] for row in read_json(micro_tree / "outputs/report/results.json")["results"]}
    kmeans = {f"baselines/kmeans-{kind}" for kind in ("raw", "whitened")}
    assert methods == {"lseg", "stego", "tcl", "baselines/linear", *kmeans}
    # A clone that gets the outputs from a remote (here: the same cache) has nothing to run.
    run(micro_tree, "git", "add", "--all")
    run(micro_tree, "git", "commit", "--quiet", "--message", "one baseline")
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "--quiet", str(micro_tree), str(clone))
    dvc(clone, "cache", "dir", "--local", str(micro_tree / ".dvc/cache"))
    dvc(clone, "checkout")
    assert json.loads(dvc(clone, "status", "--json")) == {}


@pytest.mark.slow
def test_two_stages_at_once_work_once(micro_tree):
    """Two processes are given the same new work: one does it, the other waits and links."""
    set_steps(micro_tree, 20)
    command = [sys.executable, "-m", "lexiseg", "stage", "lseg-train"]
    processes = [
        subprocess.Popen(command, cwd=micro_tree, env=environment(micro_tree), stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=280)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert sum("train LSeg:" in text for text in said) == 1
    assert sum(LINKED in text for text in said) == 1
    assert (micro_tree / "outputs/lseg/train/curve.csv").is_file()


@pytest.mark.slow
def test_the_whole_graph_by_dvc_alone(micro_tree):
    """Every stage in a process of its own, from the data on, with nothing of an earlier run at hand."""
    before = hash_tree(micro_tree / "outputs")
    recorded = read_lock(micro_tree)
    for folder in ("outputs", ".lexiseg", ".dvc/cache/runs"):
        shutil.rmtree(micro_tree / folder)
    (micro_tree / "dvc.lock").unlink()
    text = dvc(micro_tree, "repro")
    assert ran(text) == list(recorded)
    assert LINKED not in text
    assert hash_tree(micro_tree / "outputs") == before
    assert read_lock(micro_tree) == recorded
    assert ran(dvc(micro_tree, "repro")) == []


@pytest.mark.slow
def test_two_whole_runs_at_once_in_two_copies(micro_tree, tmp_path):
    """Two checkouts share one `.lexiseg` (LEXISEG_HOME): both end well and alike, and the work is done once."""
    other = copy_of(micro_tree, tmp_path / "other")
    trees = [micro_tree, other]
    for tree in trees:
        set_steps(tree, 5)
    processes = []
    for tree in trees:
        variables = {**environment(tree), "LEXISEG_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", RUN_STAGES]
        processes.append(subprocess.Popen(command, cwd=tree, env=variables, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=280)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert hash_tree(trees[0] / "outputs") == hash_tree(trees[1] / "outputs")
    assert "".join(said).count(LINKED) == len(read_graph(SOURCE))
