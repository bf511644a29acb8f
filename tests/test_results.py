"""Published numbers: every table of the README and of the methods' pages is the one its file in docs/results gives."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from lexiseg.ablation import table_lines
from lexiseg.storage import read_json

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "docs/results").glob("*.json"))


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def table_of(file: Path) -> str:
    return "\n".join(table_lines(read_json(file)))


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_a_result_file_says_how_it_was_measured(file):
    result = read_json(file)
    made = result["made_with"]
    assert made["command"].startswith("lexiseg ablate ")
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", made["date"])
    assert made["versions"]["torch"]
    assert made["hardware"]["processor"]
    assert re.fullmatch("[0-9a-f]{64}", result["protocol"]["hash"])
    assert len(result["seeds"]) >= 3


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_a_file_is_a_table_of_a_page(file):
    pages = [readme(), *(page.read_text(encoding="utf-8") for page in ROOT.glob("src/lexiseg/methods/*/README.md"))]
    assert any(table_of(file) in page for page in pages)


@pytest.mark.parametrize(("name", "floor"), [("stego-probes-world", 0.29), ("stego-probes-coarse-world", 0.57)])
def test_stego_is_ahead_of_k_means_on_its_features(name, floor):
    """Over seeds of the trunk and starts of the probe; and the page says what the means are."""
    rows = {row["variant"]: row["seeds"] for row in read_json(ROOT / f"docs/results/{name}.json")["rows"]}

    def runs(variant: str) -> list[float]:
        return [metrics["miou"] for start in (0, 1) for metrics in rows[f"{variant}, start {start}"].values()]

    stego, raw, whitened = (runs(name) for name in ("STEGO (as set)", "k-means, raw", "k-means, whitened"))
    assert len(stego) == 6
    assert all(ours > theirs for ours, theirs in zip(stego, raw, strict=True))
    assert fmean(stego) - fmean(raw) >= 0.02
    assert fmean(stego) >= floor
    page = (ROOT / "src/lexiseg/methods/stego/README.md").read_text(encoding="utf-8")
    for variant, values in (("STEGO", stego), ("k-means, raw", raw), ("k-means, whitened", whitened)):
        mean, low, high = (100 * value for value in (fmean(values), min(values), max(values)))
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {variant} |"))
        assert f"{mean:.1f} ({low:.1f} to {high:.1f})" in line
    ahead, behind = (100 * abs(fmean(stego) - fmean(other)) for other in (raw, whitened))
    for text in (page, readme()):
        assert re.search(rf"{ahead:.1f}.*{behind:.1f}", text, flags=re.DOTALL)


def test_every_table_of_results_has_its_file():
    results = readme().partition("## Results")[2].partition("\n## ")[0]
    shown = [file for file in FILES if table_of(file) in results]
    assert len(shown) == len(re.findall(r"^\|---", results, flags=re.MULTILINE)) > 0


def sweep(name: str) -> dict[str, Any]:
    return read_json(ROOT / f"docs/results/sweeps/{name}.json")


def seconds(found: dict[str, Any], state: str) -> float:
    # The first trial of a sweep may link what `dvc repro` has trained.
    return fmean(trial["seconds"] for trial in found["trials"][1:] if trial["state"] == state)


def test_sweeps_found_what_their_page_says():
    page = (ROOT / "docs/sweeps.md").read_text(encoding="utf-8")
    for name in ("tcl-weights-world", "tcl-inference-world"):
        found = sweep(name)
        (best,) = (trial for trial in found["trials"] if trial["best"])
        first, after = found["trials"][0]["values"][0], best["values"][0]
        confirmed = found["confirmed"]
        before = confirmed["with_the_settings_as_they_were"]
        assert found["split"] == "val"
        assert len(found["trials"]) == 20
        assert after > first
        assert confirmed["miou"] > before["miou"]
        states = f"{found['counts']['complete']}, {found['counts']['pruned']}"
        values = f"{100 * first:.1f} -> {100 * after:.1f} | {100 * before['miou']:.1f} -> {100 * confirmed['miou']:.1f}"
        assert f"| {states} | {values} |" in page
        assert found["made_with"]["command"].startswith("lexiseg sweep tcl ")


def test_trials_cost_what_their_page_says():
    training, scores = sweep("tcl-weights-world"), sweep("tcl-inference-world")
    complete, pruned, scored = seconds(training, "complete"), seconds(training, "pruned"), seconds(scores, "complete")
    assert pruned < complete / 2
    assert scored < fmean(trial["seconds"] for trial in training["trials"][1:]) / 10
    page = (ROOT / "docs/sweeps.md").read_text(encoding="utf-8")
    assert f"{complete:.0f} s complete, {pruned:.0f} s pruned" in page
    assert f"{100 * pruned / complete:.0f} % of a\ncomplete one" in page
