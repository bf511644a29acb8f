"""Pages for people, made again from the outputs at any time: Great Expectations' Data Docs."""

from __future__ import annotations

from pathlib import Path

from lexiseg.storage import read_json, sha256_of_file, sha256_of_json, write_json
from lexiseg.workspace import main_checkout, private_folder


def write_outdated_data_docs(root: Path) -> Path | None:
    """Write `.lexiseg/data-docs/index.html` for the prepared data set, unless the page there is of this very one.

    Returns:
        The page, or None where nothing was written (in a copy of the working tree, never).
    """
    prepared = root / "outputs" / "prepare"
    if main_checkout(root) != root:  # a copy under other settings: the page is that of the main checkout's data
        return None
    if not (prepared / "manifest.parquet").is_file():
        return None
    from lexiseg.stages.settings import parse_settings, read_values

    data = parse_settings(read_values(root)).data
    folder = private_folder(root) / "data-docs"
    source = sha256_of_json([sha256_of_file(prepared / "manifest.parquet"), data.model_dump(mode="json")])
    made_of = folder / "made-of.json"
    if (folder / "index.html").is_file() and made_of.is_file() and read_json(made_of) == source:
        return None
    from lexiseg.data.docs import write_data_docs

    page = write_data_docs(prepared, folder, data=data)
    write_json(made_of, source)
    return page
