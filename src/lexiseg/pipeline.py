"""The graph in dvc.yaml, read through DVC itself, and the one helper for all calls of dvc."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from lexiseg.errors import StageError
from lexiseg.workspace import private_folder

OUTPUTS = "outputs"
_BUSY = ("Unable to acquire lock", "is busy, it is being blocked by")


@dataclass(frozen=True)
class Node:
    """One stage of dvc.yaml, with every `${...}` filled in.

    Attributes:
        name: as DVC addresses it, e.g. "lseg-train" or "baseline-predict@linear".
        cmd: the command of the stage.
        deps: paths relative to the working tree: data, upstream outputs and code.
        params: dotted keys of params.yaml that the stage declares.
        outs: paths relative to the working tree, all below one folder of outputs/.
    """

    name: str
    cmd: str
    deps: tuple[str, ...]
    params: tuple[str, ...]
    outs: tuple[str, ...]

    @property
    def code(self) -> tuple[str, ...]:
        """The dependencies that are code of this package."""
        return tuple(dep for dep in self.deps if dep.startswith("src/"))

    @property
    def inputs(self) -> dict[str, str]:
        """The other dependencies, keyed as a stage function sees them: "data", "prepare", "lseg/train", …"""
        return {
            "data" if dep.startswith("data/") else dep.removeprefix(f"{OUTPUTS}/"): dep
            for dep in self.deps
            if dep not in self.code
        }

    @property
    def folder(self) -> str:
        """The folder of outputs/ that the stage owns: its only out, or what its outs have in common."""
        if len(self.outs) == 1 and "." not in Path(self.outs[0]).name:
            return self.outs[0]
        parents = {Path(out).parent.as_posix() for out in self.outs}
        if len(parents) != 1:
            raise StageError(
                found=f"stage {self.name} has outs in {', '.join(sorted(parents))}",
                allowed="outs that lie in one folder, which the stage owns",
                fix="correct the stage in dvc.yaml",
            )
        return parents.pop()


def read_graph(root: Path) -> dict[str, Node]:
    """All stages of dvc.yaml in an order in which each comes after what it needs.

    Raises:
        StageError: dvc.yaml or params.yaml cannot be read by DVC.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

    try:
        index = Repo(str(root)).index
        index.check_graph()  # no circles, no file that two stages write
        stages = [stage for stage in index.stages if isinstance(stage, PipelineStage)]
    except DvcException as error:
        raise StageError(
            found=f"dvc cannot read the graph: {error}",
            allowed="a valid dvc.yaml and params.yaml",
            fix="correct the file that is named; `dvc stage list` shows the same error",
        ) from error
    nodes: dict[str, Node] = {}
    for stage in stages:
        params = [key for dep in stage.deps for key in (getattr(dep, "params", None) or ())]
        deps = [dep.def_path for dep in stage.deps if getattr(dep, "params", None) is None]
        outs = [out.def_path for out in stage.outs]
        # `stage.addressing` would depend on the folder the process is in.
        name = str(stage.name)
        nodes[name] = Node(
            name=name,
            cmd=str(stage.cmd),
            deps=tuple(sorted(deps)),
            params=tuple(sorted(params)),
            outs=tuple(sorted(outs)),
        )
    return _sorted(nodes)


def node_of(nodes: Mapping[str, Node], name: str) -> Node:
    """One stage of the graph.

    Raises:
        StageError: there is no such stage.
    """
    if name not in nodes:
        raise StageError(
            found=f"no stage `{name}` in dvc.yaml",
            allowed=", ".join(nodes),
            fix="`dvc stage list` shows the stages",
        )
    return nodes[name]


def upstream_of(nodes: Mapping[str, Node], name: str, *, direct: bool = False) -> list[str]:
    """The stages that a stage needs, in the order of the graph.

    Args:
        nodes: the graph.
        name: the stage.
        direct: only those whose outputs it reads itself.
    """

    def before(node: Node) -> set[str]:
        return {
            other.name
            for other in nodes.values()
            if other.name != node.name and any(within(dep, out) for dep in node.deps for out in other.outs)
        }

    found, waiting = set(), before(node_of(nodes, name))
    while waiting:
        found |= waiting
        waiting = set() if direct else set.union(*(before(nodes[one]) for one in waiting)) - found
    return [other for other in nodes if other in found]


def remove_orphans(root: Path, nodes: Mapping[str, Node], node: Node) -> list[str]:
    """Remove what no stage makes any more from the folders of several stages that `node` reads whole.

    `report` reads outputs/baselines. The results of a baseline that params.yaml no longer names would stay there,
    and be part of the hash that DVC records: in a clone, which never had them, the report would count as changed.

    Returns:
        The removed paths, relative to the working tree.
    """
    outs = [out for other in nodes.values() for out in other.outs]
    removed = []
    for dep in node.deps:
        if dep.startswith(f"{OUTPUTS}/") and any(out.startswith(f"{dep}/") for out in outs):
            removed += _remove_unrelated(root, dep, outs)
    return removed


def _remove_unrelated(root: Path, folder: str, outs: Sequence[str]) -> list[str]:
    removed = []
    for path in sorted((root / folder).glob("*")):
        name = f"{folder}/{path.name}"
        if any(within(name, out) for out in outs):
            if not any(name == out for out in outs) and path.is_dir():
                removed += _remove_unrelated(root, name, outs)
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        removed.append(name)
    return removed


def hash_dependencies(root: Path, paths: Sequence[str]) -> dict[str, str]:
    """The hashes DVC itself gives to files and folders (it remembers those of unchanged files).

    Raises:
        StageError: one of them is missing.
    """
    from dvc.output import Output
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

    repo = Repo(str(root))
    stage = PipelineStage(repo, path=str(root / "dvc.yaml"), wdir=str(root), name="lexiseg-hash")
    result = {}
    for path in paths:
        if not (root / path).exists():
            raise StageError(
                found=f"the dependency {path} does not exist",
                allowed="data and upstream outputs in place",
                fix=_remedy(path),
            )
        result[path] = str(Output(stage, path, cache=False).get_hash().value)
    return result


def _remedy(path: str) -> str:
    if path.startswith("data/"):
        name = path.removeprefix("data/")
        return (
            f"`dvc pull {path}` where a remote has it, or `lexiseg data add {name} PATH --adapter …` with your own copy"
        )
    return "`dvc repro` makes it" if path.startswith(f"{OUTPUTS}/") else f"`git checkout {path}` brings it back"


def read_lock(root: Path) -> dict[str, Any]:
    """The stages of dvc.lock: what DVC recorded when each last ran; empty without a dvc.lock."""
    from lexiseg.settings import read_yaml

    path = root / "dvc.lock"
    return (read_yaml(path) or {}).get("stages", {}) if path.is_file() else {}


def cached_outs(
    root: Path, name: str, deps: Mapping[str, str], *, recorded: Mapping[str, Any] | None = None
) -> dict[str, str] | None:
    """The hashes of the outs that DVC would take from its cache instead of running a stage.

    Args:
        root: the working tree, with the present params.yaml.
        name: the stage.
        deps: the hash of every dependency as it will be then.
        recorded: the stage's entry in dvc.lock, where that is of these dependencies and of the present parameters.

    Returns:
        Path -> hash; None where the cache lacks them.
    """
    from dvc.repo import Repo
    from dvc.stage.cache import _get_cache_hash
    from dvc.stage.loader import StageLoader
    from dvc.stage.serialize import to_single_stage_lockfile
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.meta import Meta

    # DVC asks its cache about the files that are there now, never about those that will be: hence its inner functions.
    repo = Repo(str(root))
    stage = next(stage for stage in repo.index.stages if getattr(stage, "name", None) == name)
    for dep in stage.deps:
        if getattr(dep, "params", None) is None:
            dep.hash_info, dep.meta = HashInfo("md5", deps[dep.def_path]), Meta()  # the old hash is in both
        else:
            dep.save()
    key = _get_cache_hash(to_single_stage_lockfile(stage), key=True)
    folder = Path(repo.stage_cache._get_cache_dir(key))
    newest = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime) if folder.is_dir() else []
    entry: Any = recorded or (repo.stage_cache._load_cache(key, newest[-1].name) if newest else None)
    if entry is None:
        return None
    StageLoader.fill_from_lock(stage, entry)
    if not stage.outs_cached():
        return None
    return recorded_hashes(entry, "outs")


def recorded_hashes(entry: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Path -> hash of the "deps" or "outs" of a stage's entry in dvc.lock."""
    return {item["path"]: str(item[item.get("hash", "md5")]) for item in entry.get(kind) or ()}


def run_dvc(root: Path, arguments: Sequence[str], *, patience: float = 600.0, capture: bool = False) -> str:
    """Run `dvc` in `root`.

    Calls are serialised per working tree, and repeated while another dvc holds its lock (it gives up after
    three seconds by itself, possibly after its stage has run).

    Args:
        root: the working tree.
        arguments: of dvc, e.g. ["repro", "report"].
        patience: seconds to go on trying while dvc is busy.
        capture: return the output instead of passing it through.

    Raises:
        StageError: dvc failed, or was busy for too long.
    """
    lock = private_folder(root) / "dvc.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dvc", *arguments]
    deadline = time.monotonic() + patience
    said = False
    while True:
        with FileLock(str(lock)):  # not while waiting: others may have other files in mind
            done = subprocess.run(
                command, cwd=root, text=True, stdout=subprocess.PIPE if capture else None, stderr=subprocess.PIPE
            )
        if done.returncode == 0:
            return done.stdout or ""
        busy = is_busy(done.stderr.splitlines())
        if not busy or time.monotonic() > deadline:
            raise StageError(
                found=f"`dvc {' '.join(arguments)}` failed: {done.stderr.strip() or done.returncode}",
                allowed="a dvc command that ends without an error",
                fix="wait for the other dvc to end, then repeat" if busy else "see the message of dvc above",
            )
        if not said:
            print(f"`dvc {' '.join(arguments)}` waits for another dvc", file=sys.stderr, flush=True)
        said = True
        time.sleep(1.0)


def is_busy(lines: Sequence[str]) -> bool:
    """Whether dvc ended because another dvc held a lock; its errors begin with ERROR, unlike those of stages."""
    return any(line.startswith("ERROR: ") and word in line for line in lines for word in _BUSY)


def changed_data(root: Path, *, patience: float = 600.0) -> dict[str, str]:
    """The data sets that are not as data.dvc records them: path -> "deleted", "modified", "new" or "not in cache"."""
    if not (root / "data.dvc").is_file():
        return {}
    status = json.loads(run_dvc(root, ["status", "data.dvc", "--json"], capture=True, patience=patience))
    changed = {path: how for entry in status.get("data.dvc", []) for path, how in entry["changed outs"].items()}
    # What is in no cache either DVC calls "not in cache", whether or not it is in its place.
    return {path: how if (root / path).exists() else "deleted" for path, how in changed.items()}


def _sorted(nodes: Mapping[str, Node]) -> dict[str, Node]:
    result: dict[str, Node] = {}

    def add(node: Node) -> None:
        if node.name in result:
            return
        for other in upstream_of(nodes, node.name, direct=True):
            add(nodes[other])
        result[node.name] = node

    for name in sorted(nodes):
        add(nodes[name])
    return result


def within(path: str, out: str) -> bool:
    """Whether one of two paths is the other or lies in it."""
    return path == out or path.startswith(f"{out}/") or out.startswith(f"{path}/")
