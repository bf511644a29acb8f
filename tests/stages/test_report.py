from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from lexiseg.reporting import report_lines
from lexiseg.stages import report
from lexiseg.storage import hash_tree, read_json, write_json


def settings(*, baselines=("linear",), kinds=(), stego=True) -> SimpleNamespace:
    block = SimpleNamespace(run=stego, baselines=kinds)
    return SimpleNamespace(profile="tiny", seed=3, baselines=baselines, stego=block)


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


def results(inputs: dict[str, Path], outputs: Path, **changes) -> dict:
    report.run(settings(**changes), inputs, outputs)
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


def test_without_a_baseline_a_method_stands_alone(inputs, tmp_path):
    rows = results(inputs, tmp_path / "out", baselines=())["results"]
    assert [(row["method"], row["baseline"], row["difference"]) for row in rows] == [("lseg", {}, {})] * 2


@pytest.fixture
def with_clusters(inputs, tmp_path) -> dict[str, Path]:
    """STEGO beside its own baseline, under a protocol of clusters."""
    found = metrics("stego", protocol="c" * 64, miou=0.75, clusters_used=1.0)
    write_json(
        tmp_path / "stego.json", {**found, "clusters": {"matched_on": "test", "names": ["sky"], "classes": ["sky"]}}
    )
    write_json(
        tmp_path / "baselines/kmeans-raw/evaluate/metrics.json",
        metrics("baselines/kmeans-raw", protocol="c" * 64, miou=0.5, clusters_used=1.0),
    )
    write_json(tmp_path / "name/naming.json", {"names": ["sky"], "splits": {"test": {"text_named_miou": 0.25}}})
    return {**inputs, "stego/evaluate/metrics.json": tmp_path / "stego.json", "stego/name": tmp_path / "name"}


def test_clusters_stand_beside_their_own_baselines(with_clusters, tmp_path):
    found = results(with_clusters, tmp_path / "out", kinds=("raw",))
    rows = {(row["method"], row["split"]): row for row in found["results"]}
    assert ("baselines/kmeans-raw", "test") in rows
    ours, lseg = rows["stego", "test"], rows["lseg", "test"]
    assert ours["difference"] == {"baselines/kmeans-raw": {"miou": 0.25, "clusters_used": 0.0}}
    assert set(ours["not_comparable"]) == {"baselines/linear"}
    assert set(lseg["not_comparable"]) == {"baselines/kmeans-raw"}
    lines = report_lines(found)
    table = next(n for n, line in enumerate(lines) if "cccccccc" in line and "test" in line)
    assert lines[table + 1].split()[1:] == [
        *("mIoU", "pixel_accuracy", "linear_mIoU", "text_named_mIoU", "clusters_used", "boundary_f"),
    ]
    assert lines[table + 2].split() == ["stego", "75.0", "–", "–", "25.0", "100.0", "–"]
    assert lines[table + 3].split() == ["baselines/kmeans-raw", "50.0", "–", "–", "–", "100.0", "–"]


def test_names_by_text_belong_to_the_split_they_were_counted_on(with_clusters, tmp_path):
    rows = {(r["method"], r["split"]): r["metrics"] for r in results(with_clusters, tmp_path / "out")["results"]}
    assert rows["stego", "test"]["text_named_miou"] == 0.25
    assert "text_named_miou" not in rows["stego", "stress"]
    assert "text_named_miou" not in rows["lseg", "test"]


def test_baselines_of_clusters_count_where_the_method_runs(with_clusters, tmp_path):
    for changes in ({"kinds": ("raw",), "stego": False}, {"kinds": ()}):
        rows = results(with_clusters, tmp_path / "out", **changes)["results"]
        assert "baselines/kmeans-raw" not in {row["method"] for row in rows}


def test_a_method_without_names_by_text(with_clusters, tmp_path):
    write_json(with_clusters["stego/name"] / "not-run.json", {"method": "stego", "run": False})
    (with_clusters["stego/name"] / "naming.json").unlink()
    write_json(with_clusters["stego/evaluate/metrics.json"], {"method": "stego", "run": False})
    rows = results(with_clusters, tmp_path / "out", stego=False)["results"]
    assert {row["method"] for row in rows} == {"lseg", "baselines/linear"}


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
