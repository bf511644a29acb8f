"""The history of a method's production model, as it is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lexiseg.tracking.decisions import Entry


@dataclass(frozen=True)
class History:
    """What is known of a method's production model.

    Attributes:
        method: such as "lseg".
        entries: the decisions, oldest first.
        production: the version that is production now.
        seals: number -> hash of a decision when it was made.
    """

    method: str
    entries: tuple[Entry, ...]
    production: str | None
    seals: Mapping[int, str]


def earlier_production(entries: Sequence[Entry], production: str | None) -> list[str]:
    """The versions that a rollback goes back to, the nearest last.

    A rollback takes back all that came after its target: after 1, 2, 3 and a rollback to 2, the way back leads to 1.
    """
    stack: list[str] = []
    for entry in entries:
        before, after = entry.decision.before, entry.decision.after
        if after == before or entry.carried_out != "yes":
            continue
        if before is not None and stack[-1:] != [before]:
            stack.append(before)  # it was made production by other hands
        if after is None:
            continue
        if entry.decision.outcome == "rolled back" and after in stack:
            del stack[len(stack) - stack[::-1].index(after) :]
        else:
            stack.append(after)
    return [version for version in stack if version != production]


def story_lines(history: History) -> list[str]:
    """The decisions in words, oldest first."""
    method, entries, production = history.method, history.entries, history.production
    if not entries:
        now = f"version {production} is production, by no decision" if production else "no version is production"
        return [f"{method}: nothing was decided yet, {now}"]
    lines: list[str] = []
    for entry in entries:
        one = entry.decision
        who = f"{one.asked.get('by')} ({one.asked.get('through')})"
        if one.asked.get("approved_by"):
            who += f", approved by {one.asked['approved_by']}"
        lines.append(f"{one.number:>3}  {one.time[:16].replace('T', ' ')}  {_deed(entry)}, asked by {who}")
        lines.append(f"     {one.reason}")
        if miou := (one.evidence.get("miou") or {}).get("challenger"):
            more = _difference(one.evidence) + _costs(one.evidence)
            lines.append(f"     mIoU {100 * miou:.1f} on {one.evidence['split']}{more}")
    lines.append(f"{method}: {f'version {production}' if production else 'no version'} is production")
    return lines + [f"note: {fault}" for fault in faults(history)]


def story_json(history: History) -> dict[str, Any]:
    """The same for programs: {"method", "production", "decisions", "faults"}."""
    told = [
        asdict(entry.decision) | {"run_id": entry.run_id, "carried_out": entry.carried_out} for entry in history.entries
    ]
    return {
        "method": history.method,
        "production": history.production,
        "decisions": told,
        "faults": faults(history),
    }


def faults(history: History) -> list[str]:
    """What does not fit: records that were altered or removed, decisions that are open, an alias that others moved."""
    found: list[str] = []
    numbers = {entry.decision.number: entry.decision.hash for entry in history.entries}
    for number, seal in sorted(history.seals.items()):
        if number not in numbers:
            found.append(f"the record of decision {number} was removed")
        elif numbers[number] != seal:
            found.append(f"the record of decision {number} was altered")
    before: Entry | None = None
    left: str | None = None  # in production
    for entry in history.entries:
        one, expected = entry.decision, before.decision.hash if before else None
        if one.previous != expected:
            found.append(f"the record before decision {one.number} was altered or removed")
        if entry.carried_out is None:
            found.append(f"decision {one.number} is open; the next one settles it")
        elif entry.carried_out != "yes":
            found.append(f"decision {one.number} was not carried out: {entry.carried_out}")
        if before is not None and one.before != left:
            found.append(f"before decision {one.number}, other hands had made {_shown(one.before)} production")
        left = one.after if entry.carried_out == "yes" else one.before
        before = entry
    if before is not None and before.carried_out == "yes" and left != history.production:
        now = f"{_shown(history.production)} is production"
        found.append(f"{now}, and the last decision left {_shown(left)}: the alias was moved by other hands")
    return found


def _shown(version: str | None) -> str:
    return f"version {version}" if version else "no version"


def _deed(entry: Entry) -> str:
    one = entry.decision
    before = f"version {one.before}" if one.before else "nothing"
    stayed = f"production stayed {before}" if one.before else "still nothing is production"
    return {
        "promoted": f"promoted version {one.version} (before: {before})",
        "refused": f"refused version {one.version} ({stayed})",
        "rolled back": f"rolled back to version {one.version} (before: {before})",
        "retired": f"retired version {one.version}, nothing is production",
        "void": "void",
    }[one.outcome]


def _difference(evidence: Mapping[str, Any]) -> str:
    found = evidence.get("difference")
    if not found:
        return ""
    return f", {100 * found['estimate']:+.1f} to production ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"


def _costs(evidence: Mapping[str, Any]) -> str:
    costs = evidence.get("costs")
    return f", {costs['latency']:.0f} ms, {costs['memory']:.0f} MB" if isinstance(costs, dict) else ""
