"""Published numbers: every table of the README and of the methods' pages is the one its file in docs/results gives."""

from __future__ import annotations

import re
from pathlib import Path

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


def test_every_table_of_results_has_its_file():
    results = readme().partition("## Results")[2].partition("\n## ")[0]
    shown = [file for file in FILES if table_of(file) in results]
    assert len(shown) == len(re.findall(r"^\|---", results, flags=re.MULTILINE)) > 0
