"""Data Docs: the validation of a prepared data set as a page to read, by Great Expectations, without the network.

A projection: it carries a time, so it is written beside a stage's outputs and never into them, and it can be
made again at any time, also of a data set that failed.
"""

from __future__ import annotations

import html
from pathlib import Path

from great_expectations.render.renderer.page_renderer import ValidationResultsPageRenderer
from great_expectations.render.view.view import DefaultJinjaSectionView

from lexiseg.data.checks import checks, judge, judged
from lexiseg.data.manifest import read_manifest
from lexiseg.data.settings import DataSettings
from lexiseg.storage import read_json, write_text

# The page of Great Expectations takes styles, icons and scripts from several servers; its sections do well with this.
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h5 { font-size: 1.1rem; margin: 1.5rem 0 .3rem } h6 { font-size: 1rem; margin: .5rem 0 }
table { border-collapse: collapse; margin: .3rem 0; width: 100% }
td, th { border: 1px solid #ccc; padding: .3rem .6rem; text-align: left; vertical-align: top }
.badge, code { background: #eee; border-radius: .2rem; padding: 0 .3rem }
.fa-check-circle::before { content: "passed"; color: #00665c } .fa-times::before { content: "failed"; color: #b3261e }
.fa-exclamation-triangle::before, .fa-exclamation-circle::before { content: "warning"; color: #8a5a00 }
[hidden], .collapse, a[data-toggle] { display: none }
"""


def write_data_docs(prepared: Path, folder: Path, *, data: DataSettings) -> Path:
    """Judge a prepared data set and write the page.

    Args:
        prepared: output folder of the stage prepare.
        folder: where to write index.html.
        data: limits and required splits.

    Returns:
        The page.

    Raises:
        DataError: nothing is prepared there.
    """
    rows = judged(read_manifest(prepared / "manifest.parquet"))
    suite = checks(data, rows)
    shown = [
        {name: html.escape(value) if isinstance(value, str) else value for name, value in row.items()} for row in rows
    ]  # a file's name is not markup
    result = judge(shown, suite, index=["split", "id"])
    # The first section links to pages that are not written; its numbers are in the heading here.
    sections = ValidationResultsPageRenderer().render(result).sections[1:]
    view = DefaultJinjaSectionView()
    body = [
        view.render({"section": section.to_json_dict(), "section_loop": {"index": number}})
        for number, section in enumerate(sections, start=1)
    ]
    title = html.escape(str(read_json(prepared / "info.json")["name"]))
    passed, total = result.statistics["successful_expectations"], result.statistics["evaluated_expectations"]
    # Great Expectations shows every unmet one alike.
    said = {check.name: "an error, the graph stops here" if check.error else "a warning" for check in suite}
    unmet = [(entry.expectation_config.meta or {})["name"] for entry in result.results if not entry.success]  # type: ignore[union-attr]
    told = "".join(f"<li>{html.escape(name)}: {said[name]}</li>" for name in unmet)
    page = folder / "index.html"
    write_text(
        page,
        f"<!DOCTYPE html><html lang=en><head><meta charset=utf-8><title>Data Docs: {title}</title>"
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>"
        f"<p>{len(rows)} samples; {passed} of {total} expectations are met.</p><ul>{told}</ul>"
        f"{''.join(body)}</body></html>\n",
    )
    return page
