"""The stage type: a pure function, run under its fingerprint, published whole.

A stage is `run(settings, inputs, outputs)`. Its fingerprint covers the declared settings, the hashes of all
declared dependencies and the code among them. Work happens in `.lexiseg/work/<stage>-<fingerprint>/` under a
lock; the finished result stays there and is hard-linked into outputs/. A stage that starts and finds its
result finished only links it: DVC deletes outputs before it runs a stage, and may be killed at any time.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import lexiseg
from lexiseg.checkpoint import checkpoints_in
from lexiseg.errors import StageError
from lexiseg.pipeline import Node, hash_dependencies
from lexiseg.settings import View, read_yaml
from lexiseg.storage import atomic_path, hash_tree, read_json, sha256_of_json, write_json
from lexiseg.workspace import private_folder

RunFunction = Callable[[Any, Mapping[str, Path], Path], None]
FINISHED = "finished.json"


@dataclass(frozen=True)
class Job:
    """One run of a stage: what it is, and where its inputs are.

    Attributes:
        node: the stage in dvc.yaml.
        run: the stage function.
        settings: the whole settings block; the function sees the declared part of it.
        values: the plain values the settings were made of, as params.yaml (and so dvc.lock) has them.
        inputs: paths by the names of `Node.inputs`.
        identify: gives the identity of every dependency, code included; called at start and before publishing.
        private: the folder `.lexiseg`.
        reread: gives the plain values as they are before publishing; None where they cannot have changed.
    """

    node: Node
    run: RunFunction
    settings: Any
    values: Mapping[str, Any]
    inputs: Mapping[str, Path]
    identify: Callable[[], Mapping[str, str]]
    private: Path
    reread: Callable[[], Mapping[str, Any]] | None = None

    def params(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What the stage declares of plain values."""
        return {key: value_at(values, key) for key in self.node.params}


def fingerprint_of(name: str, *, params: Mapping[str, Any], deps: Mapping[str, str]) -> str:
    """A run's identity; the thread count is the parameter `threads` of the stages that compute with it."""
    return sha256_of_json({"stage": name, "params": dict(params), "deps": dict(deps)})


def job_of(root: Path, node: Node, run: RunFunction, *, settings: Any, values: Mapping[str, Any]) -> Job:
    """The job of a stage in the working tree, as dvc runs it."""
    return Job(
        node=node,
        run=run,
        settings=settings,
        values=values,
        inputs={name: root / path for name, path in node.inputs.items()},
        identify=lambda: hash_dependencies(root, node.deps),
        private=private_folder(root),
        reread=lambda: read_yaml(root / "params.yaml"),
    )


def run_in_working_tree(root: Path, job: Job) -> None:
    """Run a job (or find it finished) and publish its outs at their places in the working tree.

    All outs are made beside their places before the first is put there, so a full disk changes none of them.

    Raises:
        StageError: the package is not the one of the working tree, or a dependency changed meanwhile.
    """
    check_package(root)

    def publish(finished: Path) -> None:
        with ExitStack() as places:
            for out in job.node.outs:
                place = places.enter_context(atomic_path(root / out))
                _link(finished / os.path.relpath(out, job.node.folder), place)

    execute(job, publish=publish)


def execute(job: Job, *, publish: Callable[[Path], None] | None = None) -> Path:
    """Run a job unless its result is already there.

    Args:
        job: what to run.
        publish: called with the folder of finished outputs while nobody can clean it away.

    Returns:
        The folder of finished outputs, below the work folder of its fingerprint.

    Raises:
        StageError: a dependency changed while the stage ran, or a declared output is missing.
    """
    params, deps = job.params(job.values), dict(job.identify())
    fingerprint = fingerprint_of(job.node.name, params=params, deps=deps)
    work = job.private / "work" / f"{job.node.name.replace('@', '-')}-{fingerprint[:20]}"
    work.mkdir(parents=True, exist_ok=True)
    outputs = work / "outputs"
    with _waiting_lock(work.parent / f"{work.name}.lock", job.node.name):
        work.mkdir(parents=True, exist_ok=True)  # a clean may have run while we waited
        if _is_finished(work):
            _say(f"{job.node.name}: finished before, linking the result")
            if publish:
                publish(outputs)
            return outputs
        shutil.rmtree(outputs, ignore_errors=True)
        outputs.mkdir()
        with checkpoints_in(work / "checkpoints"):
            job.run(View(job.settings, job.node.params), job.inputs, outputs)
        declared = {Path(os.path.relpath(out, job.node.folder)) for out in job.node.outs}
        lacking = [str(path) for path in declared if not (outputs / path).exists()]
        if lacking:
            raise StageError(
                found=f"{job.node.name} did not write {', '.join(lacking)}",
                allowed="every out that dvc.yaml declares",
                fix="correct the stage function or its entry in dvc.yaml",
            )
        # DVC hashes dependencies and parameters after the command: without this check it would record the
        # new hash of a file edited meanwhile for a result that the old one gave.
        now = job.identify()
        changed = [dep for dep in deps if now[dep] != deps[dep]]
        # Data and code may have been read before and after the change (stages import inside functions and in
        # worker processes): such a result has no fingerprint. Parameters were read once, at the start.
        kept = not changed
        if kept:
            write_json(work / FINISHED, {"fingerprint": fingerprint, "files": hash_tree(outputs)})
            shutil.rmtree(work / "checkpoints", ignore_errors=True)
        if job.reread:
            later = job.params(job.reread())
            changed += [f"`{key}` of params.yaml" for key in params if later[key] != params[key]]
        if changed:
            raise StageError(
                found=f"{', '.join(changed)} changed while {job.node.name} ran",
                allowed="data, code and parameters that stay as they are until the stage ends",
                fix="run `dvc repro` again"
                + (" (the result is kept: after undoing the change, it is only linked)" if kept else ""),
            )
        if publish:
            publish(outputs)
    return outputs


def check_package(root: Path) -> None:
    """Refuse to run a working tree's stage with the code of another one.

    Raises:
        StageError: the imported package is not `root/src/lexiseg`.
    """
    package = Path(lexiseg.__file__).resolve().parent
    if package != (root / "src" / "lexiseg").resolve():
        raise StageError(
            found=f"the imported lexiseg package is {package}",
            allowed=f"the one of this working tree, {root / 'src' / 'lexiseg'}",
            fix=f"set PYTHONPATH={root / 'src'}, or install this tree with `pip install -e .`",
        )


def clean(private: Path) -> tuple[int, int]:
    """Remove all work folders that no running stage holds.

    Returns:
        The number of folders removed and of bytes freed (files linked elsewhere count too).
    """
    removed = freed = 0
    for folder in sorted(path for path in (private / "work").glob("*") if path.is_dir()):
        try:
            # The lock's file stays: removing it would let two processes hold locks of one name.
            with FileLock(f"{folder}.lock", timeout=0):
                freed += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
        except Timeout:
            _say(f"kept {folder.name}: a stage is running there")
    return removed, freed


def _is_finished(work: Path) -> bool:
    if not (work / FINISHED).is_file():
        return False
    if hash_tree(work / "outputs") == read_json(work / FINISHED)["files"]:
        return True
    _say(f"{work.name}: the finished result was changed on disk, running again")
    (work / FINISHED).unlink()
    return False


def _link(source: Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir()
        for path in sorted(source.iterdir()):
            _link(path, target / path.name)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)  # another file system, or one without hard links


def _waiting_lock(path: Path, name: str) -> FileLock:
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
        lock.release()
    except Timeout:
        _say(f"{name}: the same work is going on in another process, waiting for it")
    return lock


def value_at(values: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key in nested plain values; None where there is none."""
    value: Any = values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
