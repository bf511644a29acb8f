"""`lexiseg report`: the report stage's output as a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexiseg.errors import StageError
from lexiseg.storage import read_json

EPISODES = ("miou", "fb_iou")
COLUMNS = ("miou", "miou_seen", "miou_unseen", "miou_harmonic", "pixel_accuracy", "fw_iou", "boundary_f")


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
        columns = EPISODES if "fb_iou" in first["metrics"] else COLUMNS
        titles = [name.replace("miou", "mIoU").replace("fb_iou", "FB-IoU") for name in columns]
        lines.append(f"{'percent':<22}" + "".join(f"{title:>15}" for title in titles))
        for row in rows:
            cells = [row["metrics"].get(name) for name in columns]
            lines.append(
                f"{row['method']:<22}" + "".join(f"{'–' if c is None else format(100 * c, '.1f'):>15}" for c in cells)
            )
        recall = (result["encoders"]["retrieval"] or {}).get(split)
        if recall:
            lines.append(
                f"{'frozen CLIP':<22}R@1 image to text {100 * recall['image_to_text_r1']:.1f}, "
                f"text to image {100 * recall['text_to_image_r1']:.1f} ({recall['pairs']} pairs)"
            )
    for name, row in sorted(result["encoders"]["stand_ins"].items()):
        lines.append(f"note: `{name}` has no vector of its own, `{row}` stands in")
    return lines[1:]
