"""Stage report: every method and baseline under one protocol, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexiseg.evaluation.protocol import ProtocolError, require_same_protocol
from lexiseg.storage import read_json, write_json


def run(settings: Any, inputs: Mapping[str, Path], outputs: Path) -> None:
    """Write results.json in the form that `lexiseg report --json` prints.

    `difference` is the method's metric minus the baseline's, for the metrics that both have. A baseline under another
    protocol, such as one without the method's flips and scales, stands in `not_comparable` with the reason. What names
    that a CLIP gave to clusters are worth stands among the metrics of their method.
    """
    found = [read_json(path) for name, path in sorted(inputs.items()) if name.endswith("/evaluate/metrics.json")]
    methods = [result for result in found if "splits" in result]  # the others did not run
    # The folder may still hold a baseline of another profile: only the listed ones count.
    stego = settings.stego
    names = [*settings.baselines, *(f"kmeans-{kind}" for kind in stego.baselines if stego.run)]
    baselines = [read_json(inputs["baselines"] / name / "evaluate" / "metrics.json") for name in names]
    rows = []
    for result in [*methods, *baselines]:
        by_text = _by_text(inputs, result["method"])
        for split, metrics in sorted(result["splits"].items()):
            metrics = metrics | by_text.get(split, {})
            row = {
                "method": result["method"],
                "protocol": result["protocol"]["name"],
                "protocol_hash": result["protocol"]["hash"],
                "split": split,
                "seeds": [settings.seed],
                "metrics": metrics,
            }
            if result in methods:
                reasons = {b["method"]: _why_not(result["protocol"], b["protocol"]) for b in baselines}
                same = {b["method"]: b["splits"][split] for b in baselines if not reasons[b["method"]]}
                row["baseline"] = same
                row["difference"] = {name: _difference(metrics, theirs) for name, theirs in same.items()}
                row["not_comparable"] = {name: reason for name, reason in reasons.items() if reason}
            rows.append(row)
    encoders = read_json(inputs["encode-evaluate/metrics.json"])
    write_json(outputs / "results.json", {"results": rows, "encoders": encoders, "profile": settings.profile})


def _by_text(inputs: Mapping[str, Path], method: str) -> Mapping[str, Mapping[str, float | None]]:
    """Metrics by split of clusters with the names that the stage `<method>-name` gave them; there may be none."""
    folder = inputs.get(f"{method}/name")
    return read_json(folder / "naming.json")["splits"] if folder else {}


def _why_not(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    try:
        require_same_protocol(ours, theirs)
    except ProtocolError as error:
        return error.found
    return None


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: round(value - theirs[name], 6)
        for name, value in ours.items()
        if isinstance(value, float) and isinstance(theirs.get(name), float)
    }
