from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from lexiseg.reporting import report_lines
from lexiseg.stages import report
from lexiseg.storage import hash_tree, read_json, write_json

SETTINGS = SimpleNamespace(profile="tiny", seed=3, baselines=("linear",))


def metrics(method: str, *, protocol: str = "a" * 64, **test: float | int | None) -> dict:
    card = {"name": "world", "hash": protocol, "card": {}}
    return {"method": method, "protocol": card, "splits": {"test": test, "stress": {"miou": 0.25}}}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    write_json(tmp_path / "lseg.json", metrics("lseg", miou=0.5, miou_unseen=0.125, pixels=7, harmonic=None))
    write_json(
        tmp_path / "baselines/linear/evaluate/metrics.json",
        metrics("baselines/linear", miou=0.375, miou_unseen=None, pixels=7, harmonic=0.5),
    )
    write_json(tmp_path / "baselines/maskclip/evaluate/metrics.json", {"of": "another profile"})
    write_json(tmp_path / "encode.json", {"retrieval": {}, "stand_ins": {"Pole": "traffic light"}})
    return {
        "lseg/evaluate/metrics.json": tmp_path / "lseg.json",
        "baselines": tmp_path / "baselines",
        "encode-evaluate/metrics.json": tmp_path / "encode.json",
    }


def results(inputs: dict[str, Path], outputs: Path) -> dict:
    report.run(SETTINGS, inputs, outputs)
    return read_json(outputs / "results.json")


def test_a_row_for_every_method_and_split(inputs, tmp_path):
    rows = results(inputs, tmp_path / "out")["results"]
    assert [(row["method"], row["split"]) for row in rows] == [
        ("lseg", "stress"),
        ("lseg", "test"),
        ("baselines/linear", "stress"),
        ("baselines/linear", "test"),
    ]
    assert all(row["seeds"] == [3] and row["protocol"] == "world" for row in rows)
    assert all(row["protocol_hash"] == "a" * 64 for row in rows)


def test_a_method_that_did_not_run_has_no_row(inputs, tmp_path):
    write_json(tmp_path / "tcl.json", {"method": "tcl", "run": False})
    with_it = results({**inputs, "tcl/evaluate/metrics.json": tmp_path / "tcl.json"}, tmp_path / "out")
    assert with_it == results(inputs, tmp_path / "again")


def test_a_method_stands_beside_its_baseline(inputs, tmp_path):
    ours = results(inputs, tmp_path / "out")["results"][1]
    assert ours["baseline"]["baselines/linear"]["miou"] == 0.375
    # Only what both have measured has a difference.
    assert ours["difference"] == {"baselines/linear": {"miou": 0.125}}
    assert "baseline" not in results(inputs, tmp_path / "again")["results"][3]


def test_what_goes_along(inputs, tmp_path):
    found = results(inputs, tmp_path / "out")
    assert found["profile"] == "tiny"
    assert found["encoders"]["stand_ins"] == {"Pole": "traffic light"}


def test_numbers_under_different_protocols_are_not_compared(inputs, tmp_path):
    write_json(inputs["baselines"] / "linear/evaluate/metrics.json", metrics("baselines/linear", protocol="b" * 64))
    rows = results(inputs, tmp_path / "out")["results"]
    ours = rows[0]
    assert (ours["baseline"], ours["difference"]) == ({}, {})
    assert "aaaaaaaa" in ours["not_comparable"]["baselines/linear"]
    assert "bbbbbbbb" in ours["not_comparable"]["baselines/linear"]
    lines = report_lines(read_json(tmp_path / "out/results.json"))
    assert sum("protocol world" in line for line in lines) == 4  # two splits, two protocols: never in one table


def test_equal_inputs_give_equal_bytes(inputs, tmp_path):
    results(inputs, tmp_path / "one")
    results(dict(reversed(inputs.items())), tmp_path / "two")
    assert hash_tree(tmp_path / "one") == hash_tree(tmp_path / "two")
