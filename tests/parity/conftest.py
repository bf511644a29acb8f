"""The last line of a run that touched the fixtures: how many ran, failed, and were known to no runner."""

from __future__ import annotations

import pytest

_counts = {"ran": 0, "failed": 0, "unknown": 0}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    kind = dict(report.user_properties).get("parity")
    if report.when != "call" or kind is None:
        return
    if kind == "unknown":
        _counts["unknown"] += 1
        return
    _counts["ran"] += 1
    _counts["failed"] += report.failed


def pytest_unconfigure(config: pytest.Config) -> None:
    # Processes of pytest-xdist report to the one that started them.
    if any(_counts.values()) and not hasattr(config, "workerinput"):
        print("parity: " + ", ".join(f"{count} {what}" for what, count in _counts.items()))
