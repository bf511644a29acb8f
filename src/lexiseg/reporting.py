"""`lexiseg report`: the report stage's output as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lexiseg.errors import StageError
from lexiseg.storage import read_json

EPISODES = ("miou", "fb_iou")
COLUMNS = ("miou", "miou_seen", "miou_unseen", "miou_harmonic", "pixel_accuracy", "fw_iou", "boundary_f")
CLUSTERS = ("miou", "pixel_accuracy", "linear_miou", "text_named_miou", "clusters_used", "boundary_f")
UNLABELLED = ("clusters_used", "usage_entropy", "mean_cosine")


def read_report(root: Path) -> dict[str, Any]:
    """The content of outputs/report/results.json.

    Raises:
        StageError: there is none yet.
    """
    path = root / "outputs" / "report" / "results.json"
    if not path.is_file():
        raise StageError(
            found=f"no {path.relative_to(root)}", allowed="a finished graph", fix="run `make repro` or `dvc repro`"
        )
    return read_json(path)


def report_lines(result: Mapping[str, Any]) -> list[str]:
    """Lines of text: one table per split and protocol, percent, and what needs to be known beside the numbers."""
    lines = []
    for split, protocol in dict.fromkeys((row["split"], row["protocol_hash"]) for row in result["results"]):
        rows = [row for row in result["results"] if (row["split"], row["protocol_hash"]) == (split, protocol)]
        first = rows[0]
        lines += [
            "",
            f"split {split}, protocol {first['protocol']} ({first['protocol_hash'][:8]}), seed {first['seeds'][0]}",
        ]
        columns = _columns(first["metrics"])
        titles = [name.replace("miou", "mIoU").replace("fb_iou", "FB-IoU") for name in columns]
        # Wide names make their column wider, so that there is a space before each.
        first_width = max([22, *(len(row["method"]) + 1 for row in rows)])
        widths = [max(15, len(title) + 1) for title in titles]
        lines.append(_line("percent", titles, first_width, widths))
        for row in rows:
            values = [row["metrics"].get(name) for name in columns]
            cells = ["–" if value is None else format(100 * value, ".1f") for value in values]
            lines.append(_line(row["method"], cells, first_width, widths))
        recall = (result["encoders"]["retrieval"] or {}).get(split)
        if recall and columns not in (CLUSTERS, UNLABELLED):  # which are found without a CLIP
            lines.append(
                f"{'frozen CLIP':<22}R@1 image to text {100 * recall['image_to_text_r1']:.1f}, "
                f"text to image {100 * recall['text_to_image_r1']:.1f} ({recall['pairs']} pairs)"
            )
    for name, row in sorted(result["encoders"]["stand_ins"].items()):
        lines.append(f"note: `{name}` has no vector of its own, `{row}` stands in")
    return lines[1:]


def _line(first: str, cells: Sequence[str], first_width: int, widths: Sequence[int]) -> str:
    return f"{first:<{first_width}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _columns(metrics: Mapping[str, Any]) -> tuple[str, ...]:
    if "fb_iou" in metrics:
        return EPISODES
    if "clusters_used" in metrics:
        return CLUSTERS if "miou" in metrics else UNLABELLED
    return COLUMNS
