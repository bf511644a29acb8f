"""The stage type: a pure function, run under its fingerprint, published whole.

A stage is `run(settings, inputs, outputs)`. Its fingerprint covers the declared settings, the hashes of all
declared dependencies and the code among them. Work happens in `.lexiseg/work/<stage>-<fingerprint>/` under a
lock; the finished result stays there and is hard-linked into outputs/. A stage that starts and finds its
result finished only links it: DVC deletes outputs before it runs a stage, and may be killed at any time.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import lexiseg
from lexiseg.checkpoint import checkpoints_in
from lexiseg.errors import ChangedError, StageError
from lexiseg.history import Took, peak_memory, remember
from lexiseg.pipeline import Node, hash_dependencies
from lexiseg.ranks import Rank, run_together
from lexiseg.settings import View, read_yaml
from lexiseg.storage import atomic_path, hash_tree, link_file, read_json, sha256_of_json, write_json
from lexiseg.workspace import private_folder

RunFunction = Callable[[Any, Mapping[str, Path], Path], None]
FINISHED = "finished.json"
DEVICES = "devices"  # the parameter of stages that several processes share


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
        freeze: reads code of the stage once and for all, and gives the dependencies that it read: what becomes of
            their files while the stage runs does not change what it does. None: nothing can be said of any.
        started: when the stage's process began, in seconds since the epoch; None: what the run took is not kept.
    """

    node: Node
    run: RunFunction
    settings: Any
    values: Mapping[str, Any]
    inputs: Mapping[str, Path]
    identify: Callable[[], Mapping[str, str]]
    private: Path
    reread: Callable[[], Mapping[str, Any]] | None = None
    freeze: Callable[[], frozenset[str]] | None = None
    started: float | None = None

    def params(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What the stage declares of plain values."""
        return {key: value_at(values, key) for key in self.node.params}


def fingerprint_of(name: str, *, params: Mapping[str, Any], deps: Mapping[str, str]) -> str:
    """A run's identity; the thread count is the parameter `threads` of the stages that compute with it."""
    return sha256_of_json({"stage": name, "params": dict(params), "deps": dict(deps)})


def job_of(
    root: Path,
    node: Node,
    run: RunFunction,
    *,
    settings: Any,
    values: Mapping[str, Any],
    started: float | None = None,
) -> Job:
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
        freeze=lambda: import_code(root, node),
        started=started,
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


def execute(
    job: Job, *, publish: Callable[[Path], None] | None = None, began: Callable[[Path], None] | None = None
) -> Path:
    """Run a job unless its result is already there.

    Args:
        job: what to run.
        publish: called with the folder of finished outputs while nobody can clean it away.
        began: called with the work folder before anything is in it.

    Returns:
        The folder of finished outputs, below the work folder of its fingerprint.

    Raises:
        StageError: a dependency changed while the stage ran, or a declared output is missing.
    """
    params, deps = job.params(job.values), dict(job.identify())
    fingerprint = fingerprint_of(job.node.name, params=params, deps=deps)
    work = work_folder(job.private, job.node.name, fingerprint)
    if began:
        began(work)
    work.mkdir(parents=True, exist_ok=True)
    outputs = work / "outputs"
    with _waiting_lock(work.parent / f"{work.name}.lock", job.node.name):
        work.mkdir(parents=True, exist_ok=True)  # a clean may have run while we waited
        if _is_finished(work):
            # Another process may have worked for hours while this one waited for the lock.
            _refuse_changes(job, [*_changed(job, deps, among=deps), *_changed_params(job, params)], kept=True)
            _say(f"{job.node.name}: finished before, linking the result")
            if publish:
                publish(outputs)
            return outputs
        shutil.rmtree(outputs, ignore_errors=True)
        outputs.mkdir()
        frozen = job.freeze() if job.freeze else frozenset()
        if frozen:  # files may have changed between their hash and their import
            _refuse_changes(job, _changed(job, deps, among=frozen), kept=False)
        whole = not any((work / "checkpoints").glob("*.ckpt"))
        with checkpoints_in(work / "checkpoints"):
            _run(job, work, outputs)
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
        changed = _changed(job, deps, among=deps)
        # What was read both before and after the change gave a result without a fingerprint. Parameters were read
        # once, at the start, and so was frozen code.
        kept = frozen.issuperset(changed)
        if kept:
            write_json(work / FINISHED, {"fingerprint": fingerprint, "files": hash_tree(outputs)})
            if job.started is not None:
                remember(job.private, _took(job, params=params, outputs=outputs, whole=whole))
        # Where the result is not kept, its checkpoints must not bring it back either.
        shutil.rmtree(work / "checkpoints", ignore_errors=True)
        _refuse_changes(job, [*changed, *_changed_params(job, params)], kept=kept)
        if publish:
            publish(outputs)
    return outputs


def _run(job: Job, work: Path, outputs: Path) -> None:
    def here() -> None:
        job.run(View(job.settings, job.node.params), job.inputs, outputs)

    devices = int(value_at(job.values, DEVICES) or 1) if DEVICES in job.node.params else 1
    if devices == 1:
        return here()
    rank = Rank(
        stage=job.node.name,
        values=dict(job.values),
        declared=list(job.node.params),
        inputs={name: str(path.resolve()) for name, path in job.inputs.items()},
        checkpoints=str((work / "checkpoints").resolve()),
        outputs=str(outputs.resolve()),
    )
    return run_together(rank, devices, here=here, threads=int(value_at(job.values, "threads") or 1))


def import_code(root: Path, node: Node) -> frozenset[str]:
    """Import all modules of a stage's code, so that an edit of their files cannot reach this process any more.

    Returns:
        The dependencies of which that is true. It is not of folders that hold other files than modules, which are
        read when they are needed; and of none where the stage starts processes that import anew.
    """
    for dep in node.code:
        files = sorted((root / dep).rglob("*.py")) if (root / dep).is_dir() else [root / dep]
        for file in files:
            parts = file.relative_to(root / "src").with_suffix("").parts
            importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    if "data.workers" in node.params or multiprocessing.get_start_method() != "fork":
        return frozenset()
    return frozenset(dep for dep in node.code if not _other_files(root / dep))


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


def clean(private: Path, *, outputs: Path | None = None) -> tuple[int, int]:
    """Remove all work folders that no running stage holds.

    Args:
        private: the folder `.lexiseg`.
        outputs: the folder of published outputs; where no stage is running, what killed ones left half-published there
            is removed too.

    Returns:
        The number of folders removed and of bytes freed (files linked elsewhere count too).
    """
    removed = freed = 0
    running = False
    work = private / "work"
    for name in sorted({path.name.removesuffix(".lock") for path in work.glob("*")}):
        there = (work / name).is_dir()
        size = remove_work(private, name)
        if size is None:
            running = True
            _say(f"kept {name}: a stage is running there")
        else:
            removed, freed = removed + there, freed + size
    if outputs is not None and not running:
        for part in outputs.rglob(".*.part"):
            shutil.rmtree(part, ignore_errors=True)
    return removed, freed


def remove_work(private: Path, name: str) -> int | None:
    """Remove one work folder; returns its bytes, or None where a running stage holds it."""
    folder, lock = private / "work" / name, private / "work" / f"{name}.lock"
    size = 0
    try:
        with FileLock(str(lock), timeout=0):
            if folder.is_dir():
                size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                shutil.rmtree(folder, ignore_errors=True)
            # Whoever waits for it finds its file gone, and locks a new one (filelock looks).
            lock.unlink(missing_ok=True)
    except Timeout:
        return None
    return size


def _other_files(path: Path) -> list[Path]:
    # Pages beside the code are no dependency (.dvcignore).
    return [file for file in path.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc", ".md")]


def _changed(job: Job, deps: Mapping[str, str], *, among: Container[str]) -> list[str]:
    now = job.identify()
    return [dep for dep in deps if dep in among and now[dep] != deps[dep]]


def _changed_params(job: Job, params: Mapping[str, Any]) -> list[str]:
    now = job.params(job.reread()) if job.reread else params
    return [f"`{key}` of params.yaml" for key in params if now[key] != params[key]]


def _refuse_changes(job: Job, changed: Sequence[str], *, kept: bool) -> None:
    if changed:
        raise ChangedError(
            found=f"{', '.join(changed)} changed while {job.node.name} ran",
            allowed="data, code and parameters that stay as they are until the stage ends",
            fix="run `dvc repro` again"
            + (" (the result is kept: after undoing the change, it is only linked)" if kept else ""),
        )


def _took(job: Job, *, params: dict[str, Any], outputs: Path, whole: bool) -> Took:
    assert job.started is not None
    return Took(
        stage=job.node.name,
        params=params,
        seconds=round(time.time() - job.started, 2),
        memory=peak_memory(),
        disk=sum(path.stat().st_size for path in outputs.rglob("*") if path.is_file()),
        whole=whole,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def work_folder(private: Path, name: str, fingerprint: str) -> Path:
    """Where a stage works under a fingerprint."""
    return private / "work" / f"{name.replace('@', '-')}-{fingerprint[:20]}"


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
    link_file(source, target)


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
