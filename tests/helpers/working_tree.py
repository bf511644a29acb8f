"""A working tree of its own, so small that the whole graph runs in seconds: for journeys and for the docs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from ruamel.yaml import YAML

from helpers.micro import CAMVID_NAMES, save

SOURCE = Path(__file__).parents[2]

# What makes the embedded profile small. The names are those of params.yaml.
MICRO: dict[str, Any] = {
    "threads": 1,
    "data": {"workers": 1},
    "encode": {
        "pretrain": {"steps": 4, "warmup": 1, "iconic_batch": 8, "scene_batch": 8},
        "self_supervised": {"steps": 3, "warmup": 1, "batch": 4, "pictures": 8, "layers": 1, "prototypes": 8},
    },
    "evaluate": {"pictures": 1},
    "baseline": {"linear": {"steps": 3, "batch": 4}},
    "lseg": {"train": {"steps": 3, "warmup": 1, "batch": 4}},
    "stego": {
        "features": {"pictures": 16},
        "loss": {"points": 4, "negatives": 2},
        "model": {"dim": 8},
        "train": {"steps": 3, "batch": 4},
        "probe": {"tokens": 500, "restarts": 1, "iterations": 5, "steps": 3, "batch": 4},
    },
    "tcl": {"train": {"steps": 3, "warmup": 1, "batch": 4}},
}
MICRO_CAMVID: dict[str, Any] = {
    "baseline": {"linear": {"steps": 2, "batch": 2}},
    "lseg": {"model": {"features": 16}, "train": {"steps": 2, "batch": 2, "crop": [64, 64]}},
}
MICRO_COCO: dict[str, Any] = {
    **MICRO_CAMVID,
    "baseline": {"linear": {"steps": 2, "batch": 2, "crop": [64, 64]}},
}
COUNTS = {"train": 16, "iconic": 8}

# Runs every stage in one process, which saves the start of a process with torch for each.
_ALL_STAGES = """
from pathlib import Path
from lexiseg.pipeline import read_graph
from lexiseg.stage import job_of, run_in_working_tree
from lexiseg.stages.registry import stage_function
from lexiseg.stages.settings import parse_settings, read_values
root = Path.cwd()
values = read_values(root)
settings = parse_settings(values)
for name, node in read_graph(root).items():
    run_in_working_tree(root, job_of(root, node, stage_function(name), settings=settings, values=values))
"""


def environment(root: Path) -> dict[str, str]:
    """The environment of commands in a working tree: its own package, the tools of this Python, nothing of ours."""
    ours = ("LEXISEG", "MLFLOW", "PREFECT", "GIT_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {
        **kept,
        "HOME": str(root.parent),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(root / "src"),
        "OMP_NUM_THREADS": "1",
        "GIT_CONFIG_GLOBAL": str(root.parent / "gitconfig"),
        **{f"GIT_{who}_{what}": "tests@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }


def run(root: Path, *command: str, timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
    """Run a command in a working tree; a failure shows what it printed."""
    done = subprocess.run(command, cwd=root, env=environment(root), text=True, capture_output=True, timeout=timeout)
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def make_tree(root: Path) -> Path:
    """A git repository of what is in this working tree (uncommitted changes too), its data pulled."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=SOURCE,
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (SOURCE / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(SOURCE / name, root / name)
    shutil.copy2(SOURCE / "profiles/embedded.yaml", root / "params.yaml")  # another profile may be in use here
    run(root, "git", "init", "--quiet")
    run(root, "dvc", "pull", "--quiet", "--remote", "embedded", "data/world")
    take_as_installed(root)
    return root


def make_micro_tree(root: Path) -> Path:
    """The same made small, and committed."""
    make_tree(root)
    recipe = root / "data/world/world.yaml"
    splits = YAML(typ="safe").load(recipe)["splits"]
    change(recipe, {"splits": {name: {"count": COUNTS.get(name, 4)} for name in splits}})
    for name in ("params.yaml", "profiles/embedded.yaml"):
        change(root / name, MICRO)
    change(root / "profiles/camvid.yaml", MICRO_CAMVID)
    change(root / "profiles/coco.yaml", MICRO_COCO)
    run(root, "dvc", "commit", "--quiet", "--force", "data.dvc")
    run(root, "git", "add", "--all")
    run(root, "git", "commit", "--quiet", "--message", "a micro working tree")
    return root


def finished_micro_tree(root: Path) -> Path:
    """The same after a `dvc repro`. Made once, also where several processes ask for it at the same time."""
    with FileLock(root.with_suffix(".lock")):
        if not (root / "outputs/report/results.json").is_file():
            shutil.rmtree(root, ignore_errors=True)
            make_micro_tree(root)
            run(root, sys.executable, "-c", _ALL_STAGES)
            run(root, "dvc", "commit", "--quiet", "--force")
            run(root, "git", "add", "--all")
            run(root, "git", "commit", "--quiet", "--message", "the graph has run")
    return root


def take_as_installed(root: Path) -> None:
    """Tell make that .venv is as it should be: its targets then use the tools of this Python."""
    for name in ("pyproject.toml", "constraints.txt", ".venv/installed"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def copy_of(root: Path, target: Path, *, linked: bool = False) -> Path:
    """A copy to change at will. (MLflow's store remembers its place: sync in the copy, not before.)

    Args:
        root: what is copied.
        target: does not exist yet.
        linked: by hard links, in no time: for tests that replace files of it and write into none.
    """

    def link(source: str, place: str) -> None:
        # A database is written in its place, with files beside it that only one path leads to.
        (shutil.copy2 if source.endswith(".db") else os.link)(source, place)

    shutil.copytree(root, target, symlinks=True, copy_function=link if linked else shutil.copy2)
    return target


def write_street(folder: Path) -> Path:
    """A data set in CamVid's layout whose pictures are large enough for a real backbone: 4 train, 2 val, 2 test."""
    noise = np.random.default_rng(0)
    lines = ["# id name R G B", *(f"{number} {name} 0 0 {number}" for number, name in enumerate(CAMVID_NAMES))]
    folder.mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for split, count in {"train": 4, "val": 2, "test": 2}.items():
        names = [f"{split}_{index}.png" for index in range(count)]
        for name in names:
            save(folder / split / name, noise.integers(0, 256, (96, 128, 3), dtype=np.uint8))
            save(folder / f"{split}annot" / name, noise.integers(0, 12, (96, 128), dtype=np.uint8))
        (folder / f"{split}.txt").write_text("".join(f"{split}/{name} {split}annot/{name}\n" for name in names))
    return folder


def change(path: Path, changes: dict[str, Any]) -> None:
    """Merge values into a YAML file; comments stay."""
    editor = YAML()
    editor.width = 200
    editor.indent(mapping=2, sequence=4, offset=2)  # as the files have it
    values = editor.load(path)
    _merge(values, changes)
    stream = StringIO()
    editor.dump(values, stream)
    path.unlink()  # it may be a link into DVC's cache
    path.write_text(stream.getvalue(), encoding="utf-8")


def _merge(values: Any, changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict):
            _merge(values.setdefault(key, {}), value)
        else:
            values[key] = value
