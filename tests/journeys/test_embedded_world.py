"""The embedded profile as it is shipped, at its full size: it learns what the README says, but for a seed's noise."""

from __future__ import annotations

import pytest
from helpers.working_tree import make_tree, run

from lexiseg.storage import read_json


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_the_world_is_learned(tmp_path):
    tree = make_tree(tmp_path / "lexiseg")
    run(tree, "dvc", "repro", timeout=5400)
    report = read_json(tree / "outputs/report/results.json")
    recall = report["encoders"]["retrieval"]["test"]
    assert min(recall["image_to_text_r1"], recall["text_to_image_r1"]) >= 0.80
    found = {(row["method"], row["split"]): row["metrics"] for row in report["results"]}
    ours, clip = found["lseg", "test"], found["baselines/maskclip", "test"]
    linear, stress = found["baselines/linear", "test"], found["lseg", "stress"]
    for name, floor in {"miou": 0.38, "miou_seen": 0.40, "miou_unseen": 0.30}.items():
        assert clip[name] >= floor
    assert ours["miou_seen"] >= 0.60
    assert ours["miou_unseen"] >= 0.35
    for name in ("miou", "miou_seen", "miou_unseen"):
        assert ours[name] > clip[name]
    assert linear["miou_unseen"] == 0  # it cannot name what it has no label of
    assert stress["miou"] < ours["miou"]  # without the canonical looks it is harder
    stego, raw, whitened = (
        found[f"{name}", "test"] for name in ("stego", "baselines/kmeans-raw", "baselines/kmeans-whitened")
    )
    assert raw["miou"] >= 0.23
    assert whitened["miou"] > raw["miou"]
    assert stego["miou"] >= max(0.29, raw["miou"] + 0.02)
