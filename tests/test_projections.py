"""Data Docs are written for the prepared data set, once."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.micro import settings, write_world

from lexiseg import projections
from lexiseg.stages import prepare

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    raw = tmp_path / "data" / "world"
    write_world(raw)
    outputs = tmp_path / "outputs" / "prepare"
    outputs.mkdir(parents=True)
    prepare.run(settings(name="world", adapter="world", workers=1), {"data": raw}, outputs)
    return tmp_path


def test_the_page_is_written_once_and_again_after_a_change(tree: Path) -> None:
    page = projections.write_outdated_data_docs(tree)
    assert page == tree / ".lexiseg" / "data-docs" / "index.html"
    assert page is not None
    assert "world" in page.read_text()
    assert projections.write_outdated_data_docs(tree) is None
    params = (tree / "params.yaml").read_text()
    (tree / "params.yaml").write_text(params.replace("min_side: 16 ", "min_side: 17 "))
    assert projections.write_outdated_data_docs(tree) == page


def test_nothing_prepared_means_no_page(tmp_path: Path) -> None:
    assert projections.write_outdated_data_docs(tmp_path) is None
