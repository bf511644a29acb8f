"""Published numbers: every table of the README and of the methods' pages is the one its file in docs/results gives."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean

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
