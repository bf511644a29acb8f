"""`lexiseg plan`: what `dvc repro` would do and why, and what that takes, going by earlier runs.

DVC's own dry run judges every stage by the files that are there now. This one follows the graph: what a stage that
will run is going to write is unknown, what one that will be restored is going to have is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lexiseg.history import Took, best_match, recall
from lexiseg.pipeline import (
    Node,
    cached_outs,
    hash_dependencies,
    node_of,
    read_graph,
    read_lock,
    recorded_hashes,
    upstream_of,
    within,
)
from lexiseg.settings import read_yaml
from lexiseg.stage import FINISHED, fingerprint_of, value_at, work_folder
from lexiseg.workspace import private_folder

Action = Literal["nothing", "restore", "link", "resume", "run", "follow", "blocked"]
WORDS: dict[Action, str] = {
    "nothing": "up to date",
    "restore": "from DVC's cache",
    "link": "links its result",
    "resume": "goes on",
    "run": "runs",
    "follow": "runs, if needed",
    "blocked": "cannot run",
}
COMPUTES: tuple[Action, ...] = ("resume", "run", "follow")
PER_STEP = ("steps", "epochs")  # settings that a stage's time is proportional to


@dataclass(frozen=True)
class Step:
    """What will become of one stage.

    Attributes:
        stage: its name.
        action: nothing; restore: DVC has the result; link: the work folder has it; resume: a training goes on from
            its checkpoint; run; follow: it runs if what comes before it gives another result; blocked: something is
            missing.
        why: the reasons in words.
        seconds: expected wall-clock time; None where no earlier run is known.
        memory: expected bytes of the process and its largest child at their largest; None as above.
        disk: expected bytes of outputs; None as above.
        basis: the earlier run that the numbers come from, in words; empty where they are not needed.
    """

    stage: str
    action: Action
    why: tuple[str, ...] = ()
    seconds: float | None = None
    memory: int | None = None
    disk: int | None = None
    basis: str = ""


def plan(root: Path, targets: Iterable[str] = ()) -> list[Step]:
    """What `dvc repro` would do with the target stages and all that they need.

    Args:
        root: the working tree.
        targets: names of stages; none: the whole graph.

    Raises:
        StageError: the graph cannot be read, or has no such stage.
    """
    return _Planner(root).steps(targets)


class _Planner:
    def __init__(self, root: Path) -> None:
        self.root, self.graph, self.lock = root, read_graph(root), read_lock(root)
        self.values = read_yaml(root / "params.yaml")
        self.private = private_folder(root)
        self.history = recall(self.private)
        paths = {path for node in self.graph.values() for path in (*node.deps, *node.outs)}
        there = sorted(path for path in paths if (root / path).exists())
        self.disk = hash_dependencies(root, there) if there else {}
        # What the outs will be: a hash, or None where that is not known. An out that is not here stays as it is.
        self.made: dict[str, str | None] = {}

    def steps(self, targets: Iterable[str]) -> list[Step]:
        names = [node_of(self.graph, target).name for target in targets] or list(self.graph)
        wanted = {name for target in names for name in (*upstream_of(self.graph, target), target)}
        result: dict[str, Step] = {}
        for name, node in self.graph.items():
            if name in wanted:
                result[name] = self._step(node, result)
        return list(result.values())

    def _step(self, node: Node, before: Mapping[str, Step]) -> Step:
        deps = {dep: self._expected(dep, node) for dep in node.deps}
        missing = [dep for dep in node.deps if deps[dep] is None and not self._made_by(dep)]
        stopped = [name for name in upstream_of(self.graph, node.name) if before[name].action == "blocked"]
        if missing or stopped:
            self.made |= dict.fromkeys(node.outs)
            why = [f"{dep} is missing" for dep in missing] + [f"{name} cannot run" for name in stopped]
            return Step(node.name, "blocked", tuple(why))
        params = {key: value_at(self.values, key) for key in node.params}
        changes = self._changes(node, params, deps)
        recorded = recorded_hashes(self.lock.get(node.name, {}), "outs")
        wrong = [
            f"{out} {'was changed' if out in self.disk else 'is not there'}"
            for out in node.outs
            if node.name in self.lock and (out not in self.disk or self.disk[out] != recorded.get(out))
        ]
        if not changes and not wrong:
            return Step(node.name, "nothing")
        known = {dep: value for dep, value in deps.items() if value is not None}
        if len(known) < len(deps):
            direct = upstream_of(self.graph, node.name, direct=True)
            runs = [name for name in direct if before[name].action != "nothing"]
            certain = [change for change in changes if change not in self._unknown(deps)]
            self.made |= dict.fromkeys(node.outs)
            why = (*certain, f"after {', '.join(runs)}")
            return self._costs(Step(node.name, "run" if certain else "follow", why), params)
        entry = None if changes else self.lock.get(node.name)
        outs = cached_outs(self.root, node.name, known, recorded=entry)
        if outs is not None:
            self.made |= outs
            return Step(node.name, "restore", (*changes, *wrong))
        self.made |= dict.fromkeys(node.outs)
        work = work_folder(self.private, node.name, fingerprint_of(node.name, params=params, deps=known))
        if (work / FINISHED).is_file():
            return Step(node.name, "link", (*changes, *wrong))
        progress = _progress(work / "checkpoints")
        action: Action = "run" if progress is None else "resume"
        why = (*changes, *wrong, *([] if progress is None else [f"{progress:.0%} of the training is done"]))
        return self._costs(Step(node.name, action, why), params, share=1 - (progress or 0.0))

    def _changes(self, node: Node, params: Mapping[str, Any], deps: Mapping[str, str | None]) -> list[str]:
        entry = self.lock.get(node.name)
        if entry is None:
            return ["dvc.lock has no run of it"]
        if entry["cmd"] != node.cmd:
            return ["its command changed"]
        recorded = recorded_hashes(entry, "deps")
        old = {key: value for values in (entry.get("params") or {}).values() for key, value in values.items()}
        changes = [
            text
            for key in params
            for text in (_differences(key, old[key], params[key]) if key in old else [f"{key} is new"])
        ]
        changes += [
            f"{dep} {'changed' if dep in recorded else 'is new'}"
            for dep in deps
            if deps[dep] and deps[dep] != recorded.get(dep)
        ]
        return changes + self._unknown(deps)  # what is no longer declared does not matter to DVC

    def _unknown(self, deps: Mapping[str, str | None]) -> list[str]:
        return [f"{dep} may change" for dep in deps if deps[dep] is None]

    def _expected(self, dep: str, node: Node) -> str | None:
        """The hash that a dependency will have; None: not known, or it is missing."""
        outs = [out for out in self.made if within(dep, out)]
        if dep in outs:
            return self.made[dep]
        if not outs:
            return self.disk.get(dep)
        # A folder of several stages: its hash is known where all in it will be as it was when this one ran last.
        last = {out: value for entry in self.lock.values() for out, value in recorded_hashes(entry, "outs").items()}
        if all(self.made[out] is not None and self.made[out] == last.get(out) for out in outs):
            return recorded_hashes(self.lock.get(node.name, {}), "deps").get(dep)
        return None

    def _made_by(self, dep: str) -> bool:
        return any(within(dep, out) for node in self.graph.values() for out in node.outs)

    def _costs(self, step: Step, params: Mapping[str, Any], *, share: float = 1.0) -> Step:
        return expect(step, params, self.history, share=share)


def expect(step: Step, params: Mapping[str, Any], history: list[Took], *, share: float = 1.0) -> Step:
    """The step with what it should take, going by earlier runs of its stage.

    Args:
        step: without costs.
        params: the parameters that the stage declares, by dotted key, as it will run with them.
        history: of this machine.
        share: of the work that is left (0..1).
    """
    took = best_match(history, step.stage, params)
    if took is None:
        return step
    factor, basis = _scale(took, params)
    return replace(
        step, seconds=round(took.seconds * factor * share, 1), memory=took.memory, disk=took.disk, basis=basis
    )


def _differences(key: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in {**old, **new}:
            yield from _differences(f"{key}.{name}", old.get(name), new.get(name))
    elif old != new:
        yield f"{key} {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _scale(took: Took, params: Mapping[str, Any]) -> tuple[float, str]:
    """How many times as long as a run with other settings, and words for it."""
    basis = f"as on {took.finished[:10]}"
    if not took.whole:
        basis += ", when it went on from a checkpoint"
    if took.params == dict(params):
        return 1.0, basis
    factor = 1.0
    old, new = dict(_leaves(took.params)), dict(_leaves(params))
    group, _, item = took.stage.partition("@")
    for key, value in new.items():
        before, parts = old.get(key), key.split(".")
        if item and parts[0] == group.partition("-")[0] and item not in parts:
            continue  # in the block of the group, settings of another of its items
        if parts[-1] in PER_STEP and value and before and value != before:
            factor *= value / before
    return factor, f"{basis} with other settings" + (f", times {factor:.2g}" if factor != 1 else "")


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _progress(folder: Path) -> float | None:
    """The share of a stage's training that its newest checkpoint holds; None without one."""
    files = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not files:
        return None
    from lexiseg.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(files[-1])
    return checkpoint.step / checkpoint.batches if checkpoint else None


def plan_lines(steps: Iterable[Step], *, free_memory: int, free_disk: int) -> list[str]:
    """The plan as lines of text.

    Args:
        steps: of `plan`.
        free_memory: bytes that are available now.
        free_disk: bytes that are free where the outputs lie.
    """
    steps = list(steps)
    width = max(len(step.stage) for step in steps)
    lines = [f"{'stage':<{width}}  {'what':<16} {'time':>9} {'memory':>8} {'disk':>8}  why"]
    for step in steps:
        cells = f"{_time(step):>9} {size_text(step.memory):>8} {size_text(step.disk):>8}"
        why = _at_most(step.why, 3) + (f" ({step.basis})" if step.basis else "")
        lines.append(f"{step.stage:<{width}}  {WORDS[step.action]:<16} {cells}  {why}".rstrip())
    computed = [step for step in steps if step.action in COMPUTES]
    lines.append("")
    if not computed:
        lines.append("nothing is computed")
        return lines
    known = [step for step in computed if step.seconds is not None]
    unknown = [step.stage for step in computed if step.seconds is None]
    memory, disk = max([step.memory or 0 for step in computed]), sum(step.disk or 0 for step in computed)
    lines.append(
        f"{len(computed)} of {len(steps)} stages compute"
        + (f", about {duration(sum(step.seconds or 0 for step in known))} one after the other" if known else "")
        + (f"; no earlier run is known of {', '.join(unknown) if known else 'any'}" if unknown else "")
    )
    if known:
        lines.append(
            f"memory {size_text(memory)} of {size_text(free_memory)} available; outputs {size_text(disk)}, "
            f"and as much again in DVC's cache, of {size_text(free_disk)} free"
        )
    if memory > free_memory or 2 * disk > free_disk:
        lines.append("warning: that is more than there is")
    return lines


def _at_most(texts: tuple[str, ...], count: int) -> str:
    more = f"; and {len(texts) - count} more" if len(texts) > count else ""
    return "; ".join(texts[:count]) + more


def _time(step: Step) -> str:
    if step.action not in COMPUTES:
        return ""
    return "?" if step.seconds is None else duration(step.seconds)


def duration(seconds: float) -> str:
    """Seconds in words: "1 h 5 m", "2 m 3 s", "4 s"; at least one second."""
    seconds = max(1, round(seconds))
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    if hours:
        return f"{hours} h {minutes} m"
    return f"{minutes} m {seconds % 60} s" if minutes else f"{seconds} s"


def size_text(size: int | None) -> str:
    """Bytes in words, in MB or GB; empty where they are not known."""
    if size is None:
        return ""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
