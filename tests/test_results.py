"""Published numbers: every table of the README is the one its file in docs/results gives."""

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
def test_a_table_of_the_readme_is_that_of_its_file(file):
    assert "\n".join(table_lines(read_json(file))) in readme()


def test_every_table_of_results_has_its_file():
    results = readme().partition("## Results")[2].partition("\n## ")[0]
    assert len(FILES) == len(re.findall(r"^\|---", results, flags=re.MULTILINE)) > 0
