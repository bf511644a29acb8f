"""validate: Great Expectations judges the manifest; validation.json is what every later stage depends on.

When an expectation of severity error fails, the stage fails: nothing is published, so DVC stops here. The
report of a failed validation goes to the private folder of the working tree instead, `.lexiseg/validation/`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexiseg.data.checks import Check, Outcome, Rows, checks, judged, outcomes
from lexiseg.data.manifest import read_manifest
from lexiseg.errors import DataError
from lexiseg.storage import write_json
from lexiseg.workspace import find_root, private_folder

_LISTED = 20


def run(settings: Any, inputs: Mapping[str, Path], outputs: Path) -> None:
    """Validate a prepared data set.

    Args:
        settings: the root settings; `data` is read (`lexiseg.data.settings.DataSettings`).
        inputs: "prepare": output folder of the stage prepare.
        outputs: folder to write validation.json into.

    Raises:
        DataError: an expectation of severity error fails; it names the samples and what to do.
    """
    data = settings.data
    report = make_report(judged(read_manifest(inputs["prepare"] / "manifest.parquet")), data=data)
    failed = [entry for entry in report["expectations"] if not entry["success"]]
    for entry in failed:
        if entry["severity"] == "warning":
            print(f"warning: {_in_words(entry)}\n  to do: {entry['fix']}", file=sys.stderr)
    if report["success"]:
        write_json(outputs / "validation.json", report)
        return
    root = find_root()
    kept = private_folder(root) / "validation/validation.json" if root else None
    if kept:
        write_json(kept, report)
    errors = [entry for entry in failed if entry["severity"] == "error"]
    raise DataError(
        found=f"the data set `{data.name}` fails {len(errors)} of {len(report['expectations'])} expectations:"
        + "".join(f"\n  - {_in_words(entry)}" for entry in errors),
        allowed="a data set that meets them all",
        fix="".join(f"\n  - {entry['name']}: {entry['fix']}" for entry in errors)
        + "\n  - then run `dvc repro` again"
        + (f"; the whole report is in {kept}" if kept else ""),
    )


def make_report(rows: Rows, *, data: Any) -> dict[str, Any]:
    """Judge rows made by `lexiseg.data.checks.judged`; the content of validation.json.

    Returns:
        success: False when an expectation of severity error fails.
        expectations: by name: name, severity, success, unexpected_count, samples (the first 20 by id, each
            with what was found) and fix.
        counts: per split: samples, readable, labelled, captioned.
    """
    suite = checks(data, rows)
    found = outcomes(rows, suite)
    entries = [_entry(check, found[check.name], rows) for check in sorted(suite, key=lambda check: check.name)]
    return {
        "success": all(entry["success"] or entry["severity"] == "warning" for entry in entries),
        "expectations": entries,
        "counts": {split: _counts(rows, split) for split in sorted({row["split"] for row in rows})},
    }


def _entry(check: Check, outcome: Outcome, rows: Rows) -> dict[str, Any]:
    failed = sorted(outcome.rows, key=lambda row: (row["place"], row["row"]))
    samples = [{"id": row["place"], "found": check.found(row)} for row in failed[:_LISTED]] if check.samples else []
    if not check.samples and not outcome.success:
        samples = [{"id": "", "found": check.found(rows)}]
    return {
        "name": check.name,
        "severity": "error" if check.error else "warning",
        "success": outcome.success,
        "unexpected_count": len(failed) if check.samples else len(samples),
        "samples": samples,
        "fix": check.fix,
    }


def _counts(rows: Rows, split: str) -> dict[str, int]:
    readable = [row for row in rows if row["split"] == split and row["readable"]]
    return {
        "samples": sum(row["split"] == split for row in rows),
        "readable": len(readable),
        "labelled": sum(row["mask_width"] is not None for row in readable),
        "captioned": sum(row["caption_count"] > 0 for row in readable),
    }


def _in_words(entry: dict[str, Any]) -> str:
    named = [": ".join(filter(None, (sample["id"], sample["found"]))) for sample in entry["samples"][:3]]
    more = f" (and {entry['unexpected_count'] - 3} more)" if entry["unexpected_count"] > 3 else ""
    return f"{entry['name']}: {'; '.join(named)}{more}"
