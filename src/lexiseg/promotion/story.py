"""The history of a method's production model, as it is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lexiseg.tracking.decisions import Entry


def earlier_production(entries: Sequence[Entry], production: str | None) -> list[str]:
    """The versions that a rollback goes back to, the nearest last.

    A rollback takes back all that came after its target: after 1, 2, 3 and a rollback to 2, the way back leads to 1.
    """
    stack: list[str] = []
    for entry in entries:
        after = entry.decision.after
        if after is None or after == entry.decision.before or entry.carried_out != "yes":
            continue
        if entry.decision.outcome == "rolled back" and after in stack:
            del stack[stack.index(after) + 1 :]
        else:
            stack.append(after)
    return [version for version in stack if version != production]


def story_lines(method: str, entries: Sequence[Entry], production: str | None) -> list[str]:
    """The decisions in words, oldest first."""
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
    return lines + [f"note: {fault}" for fault in faults(entries, production)]


def story_json(method: str, entries: Sequence[Entry], production: str | None) -> dict[str, Any]:
    """The same for programs: {"method", "production", "decisions", "faults"}."""
    told = [asdict(entry.decision) | {"run_id": entry.run_id, "carried_out": entry.carried_out} for entry in entries]
    return {"method": method, "production": production, "decisions": told, "faults": faults(entries, production)}


def faults(entries: Sequence[Entry], production: str | None) -> list[str]:
    """What does not fit: records that were altered or removed, decisions that are open, an alias that others moved."""
    found: list[str] = []
    before: Entry | None = None
    for entry in entries:
        expected = before.decision.hash if before else None
        if entry.decision.previous != expected:
            found.append(f"the record before decision {entry.decision.number} was altered or removed")
        if entry.carried_out is None:
            found.append(f"decision {entry.decision.number} is open; the next one settles it")
        elif entry.carried_out != "yes":
            found.append(f"decision {entry.decision.number} was not carried out: {entry.carried_out}")
        before = entry
    moved = [entry for entry in entries if entry.carried_out == "yes"]
    if moved and moved[-1].decision.after != production:
        said = moved[-1].decision.after
        found.append(
            f"production is {f'version {production}' if production else 'empty'}, and the last decision left "
            f"{f'version {said}' if said else 'it empty'}: the alias was moved by other hands"
        )
    return found


def _deed(entry: Entry) -> str:
    one = entry.decision
    before = f"version {one.before}" if one.before else "nothing"
    return {
        "promoted": f"promoted version {one.version} (before: {before})",
        "refused": f"refused version {one.version} (production stayed {before})",
        "rolled back": f"rolled back to version {one.version} (before: {before})",
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
