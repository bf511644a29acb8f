"""The graph of dvc.yaml as a Prefect flow: one task per stage, for one method or for all.

    python flows/reproduce.py --method lseg

runs it without any server; `prefect.yaml` has its deployments. DVC goes on deciding what is stale, so a flow run that
is repeated, or retried after a crash, passes over what is finished.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import psutil

import lexiseg.environment  # noqa: F401  first: it turns telemetry of the libraries off

from prefect import flow, get_run_logger, task  # isort: skip
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, as_completed
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import exponential_backoff
from pydantic import Field

from lexiseg.copies import working_copy
from lexiseg.driver import StoppedError, allow, reproduce_stage, run_group, stop_all
from lexiseg.errors import DataError, LexisegError, ModelError, SettingsError, StageError, StorageError
from lexiseg.history import recall
from lexiseg.mend import mend
from lexiseg.pipeline import Node, changed_data, read_graph, run_dvc, upstream_of
from lexiseg.reporting import read_report
from lexiseg.stages.settings import parse_settings, read_values
from lexiseg.storage import read_json
from lexiseg.tracking.identity import is_own, method_of
from lexiseg.workspace import private_folder, require_root

ALL = "all"
MOST_STARTS = 5  # a flow run that crashed so often is not started again
RETRIES = 2


def worth_repeating(task: Any, task_run: Any, state: Any) -> bool:
    """Whether a stage is tried again: not where only a person can help, nor where it was stopped on purpose."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, StoppedError):
        return error.expired
    return not isinstance(error, SettingsError | DataError | ModelError | StorageError)


@task(
    name="stage",
    task_run_name="{name}",
    retries=RETRIES,
    retry_delay_seconds=exponential_backoff(backoff_factor=10),
    retry_jitter_factor=0.5,
    retry_condition_fn=worth_repeating,
    cache_policy=NO_CACHE,
)
def run_stage(name: str, root: Path, timeout: float | None) -> str:
    """One stage of the graph, through DVC; its lines become the task's log.

    Returns:
        "ran", "linked", "restored" or "unchanged".
    """
    log = get_run_logger()
    outcome = reproduce_stage(root, name, say=log.info, timeout=timeout)
    log.info("%s: %s", name, outcome)
    publish_artifacts(name, root)
    return outcome


@task(
    name="publish",
    retries=RETRIES,
    retry_delay_seconds=exponential_backoff(backoff_factor=10),
    retry_jitter_factor=0.5,
    cache_policy=NO_CACHE,
)
def publish(root: Path) -> None:
    """Publish to MLflow what it lacks. Results are safe in outputs/ whether or not this succeeds."""
    code, lines = run_group([sys.executable, "-m", "lexiseg", "sync"], root, say=get_run_logger().info, timeout=1800)
    if code:
        raise StageError(
            found=f"`lexiseg sync` failed: {lines[-1] if lines else code}",
            allowed="an MLflow that can be reached",
            fix="start it, then retry this flow run, or run `lexiseg sync`",
        )


@flow(  # pyright: ignore[reportCallIssue]  the type of a runner's futures is invariant in Prefect's annotations
    name="reproduce",
    flow_run_name="{method}",
    # How many run at once is decided below.
    task_runner=ThreadPoolTaskRunner(max_workers=16),  # pyright: ignore[reportArgumentType]
)
def reproduce(
    method: str = ALL,
    profile: str | None = None,
    settings: dict[str, Any] | None = None,
    timeout_hours: Annotated[float, Field(gt=0)] = 24.0,
    parallel: Annotated[int, Field(ge=1)] | None = None,
) -> dict[str, str]:
    """Bring the graph up to date, stage by stage, and publish to MLflow.

    Args:
        method: all, or one method or baseline with what it needs: lseg, linear, maskclip, …
        profile: a profile (profiles/*.yaml) to run under, instead of params.yaml as it is.
        settings: changes by dotted key, such as {"lseg.train.lr": 0.002}. With a profile or settings the flow works in
            a copy of the working tree and leaves params.yaml and outputs/ alone; results go to MLflow and DVC's cache.
        timeout_hours: after that long a stage is stopped with all its processes, and tried again.
        parallel: stages that may run at once; null: as many as the cores hold of `threads` each, and one where there is
            a GPU. Fewer run where the memory that they took last time would not hold them.

    Returns:
        What became of each stage: "ran", "linked", "restored" or "unchanged".
    """
    log = get_run_logger()
    if (flow_run.run_count or 1) > MOST_STARTS:
        raise StageError(
            found=f"this flow run was started {flow_run.run_count} times",
            allowed=f"{MOST_STARTS} starts of one flow run",
            fix="see its log for what ends it (memory, most often), then start a new flow run",
        )
    allow()
    for line in mend(require_root()):
        log.warning(line)
    with workplace(require_root(), profile=profile, settings=settings) as root:
        graph = read_graph(root)
        wanted = stages_of(graph, method)
        at_once = parallel or (1 if has_gpu() else max(1, cores() // parse_settings(read_values(root)).threads))
        log.info("%s: %d stages, at most %d at once, in %s", method, len(wanted), at_once, root)
        try:
            if root == require_root():
                record_data(root, say=log.info)
            futures = run_stages(graph, wanted, root, timeout=3600 * timeout_hours, at_once=at_once)
            published = publish.submit(root)
            published.wait()
        finally:
            stop_all()  # on the way out of an error or a cancellation stages may still be running
        for name in wanted:
            if name not in futures:
                log.error("%s was not run: what it needs failed", name)
        try:
            # Raises the error of one that failed.
            outcomes = {name: future.result() for name, future in futures.items()}
        except StoppedError as error:
            if not error.expired:
                raise
            raise StageError(
                found=f"a stage took longer than {timeout_hours:g} h, in each of {RETRIES + 1} tries: {error}",
                allowed="stages that end in time",
                fix="raise `timeout_hours`; a training goes on from its last checkpoint",
            ) from error
        published.result()
        return outcomes


def run_stages(
    graph: Mapping[str, Node], wanted: list[str], root: Path, *, timeout: float, at_once: int
) -> dict[str, PrefectFuture]:
    """Run stages, each when all it needs is done; where one fails, the others go on as far as they can."""
    memory = remembered_memory(root)
    available = psutil.virtual_memory().available
    before = {name: [one for one in upstream_of(graph, name, direct=True) if one in wanted] for name in wanted}
    futures: dict[str, PrefectFuture] = {}
    running: dict[PrefectFuture, str] = {}
    done: set[str] = set()
    while True:
        ready = [name for name in wanted if name not in futures and done.issuperset(before[name])]
        for name in ready[: at_once - len(running)]:
            if running and sum(memory.get(one, 0) for one in [name, *running.values()]) > available:
                continue
            # All of them are done: naming them draws the graph on Prefect's page.
            needs = [futures[one] for one in before[name]]
            futures[name] = run_stage.submit(name, root, timeout, wait_for=needs)  # pyright: ignore[reportCallIssue]
            running[futures[name]] = name
        if not running:
            return futures
        ended = next(as_completed(list(running)))
        ended.wait()  # its state is then at hand, without asking a server
        name = running.pop(ended)
        if ended.state.is_completed():
            done.add(name)


def stages_of(graph: Mapping[str, Node], method: str) -> list[str]:
    """The stages that a method's numbers and model come from, in the order of the graph; `all` stands for the graph.

    Raises:
        SettingsError: there is no such method.
    """
    if method == ALL:
        return list(graph)
    if method not in methods_of(graph):
        raise SettingsError(
            found=f"no method `{method}` in dvc.yaml",
            allowed=", ".join([ALL, *methods_of(graph)]),
            fix="choose one of these for the parameter `method`",
        )
    own = [name for name in graph if is_own(name, method)]
    needed = {other for name in own for other in upstream_of(graph, name)}
    return [name for name in graph if name in needed or name in own]


def methods_of(graph: Mapping[str, Node]) -> list[str]:
    """Methods and baselines that the graph evaluates."""
    names = [name for name in graph if name.partition("@")[0].endswith("-evaluate") and name != "encode-evaluate"]
    return sorted(method_of(name) for name in names)


@contextmanager
def workplace(root: Path, *, profile: str | None, settings: Mapping[str, Any] | None) -> Iterator[Path]:
    """The working tree itself, or a copy of it where the flow runs under other settings."""
    if profile is None and not settings:
        yield root
        return
    # A flow run that is started again has its id still: it takes the place of the copy that its first start left.
    with working_copy(root, str(flow_run.id), profile=profile, settings=settings) as copy:
        yield copy


def publish_artifacts(name: str, root: Path) -> None:
    """The table and the pictures of a stage's result, as artifacts on Prefect's pages."""
    kind, _, item = name.partition("@")
    if name == "report":
        rows = [
            {"method": row["method"], "split": row["split"]} | percent(row["metrics"])
            for row in read_report(root)["results"]
        ]
        create_table_artifact(table=rows, key="results", description="Percent; every method under one protocol")
    if kind.endswith("-evaluate") and kind != "encode-evaluate":
        method = method_of(name)
        folder = root / "outputs" / (f"baselines/{method}" if item else method) / "evaluate"
        metrics = read_json(folder / "metrics.json").get("splits")
        if metrics is None:  # its `run` is false
            return
        rows = [{"split": split} | percent(values) for split, values in metrics.items()]
        create_table_artifact(table=rows, key=f"{method}-metrics", description=f"{method}, percent")
        # In the text itself: a page may not fetch files of this machine, and shows these wherever it is opened.
        pictures = {path.stem: path.read_bytes() for path in sorted((folder / "pictures").glob("*_overview.png"))}
        text = [
            f"![{name}](data:image/png;base64,{base64.b64encode(content).decode()})"
            for name, content in pictures.items()
        ]
        if text:
            create_markdown_artifact(markdown="\n\n".join(text), key=f"{method}-pictures", description=method)


def percent(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """The plain numbers among metrics, in percent."""
    return {
        name: None if value is None else round(100 * value, 1)
        for name, value in metrics.items()
        if value is None or isinstance(value, float)
    }


def record_data(root: Path, *, say: Callable[[str], None]) -> None:
    """Record data that was changed in its place, as `dvc repro` does: results then name data that DVC has."""
    changed = [path for path, how in changed_data(root, patience=86400).items() if how == "modified"]
    if changed:
        say(f"{', '.join(changed)} changed: recording it in data.dvc")
        run_dvc(root, ["commit", "--force", "--quiet", *changed], patience=86400)


def remembered_memory(root: Path) -> dict[str, int]:
    """Bytes that each stage took when it last ran on this machine."""
    return {took.stage: took.memory for took in recall(private_folder(root))}


def has_gpu() -> bool:
    """Whether stages will find a GPU of NVIDIA, which they would have to share."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") and Path("/dev/nvidiactl").exists()


def cores() -> int:
    """Logical cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    """Run the flow in this process: with a server where PREFECT_API_URL names one, else without."""
    parser = argparse.ArgumentParser(description="Bring the graph up to date as a Prefect flow.")
    parser.add_argument("--method", default=ALL, help="all, or a method or baseline")
    parser.add_argument("--profile", help="run under this profile, in a copy of the working tree")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting; in a copy as well")
    parser.add_argument("--timeout-hours", type=float, default=24.0, help="time for one try of a stage")
    parser.add_argument("--parallel", type=int, help="stages at once; default: what the cores hold")
    given = parser.parse_args()
    if given.timeout_hours <= 0 or (given.parallel is not None and given.parallel < 1):
        parser.error("--timeout-hours must be more than 0, --parallel 1 or more")
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(128 + signal.SIGHUP))  # a closed terminal ends stages too
    end_orphaned_servers()
    try:
        result = reproduce(
            method=given.method,
            profile=given.profile,
            settings=dict(map(setting, given.set)) or None,
            timeout_hours=given.timeout_hours,
            parallel=given.parallel,
        )
    except LexisegError as error:
        sys.exit(f"error ({type(error).__name__})\n{error}")
    for name, outcome in result.items():
        print(f"{name}: {outcome}")


def end_orphaned_servers() -> None:
    """End temporary servers that Prefect started for flows of this folder which were killed; it does not do so."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            parent = process.parent()
            # A lost process goes to the first one, or to a keeper of orphans, which works in no folder of ours.
            orphaned = parent is None or parent.pid == 1 or parent.cwd() != process.cwd()
            if orphaned and process.cwd() == os.getcwd() and "PREFECT__SERVER_EPHEMERAL" in process.environ():
                process.terminate()


def setting(text: str) -> tuple[str, Any]:
    """KEY=VALUE with a JSON value; what is no JSON is text."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


if __name__ == "__main__":
    main()
