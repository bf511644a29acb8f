"""What a run is: read from dvc.lock alone, so it can be worked out again at any time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lexiseg.errors import StageError
from lexiseg.storage import sha256_of_json

CODE = "src/"
BASELINE = "baseline"  # the group of those that stand beside all methods; other groups are a part of the name

Lock = Mapping[str, Mapping[str, Any]]
"""The stages of dvc.lock, as `lexiseg.pipeline.read_lock` gives them."""


def methods_in(lock: Lock) -> list[str]:
    """Methods and baselines that predict and were evaluated, sorted; "lseg", "linear", "kmeans-raw", …"""
    evaluated = [name for name in lock if name.partition("@")[0].endswith("-evaluate") and _ran(lock[name])]
    return sorted(method_of(name) for name in evaluated if name.replace("-evaluate", "-predict") in lock)


def _ran(stage: Mapping[str, Any]) -> bool:
    """Whether all `<method>.run` that a stage depends on are true: otherwise it wrote a note and no result."""
    return all(value is not False for key, value in params(stage).items() if key.endswith(".run"))


def method_of(stage: str) -> str:
    """The method or baseline that a stage belongs to.

    Example:
        >>> [method_of(name) for name in ("lseg-evaluate", "baseline-evaluate@linear", "kmeans-predict@raw")]
        ['lseg', 'linear', 'kmeans-raw']
    """
    group, _, item = stage.partition("@")
    method = group.rpartition("-")[0]
    if not item:
        return method
    return item if method == BASELINE else f"{method}-{item}"


def stage_name(lock: Lock, method: str, part: str) -> str:
    """How dvc.lock calls a part of a method: "lseg-evaluate", "baseline-evaluate@linear", "kmeans-evaluate@raw"."""
    group, _, item = method.partition("-")
    usual = f"{BASELINE}-{part}@{method}"
    return next((name for name in (f"{method}-{part}", usual, f"{group}-{part}@{item}") if name in lock), usual)


def is_own(name: str, method: str) -> bool:
    """Whether a stage belongs to the method and is not shared."""
    return method_of(name) == method


def hashes(stage: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Path -> hash of a stage's "deps" or "outs", as DVC recorded them."""
    return {entry["path"]: str(entry.get(entry.get("hash", "md5"), "")) for entry in stage.get(kind) or ()}


def params(stage: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a stage's parameters when it ran, by the keys it declares."""
    return {key: value for values in (stage.get("params") or {}).values() for key, value in values.items()}


def lineage(lock: Lock, name: str) -> list[str]:
    """The stages that a stage's result comes from, itself last."""
    order: list[str] = []

    def add(stage: str) -> None:
        for dep in sorted(hashes(lock[stage], "deps")):
            for other in sorted(lock):
                made = hashes(lock[other], "outs")
                if other != stage and other not in order and any(_within(dep, out) for out in made):
                    add(other)
        if stage not in order:
            order.append(stage)

    add(name)
    return order


def stale(lock: Lock, name: str) -> list[str]:
    """Why the entries of dvc.lock do not make one result, in words; empty when they do.

    A graph that was stopped half-way leaves new entries beside old ones: an evaluation of the model before.
    """
    stages = lineage(lock, name)
    made = {path: value for stage in stages for path, value in hashes(lock[stage], "outs").items()}
    return [
        f"{stage} used another {path} than there is now"
        for stage in stages
        for path, value in hashes(lock[stage], "deps").items()
        if made.get(path, value) != value
    ]


def method_fingerprint(lock: Lock, method: str) -> str:
    """The identity of a method's numbers: its settings, its code, and what it got from outside.

    It covers the method's own stages up to its evaluation. What comes after (register) cannot change a
    number, and its result has an identity of its own, its content.

    Args:
        lock: the stages of dvc.lock.
        method: "lseg", or a baseline such as "linear".

    Returns:
        Hex sha256.

    Raises:
        StageError: dvc.lock has no evaluation of this method.
    """
    evaluate = stage_name(lock, method, "evaluate")
    if evaluate not in lock:
        raise StageError(
            found=f"no evaluation of {method!r} in dvc.lock",
            allowed=f"one of those that ran: {', '.join(methods_in(lock)) or 'none yet'}",
            fix="run `dvc repro`",
        )
    own = [stage for stage in lineage(lock, evaluate) if is_own(stage, method)]
    inside = {path for stage in own for path in hashes(lock[stage], "outs")}
    content = {}
    for stage in own:
        deps = hashes(lock[stage], "deps")
        content[stage] = {
            "params": params(lock[stage]),
            "code": {path: value for path, value in deps.items() if path.startswith(CODE)},
            "external": {
                path: value for path, value in deps.items() if not path.startswith(CODE) and path not in inside
            },
        }
    return sha256_of_json(content)


def _within(path: str, out: str) -> bool:
    return path == out or path.startswith(f"{out}/") or out.startswith(f"{path}/")
