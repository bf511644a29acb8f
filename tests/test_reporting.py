from __future__ import annotations

import pytest

from lexiseg.errors import StageError
from lexiseg.reporting import read_report, report_lines
from lexiseg.storage import write_json

METRICS = {"miou": 0.5, "miou_seen": 0.625, "miou_unseen": None, "pixel_accuracy": 1.0}


def row(method: str, split: str) -> dict:
    return {
        "method": method,
        "protocol": "world",
        "protocol_hash": "0123456789abcdef",
        "split": split,
        "seeds": [3],
        "metrics": METRICS,
    }


RESULT = {
    "results": [row("lseg", "test"), row("lseg", "stress"), row("baselines/linear", "test")],
    "encoders": {
        "retrieval": {"test": {"pairs": 64, "image_to_text_r1": 0.25, "text_to_image_r1": 0.125}, "stress": None},
        "stand_ins": {"Pole": "traffic light"},
    },
}


def test_a_table_for_every_split():
    lines = report_lines(RESULT)
    assert lines[0] == "split test, protocol world (01234567), seed 3"
    assert lines[1].split() == [
        "percent",
        "mIoU",
        *(f"mIoU_{n}" for n in ("seen", "unseen", "harmonic")),
        *lines[1].split()[5:],
    ]
    assert lines[2].split() == ["lseg", "50.0", "62.5", "–", "–", "100.0", "–", "–"]
    assert lines[3].split()[0] == "baselines/linear"
    assert "split stress, protocol world (01234567), seed 3" in lines


def test_episodes_have_columns_of_their_own():
    metrics = {"miou": 0.5, "fb_iou": 0.75, "episodes": 1000}
    lines = report_lines({**RESULT, "results": [{**row("lseg", "test"), "metrics": metrics}]})
    assert lines[1].split() == ["percent", "mIoU", "FB-IoU"]
    assert lines[2].split() == ["lseg", "50.0", "75.0"]


CLUSTERS = {"miou": 0.5, "pixel_accuracy": 0.75, "linear_miou": 0.625, "clusters_used": 1.0, "usage_entropy": 0.9}


def test_clusters_have_columns_of_their_own():
    metrics = {**CLUSTERS, "text_named_miou": 0.25, "boundary_f": None}
    lines = report_lines({**RESULT, "results": [{**row("stego", "test"), "metrics": metrics}]})
    names = ["mIoU", "pixel_accuracy", "linear_mIoU", "text_named_mIoU", "clusters_used", "boundary_f"]
    assert lines[1].split() == ["percent", *names]
    assert lines[2].split() == ["stego", "50.0", "75.0", "62.5", "25.0", "100.0", "–"]


def test_without_labels_there_are_fewer():
    metrics = {"clusters_used": 0.5, "usage_entropy": None, "mean_cosine": 0.875}
    lines = report_lines({**RESULT, "results": [{**row("stego", "test"), "metrics": metrics}]})
    assert lines[1].split() == ["percent", "clusters_used", "usage_entropy", "mean_cosine"]
    assert lines[2].split() == ["stego", "50.0", "–", "87.5"]


def test_columns_are_aligned():
    table = report_lines(RESULT)[1:4]
    assert len({len(line) for line in table}) == 1
    rows = [{**row(name, "test"), "metrics": CLUSTERS} for name in ("stego", "baselines/kmeans-whitened")]
    table = report_lines({**RESULT, "results": rows})[1:4]
    assert len({len(line) for line in table}) == 1
    assert table[2].startswith("baselines/kmeans-whitened ")


def test_the_encoders_and_their_stand_ins_are_named():
    text = "\n".join(report_lines(RESULT))
    assert text.count("R@1 image to text 25.0, text to image 12.5 (64 pairs)") == 1
    assert "note: `Pole` has no vector of its own, `traffic light` stands in" in text


def test_without_a_clip_there_is_no_retrieval():
    encoders = {"retrieval": None, "stand_ins": {}}
    assert "R@1" not in "\n".join(report_lines({**RESULT, "encoders": encoders}))


def test_the_report_is_read_from_the_outputs(tmp_path):
    write_json(tmp_path / "outputs/report/results.json", RESULT)
    assert read_report(tmp_path) == RESULT


def test_no_report_yet(tmp_path):
    with pytest.raises(StageError) as caught:
        read_report(tmp_path)
    assert caught.value.found == "no outputs/report/results.json"
    assert "finished graph" in caught.value.allowed
    assert "make repro" in caught.value.fix
