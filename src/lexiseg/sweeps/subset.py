"""A few pictures of a prepared split as a prepared data set of their own: what a training is judged by on its way."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, load_from_disk
from datasets.utils import disable_progress_bars, enable_progress_bars

from lexiseg.data.episodes import read_episodes
from lexiseg.storage import write_json


def write_subset(prepared: Path, split: str, *, pictures: int, target: Path, episodes: bool = False) -> None:
    """Write `pictures` of the labelled pictures of a split, spread evenly over it, and link its other splits.

    Args:
        prepared: output of the stage prepare.
        split: name of the split.
        pictures: at most so many.
        target: folder to write, with what the stages predict and evaluate read.
        episodes: its pictures are asked about one class at a time.
    """
    table = load_from_disk(str(prepared / "dataset" / split))
    assert isinstance(table, Dataset)
    # Not every data set is labelled throughout; of one without labels any picture will do.
    labelled = [row for row, null in enumerate(table.data.column("semantic").is_null().to_pylist()) if not null]
    rows = labelled or list(range(len(table)))
    count = min(pictures, len(rows))
    chosen = [rows[position * len(rows) // count] for position in range(count)]
    (target / "dataset").mkdir(parents=True)
    disable_progress_bars()
    try:
        table.select(chosen).save_to_disk(str(target / "dataset" / split))
    finally:
        enable_progress_bars()
    for other in (prepared / "dataset").iterdir():
        if other.name != split:
            (target / "dataset" / other.name).symlink_to(other.resolve())
    for file in prepared.iterdir():
        if file.is_file() and file.name != "episodes.json":
            (target / file.name).symlink_to(file.resolve())
    if episodes:
        ids, asked = set(table.select(chosen)["id"]), read_episodes(prepared, split)
        pairs = [list(pair) for pair in asked.pairs if pair[0] in ids]
        content = {"classes": list(asked.classes), "pairs": pairs, "by_class": asked.by_class}
        write_json(target / "episodes.json", {split: content})
