from __future__ import annotations

import json
from dataclasses import asdict, replace

from lexiseg.history import FILE, Took, best_match, peak_memory, recall, remember

TOOK = Took("train", {"steps": 2}, seconds=10.0, memory=1, disk=2, whole=True, finished="2026-01-01T00:00:00+00:00")


def test_what_is_remembered_is_recalled(tmp_path):
    assert recall(tmp_path) == []
    remember(tmp_path, TOOK)
    remember(tmp_path, replace(TOOK, seconds=11.0))
    assert recall(tmp_path) == [TOOK, replace(TOOK, seconds=11.0)]


def test_lines_of_a_killed_process_and_of_other_versions_are_passed_over(tmp_path):
    whole = json.dumps(asdict(TOOK))
    (tmp_path / FILE).write_text(f'{whole[:30]}\n{whole}\n{{"stage": "train"}}\n[1]\n', encoding="utf-8")
    assert recall(tmp_path) == [TOOK]


def test_whole_runs_go_before_resumed_ones_and_equal_settings_before_others():
    resumed = replace(TOOK, whole=False)
    other = replace(TOOK, params={"steps": 4})
    late = replace(TOOK, seconds=12.0)
    params = {"steps": 2}
    assert best_match([TOOK, late, other, resumed], "train", params) == late
    assert best_match([resumed, other], "train", params) == other
    assert best_match([resumed], "train", params) == resumed
    assert best_match([TOOK], "encode", params) is None


def test_peak_memory_is_that_of_a_python_process():
    assert 1e7 < peak_memory() < 1e11
