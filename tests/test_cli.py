"""The command line as its users meet it: exit codes, what is printed, and errors in three parts."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import typer.main
from dvc.repo import Repo
from filelock import FileLock
from helpers.micro import write_folder
from helpers.small_graph import make_small_graph
from helpers.working_tree import SOURCE

from lexiseg import cli
from lexiseg.errors import StageError
from lexiseg.settings import read_yaml
from lexiseg.storage import read_json, sha256_of_file, write_json, write_text


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    def in_three_parts(self, kind: str) -> str:
        """The error, once it is sure to have its form."""
        lines = self.err.splitlines()
        assert self.code == 1
        assert lines[0] == f"error ({kind})"
        for part in ("found: ", "allowed: ", "to do: "):
            assert sum(line.startswith(part) for line in lines) == 1, self.err
        assert "Traceback" not in self.err
        return self.err


Command = Callable[..., Done]


@pytest.fixture
def lexiseg(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process, as `lexiseg …` would."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # what the command changes is put back after the test
    for name in ("LEXISEG_HOME", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli.environment, "keep_memory", lambda: None)

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["lexiseg", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Done(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working tree with the settings and the graph of the repository, without code, data and outputs."""
    root = tmp_path / "tree"
    shutil.copytree(SOURCE / "profiles", root / "profiles")
    shutil.copy(SOURCE / "dvc.yaml", root)
    shutil.copy(SOURCE / "profiles/embedded.yaml", root / "params.yaml")  # another profile may be in use here
    Repo.init(str(root), no_scm=True).close()
    monkeypatch.chdir(root)
    return root


def edit(tree: Path, *changes: tuple[str, str]) -> None:
    text = (tree / "params.yaml").read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    write_text(tree / "params.yaml", text)


OUTSIDE = [
    "stage prepare",
    "report",
    "report --json",
    "serve lseg@production",
    "promote lseg --to production",
    "rollback lseg",
    "retire lseg --reason old",
    "history lseg",
    "card lseg",
    "sync",
    "ablate lseg",
    "doctor",
    "clean",
    "plan",
    "mend",
    "stego diagnose",
    "sweep tcl",
    "sweep run tcl",
    "sweep show",
    "sweep apply tcl-weights",
    "sweep work tcl-weights",
    "data add x . --adapter folder",
    f"weights add {__file__}",
    "profile list",
    "profile show",
    "profile use camvid",
    "profile save mine",
]


@pytest.mark.parametrize("command", OUTSIDE)
def test_outside_of_a_working_tree(lexiseg, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    text = lexiseg(*command.split()).in_three_parts("StageError")
    assert f"found: no dvc.yaml and params.yaml in {tmp_path} or above" in text
    assert "to do: change into the cloned repository" in text
    assert not list(tmp_path.iterdir())


def test_every_command_is_tried_outside_of_a_working_tree():
    names = {"predict", "import"}  # need none
    groups = [("", typer.main.get_command(cli.app))]
    while groups:
        prefix, group = groups.pop()
        children = getattr(group, "commands", {})
        groups += [(f"{prefix} {name}".strip(), child) for name, child in children.items()]
        if not children:
            assert prefix in names or any(f"{command} ".startswith(f"{prefix} ") for command in OUTSIDE), prefix


@pytest.mark.parametrize("command", ["stage prepare", "stage lseg-train", "ablate lseg"])
def test_two_wrong_keys_at_once(lexiseg, tree, command):
    edit(
        tree,
        ("\nseed: 0 ", "\nsead: 0 "),
        ("init: backbone ", "init: bakcbone "),
        ("    accumulate: 1 ", "    accumulate: many "),
    )
    text = lexiseg(*command.split()).in_three_parts("SettingsError")
    assert "found: 4 fault(s) in params.yaml:" in text
    assert "`sead`: unknown key (did you mean `seed`?)" in text
    assert "`seed`: missing" in text
    assert '`lseg.model.init`: "bakcbone"' in text
    assert "`lseg.model.init`: one of backbone, random" in text
    assert '`lseg.train.accumulate`: "many"' in text
    assert not (tree / "outputs").exists()
    assert not (tree / ".lexiseg").exists()


def test_params_that_are_not_yaml(lexiseg, tree):
    write_text(tree / "params.yaml", "seed: [0\n")
    assert "is not valid YAML" in lexiseg("stage", "prepare").in_three_parts("SettingsError")


def test_a_stage_that_does_not_exist(lexiseg, tree):
    text = lexiseg("stage", "trian").in_three_parts("StageError")
    assert "found: no stage `trian` in dvc.yaml" in text
    assert "lseg-train" in text


def test_a_missing_data_set(lexiseg, tree, monkeypatch):
    monkeypatch.setattr("lexiseg.stage.check_package", lambda root: None)
    (tree / "src").symlink_to(SOURCE / "src")
    text = lexiseg("stage", "prepare").in_three_parts("StageError")
    assert "found: the dependency data/world does not exist" in text
    assert "`dvc pull data/world` where a remote has it" in text
    assert "lexiseg data add world PATH --adapter" in text
    assert not (tree / "outputs").exists()


def test_a_stage_uses_the_threads_of_the_settings(lexiseg, tree, monkeypatch):
    edit(tree, ("threads: 2 ", "threads: 3 "))
    seen: list[tuple] = []
    monkeypatch.setattr(
        "lexiseg.stage.run_in_working_tree", lambda root, job: seen.append((root, job.node.name, Path.cwd()))
    )
    (tree / "below").mkdir()
    monkeypatch.chdir(tree / "below")
    assert lexiseg("stage", "validate").code == 0
    assert seen == [(tree, "validate", tree)]
    assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, "enough free space"), (errno.EACCES, "may write"), (errno.EROFS, "may write")]
)
def test_a_write_that_the_system_refuses(lexiseg, tree, monkeypatch, number, kind):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), "outputs/report")

    monkeypatch.setattr("lexiseg.reporting.read_report", refuse)
    text = lexiseg("report").in_three_parts("StorageError")
    assert f"found: {os.strerror(number)}: outputs/report" in text
    assert kind in text


def test_errors_that_nobody_expected_keep_their_traceback(tree, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lexiseg", "report"])
    for error in (FileNotFoundError(errno.ENOENT, "gone"), KeyError("a fault of ours")):
        monkeypatch.setattr("lexiseg.reporting.read_report", lambda root, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            cli.main()


def test_report_as_a_table_and_as_json(lexiseg, tree):
    row = {"method": "lseg", "protocol": "world", "protocol_hash": "abcdefgh", "split": "test", "seeds": [0]}
    result = {"results": [{**row, "metrics": {"miou": 0.5}}], "encoders": {"retrieval": None, "stand_ins": {}}}
    assert "no outputs/report/results.json" in lexiseg("report").in_three_parts("StageError")
    write_json(tree / "outputs/report/results.json", result)
    assert "50.0" in lexiseg("report").out
    write_text(tree / "printed.json", lexiseg("report", "--json").out)
    assert read_yaml(tree / "printed.json") == result


def test_profiles_are_listed_shown_used_and_saved(lexiseg, tree):
    assert lexiseg("profile", "list").out.splitlines()[0] == "* embedded"
    assert lexiseg("profile", "show").out == "params.yaml is the default\n"
    assert "embedded -> camvid" in lexiseg("profile", "use", "camvid").out
    assert "* camvid" in lexiseg("profile", "list").out
    assert "data.name: camvid" in lexiseg("profile", "show").out
    edit(tree, ("\nseed: 0 ", "\nseed: 8 "))
    text = lexiseg("profile", "use", "embedded").in_three_parts("SettingsError")
    assert "found: params.yaml differs from its profile `camvid` in seed" in text
    assert "profiles/mine.yaml" in lexiseg("profile", "save", "mine").out
    assert lexiseg("profile", "use", "embedded").code == 0
    assert lexiseg("profile", "use", "mine").code == 0
    assert read_yaml(tree / "params.yaml")["seed"] == 8
    edit(tree, ("\nseed: 8 ", "\nseed: 9 "))
    assert lexiseg("profile", "use", "embedded", "--force").code == 0
    assert (tree / "params.yaml").read_text() == (tree / "profiles/embedded.yaml").read_text()


def test_weights_are_copied_with_their_names(lexiseg, tree, tmp_path):
    source = tmp_path / "downloads" / "table.npy"
    write_text(source, "vectors")
    names = source.with_suffix(".names.txt")
    write_text(names, "grass\nsky\n")
    # One hash for both: other names for the same vectors are another table.
    assert lexiseg("weights", "add", source).out == f"weights/table.npy  sha256 {sha256_of_file(source, names)}\n"
    assert (tree / "weights/table.npy").read_text() == "vectors"
    assert (tree / "weights/table.names.txt").read_text() == "grass\nsky\n"
    assert lexiseg("weights", "add", source).code == 0  # again
    write_text(source, "other vectors")
    text = lexiseg("weights", "add", source).in_three_parts("ModelError")
    assert "found: weights/table.npy is there already with other content" in text
    assert (tree / "weights/table.npy").read_text() == "vectors"
    text = lexiseg("weights", "add", tmp_path / "no.npy").in_three_parts("ModelError")
    assert "no.npy" in text


def test_clean_tells_what_it_removed(lexiseg, tree):
    for name in ("a-1", "b-2"):
        write_text(tree / f".lexiseg/work/{name}/outputs/file", "x" * 1_000_000)
    with FileLock(str(tree / ".lexiseg/work/b-2.lock")):
        done = lexiseg("clean")
    assert done.out == "removed 1 work folders, 1 MB\n"
    assert "kept b-2: a stage is running there" in done.err
    assert (tree / ".lexiseg/work/b-2").is_dir()


def test_clean_removes_what_killed_processes_left(lexiseg, tree):
    write_text(tree / "outputs/lseg/.train.x.part/train/file", "half")
    write_json(tree / ".dvc/tmp/rwlock", {"read": {"a": [{"pid": 2**22 + 1, "cmd": "dvc repro"}]}, "write": {}})
    write_text(tree / ".lexiseg/work/a-1.lock", "")
    with FileLock(str(tree / ".lexiseg/work/b-2.lock")):
        lexiseg("clean")
        # A stage is running: what looks half-written may be its own.
        assert (tree / "outputs/lseg/.train.x.part").is_dir()
    assert read_json(tree / ".dvc/tmp/rwlock") == {"read": {}, "write": {}}
    lexiseg("clean")
    assert not (tree / "outputs/lseg/.train.x.part").exists()
    assert not list((tree / ".lexiseg/work").iterdir())


def test_plan_and_mend(lexiseg, tree):
    done = lexiseg("plan")
    assert done.out.splitlines()[1].startswith("prepare ")
    assert "cannot run" in done.out
    assert "data/world is missing" in done.out
    assert "nothing is computed" in done.out
    (step,) = json.loads(lexiseg("plan", "prepare", "--json").out)
    assert step["stage"] == "prepare"
    assert step["action"] == "blocked"
    lexiseg("plan", "lseg-trian").in_three_parts("StageError")
    assert lexiseg("mend").out == "nothing to mend\n"
    write_text(tree / "dvc.lock", "schema: '2.0'\nstages:\n  prepare:\n    cm")
    assert lexiseg("mend").out == "dvc.lock was half-written; it is removed\n"
    assert lexiseg("mend").out == "nothing to mend\n"


def test_doctor_ends_with_1_where_something_needs_attention(lexiseg, tree):
    done = lexiseg("doctor")
    assert done.code == 1
    lines = done.out.splitlines()
    place = lines.index("LOOK  data/world is missing")
    assert lines[place + 1].startswith("      to do: `dvc pull data/world`")
    assert "ok    params.yaml: profile embedded" in done.out


def test_an_ablation_is_printed_and_kept(lexiseg, tree, monkeypatch):
    row = {"method": "lseg", "variant": "as set", "split": "test", "mean": {"miou": 0.5}, "std": {"miou": None}}
    result = {"method": "lseg", "profile": "embedded", "data": "world", "seeds": [0, 1], "rows": [row]}
    calls: list[tuple] = []
    monkeypatch.setattr(
        "lexiseg.ablation.ablate", lambda root, method, **how: calls.append((root, method, how)) or result
    )
    (tree / "below").mkdir()
    monkeypatch.chdir(tree / "below")
    done = lexiseg(
        "ablate",
        "lseg",
        "--seeds",
        2,
        "--variant",
        "as set",
        "--variant",
        "from scratch",
        "--split",
        "val",
        "--out",
        "a.json",
    )
    assert "| test | lseg, as set | 50.0 |" in done.out
    expected = {"seeds": range(2), "table": None, "variants": ["as set", "from scratch"], "splits": ["val"]}
    assert calls == [(tree, "lseg", expected)]
    written = read_yaml(tree / "below/a.json")  # a path counts from where the command was given
    assert written.pop("made_with")["commit"] is None
    assert written == result
    assert "written to" in lexiseg("ablate", "lseg").out
    kept = read_yaml(tree / ".lexiseg/ablations/lseg-embedded.json")
    assert {key: kept[key] for key in result} == result


@pytest.mark.parametrize(
    ("labels", "found"), [("", "no labels"), (" , ", "empty"), ("sky, grass, sky", "more than once: sky")]
)
def test_labels_that_cannot_be_used(lexiseg, tmp_path, monkeypatch, labels, found):
    monkeypatch.chdir(tmp_path)
    text = lexiseg("predict", "photo.jpg", "--labels", labels, "--out", "out").in_three_parts("LabelError")
    assert found in text
    assert not (tmp_path / "out").exists()


def test_a_wrong_model_folder(lexiseg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["predict", "photo.jpg", "--labels", "sky", "--out", "out", "--model"]
    assert "has no model.json" in lexiseg(*arguments, tmp_path).in_three_parts("ModelError")
    for method in ("other", ["lseg"]):
        write_json(tmp_path / "model.json", {"method": method})
        text = lexiseg(*arguments, tmp_path).in_three_parts("ModelError")
        assert f"is of the method {method!r}" in text
        assert "lseg" in text


def test_data_is_added_through_dvc(lexiseg, tree, monkeypatch, tmp_path):
    monkeypatch.setattr("lexiseg.data.add.add_data", lambda *a, **k: added)
    calls: list = []
    monkeypatch.setattr("lexiseg.pipeline.changed_data", lambda root: {"data/own": "deleted", "data/new": "new"})
    monkeypatch.setattr("lexiseg.pipeline.run_dvc", lambda root, command: calls.append((root, command)))
    from lexiseg.data.add import Added

    added = Added(folder=tree / "data/own", splits={"train": 3}, classes=2, changed=True, commands=(("commit", "x"),))
    out = lexiseg("data", "add", "own", tmp_path, "--adapter", "folder").out
    assert calls == [(tree, ("commit", "x"))]
    assert "data/own: 2 classes; train 3" in out
    assert "data.name: own and data.adapter: folder" in out
    added = replace(added, classes=0)
    out = lexiseg("data", "add", "own", tmp_path, "--adapter", "folder").out
    assert "data/own: no classes, photographs without labels; train 3" in out


@pytest.mark.parametrize("how", ["deleted", "modified", "never fetched"])
def test_no_data_is_added_while_other_data_is_not_as_recorded(lexiseg, micro_tree, monkeypatch, how):
    """dvc would record all of data.dvc, or fail halfway where something of it is missing, as in a fresh clone."""
    monkeypatch.chdir(micro_tree)
    write_folder(micro_tree.parent / "raw")
    if how == "modified":
        write_text(micro_tree / "data/world/more.txt", "x")
    else:
        shutil.rmtree(micro_tree / "data/world")
    if how == "never fetched":
        shutil.rmtree(micro_tree / ".dvc/cache")
    before = (micro_tree / "data.dvc").read_text(), (micro_tree / "data/.gitignore").read_text()
    text = lexiseg("data", "add", "own", "../raw", "--adapter", "folder").in_three_parts("DataError")
    assert f"data/world is {'modified' if how == 'modified' else 'deleted'}" in text
    assert "`dvc pull data/world`" in text
    assert not (micro_tree / "data/own").exists()
    assert ((micro_tree / "data.dvc").read_text(), (micro_tree / "data/.gitignore").read_text()) == before


def test_a_copy_restarts_with_its_own_code(tmp_path, monkeypatch):
    root = make_small_graph(tmp_path / "copy")
    monkeypatch.setenv("PYTHONPATH", "/before")
    monkeypatch.delenv("LEXISEG_RESTARTED", raising=False)
    monkeypatch.setattr(sys, "argv", ["lexiseg", "stage", "first"])
    calls: list[tuple] = []
    monkeypatch.setattr(os, "execve", lambda *arguments: calls.append(arguments))
    cli._use_working_tree(root)
    ((program, arguments, variables),) = calls
    assert program == sys.executable
    assert arguments == [sys.executable, "-m", "lexiseg", "stage", "first"]
    assert variables["PYTHONPATH"] == f"{root / 'src'}{os.pathsep}/before"
    assert variables["LEXISEG_RESTARTED"] == str(root)


def test_it_restarts_only_once(tmp_path, monkeypatch):
    root = make_small_graph(tmp_path / "copy")
    monkeypatch.setenv("LEXISEG_RESTARTED", str(root))
    with pytest.raises(StageError) as caught:
        cli._use_working_tree(root)
    assert "also after a restart" in caught.value.found
    assert str(root / "src/lexiseg") in caught.value.allowed
    assert "PYTHONPATH" in caught.value.fix


def test_the_own_tree_needs_no_restart():
    cli._use_working_tree(SOURCE)


def test_the_command_line_starts_without_the_heavy_libraries():
    heavy = ("torch", "mlflow", "datasets", "great_expectations", "numpy", "dvc")
    code = f"import sys, lexiseg, lexiseg.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "lexiseg", "--help"], text=True, capture_output=True, check=True)
    assert "lexiseg" in done.stdout
    for command in ("stage", "predict", "report", "sync", "ablate", "doctor", "clean", "data", "weights", "profile"):
        assert f"  {command} " in done.stdout
