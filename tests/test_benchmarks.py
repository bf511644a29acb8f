"""The scripts in benchmarks/ at a tiny size: that they run, what they check, what they write. Never how fast."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.tiny import open_clip_model
from helpers.working_tree import run

from benchmarks import (
    crf,
    harness,
    lseg_inference,
    lseg_memory,
    lseg_training,
    metrics,
    neighbours,
    networks,
    pamr,
    pipeline,
    plain,
    promotion_error,
    serving,
    stego_loss,
    tcl_training,
)
from lexiseg.errors import StageError
from lexiseg.evaluation.image_counts import ImageCounts
from lexiseg.history import Took, remember
from lexiseg.storage import read_json, write_text

ROOT = Path(__file__).parents[1]
SCRIPTS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "def main(" in path.read_text()]
RESULTS = sorted((ROOT / "benchmarks/results").glob("*.json"))
VIT = ["--model", "vit_tiny_patch16_224", "--features", "8"]


@pytest.fixture
def small_clip(tmp_path):
    """Name of a small architecture of open_clip that is known in this process."""
    open_clip_model(tmp_path / "configs")
    return "lexiseg-test"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def only_result(folder):
    (path,) = folder.glob("*.json")
    return path, read_json(path)


# ---- the arithmetic ----------------------------------------------------------------------------------------------


def clock_of(order, seconds):
    """A clock under which each run takes what is said, and candidates that note when they run."""
    now = [0.0]

    def candidate(name):
        def run():
            order.append(name)
            now[0] += seconds[name].pop(0)

        return run

    return {name: candidate(name) for name in seconds}, lambda: now[0]


def test_candidates_take_turns():
    order = []
    candidates, clock = clock_of(order, {name: [1.0] * 3 for name in "abc"})
    harness.compare(candidates, repeats=2, warmup=1, clock=clock)
    assert order == [*"abc", *"cba", *"abc"]


def test_median_spread_and_ratios():
    candidates, clock = clock_of([], {"ours": [9.0, 1.0, 2.0, 4.0], "peer": [9.0, 4.0, 4.0, 6.0]})
    found = harness.compare(candidates, repeats=3, warmup=1, clock=clock)
    assert found["seconds"]["ours"] == {"median": 2.0, "quartiles": [1.5, 3.0], "all": [1.0, 2.0, 4.0]}
    assert found["seconds"]["peer"] == {"median": 4.0, "quartiles": [4.0, 5.0], "all": [4.0, 4.0, 6.0]}
    ratio = found["times_as_long"]
    assert list(ratio) == ["peer"]  # the first is what it is compared with
    assert ratio["peer"]["of_medians"] == 2.0
    assert ratio["peer"]["quartiles"] == [1.75, 3.0]  # of 4/1, 4/2 and 6/4
    assert ratio["peer"]["range"] == [1.5, 4.0]
    lines = harness.table(found, per=2, unit="picture").splitlines()
    assert "1000.00 ms/picture  (750.00 to 1500.00)" in lines[0]
    assert "2.00 times as long (1.50 to 4.00)" in lines[1]


def test_one_round_is_its_own_spread():
    candidates, clock = clock_of([], {"ours": [2.0], "peer": [3.0]})
    found = harness.compare(candidates, repeats=1, warmup=0, clock=clock)
    assert found["seconds"]["ours"]["quartiles"] == [2.0, 2.0]
    assert found["times_as_long"]["peer"]["range"] == [1.5, 1.5]


def test_shares_of_what_is_saved():
    seconds = {"lexiseg": 1.0, lseg_inference.PLAIN: 5.0, lseg_inference.GIVEN: 2.0}
    found = lseg_inference.shares({"seconds": {name: {"median": value} for name, value in seconds.items()}})
    assert found == {"saved_seconds": 4.0, "by_text_vectors": 0.75, "by_the_rest": 0.25}


def test_the_peer_s_arrays():
    # 10,000 labels at 360 x 480 and at half of it, four bytes each
    assert lseg_memory.peer_arrays(10_000, 360, 480) == 4 * 10_000 * (360 * 480 + 180 * 240)
    assert lseg_memory.peer_arrays(1, 3, 5) == 4 * (15 + 6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "intel-xeon-cpu-2.20ghz"),
        ("NVIDIA H200", "nvidia-h200"),
        ("2.15.0+cu128", "2.15.0-cu128"),
        ("lseg_training-ViT-L/16", "lseg_training-vit-l-16"),
    ],
)
def test_words_in_the_name_of_a_file(text, expected):
    assert harness.slug(text) == expected


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", "metrics-amd-epyc-2-cores-torch2.15.0-fp32.json"),
        ("cuda", "metrics-nvidia-h200-torch2.15.0-fp32.json"),
        ("cuda:1", "metrics-nvidia-h200-torch2.15.0-fp32.json"),
    ],
)
def test_a_file_is_named_after_the_hardware_that_did_the_work(device, expected):
    hardware = {"processor": "AMD EPYC", "cores": 2, "gpu": "NVIDIA H200"}
    made = {"device": device, "hardware": hardware, "versions": {"torch": "2.15.0"}}
    assert harness.file_name("metrics", made, precision="fp32") == expected


# ---- memory ------------------------------------------------------------------------------------------------------


def test_memory_is_the_child_s_own(small_clip, tmp_path):
    held = np.ones(100_000_000)  # 800 MB that are not the child's
    options = {"model": VIT[1], "features": 8, "text_dim": 8, "labels": 3, "size": [32, 32], "batch": 2}
    options |= {"precision": "fp32", "device": "cpu", "threads": 1}
    found = harness.peak_memory("lseg_training:memory_of", name="lexiseg", options=options)
    assert harness.peak_bytes() > held.nbytes + found["imports_bytes"] / 2
    assert 50e6 < found["imports_bytes"] < found["peak_bytes"]
    assert found["work_bytes"] == found["peak_bytes"] - found["imports_bytes"]
    assert found["work_bytes"] < held.nbytes
    assert found["result"] == {"cuda_bytes": None}


def test_a_child_that_fails():
    with pytest.raises(RuntimeError, match="nowhere:nothing ended with 1"):
        harness.peak_memory("nowhere:nothing")


# ---- what the benchmarks run -------------------------------------------------------------------------------------


def test_labels_are_all_different():
    names = networks.labels(10_880)
    assert len(set(names)) == 10_880
    assert names[:20] == networks.labels(20)
    with pytest.raises(ValueError, match="10881 labels; there are words for 10880"):
        networks.labels(10_881)


def test_a_picture_is_smooth():
    image = networks.picture(height=40, width=60)
    assert (image.shape, image.dtype) == ((40, 60, 3), np.uint8)
    assert (image.min(), image.max()) == (0, 255)
    assert np.abs(np.diff(image.astype(int), axis=1)).mean() < 20
    assert np.array_equal(image, networks.picture(height=40, width=60))
    assert not np.array_equal(image, networks.picture(height=40, width=60, seed=1))


@pytest.mark.parametrize("block", ["none", "bottleneck", "depthwise"])
def test_the_plain_form_computes_the_same(tmp_path, block):
    model, config = networks.random_network(tmp_path, text_dim=8, backbone=VIT[1], features=8, block=block)
    assert config["mean"] == [0.5, 0.5, 0.5]
    pictures = np.stack([networks.picture(height=32, width=48, seed=seed) for seed in (5, 6)])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).double() / 127.5 - 1
    text = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    text = text / text.norm(dim=-1, keepdim=True)
    with torch.no_grad():
        found, expected = plain.plain_logits(model.double(), images, text, size=(32, 48)), model(images, text)
    assert found.shape == (2, 5, 32, 48)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert len(found.argmax(dim=1).unique()) > 1  # pixels differ, or equal maps would prove nothing


# ---- the scripts -------------------------------------------------------------------------------------------------


def test_metrics(tmp_path, capsys):
    options = ["--classes", "3", "12", "--pictures", "2", "--size", "40", "--repeats", "2", "--threads", "1"]
    metrics.main([*options, "--out", str(tmp_path)])
    path, result = only_result(tmp_path)
    assert path.name.startswith("metrics-")
    assert path.name.endswith(f"-torch{harness.slug(version('torch'))}-int64.json")
    assert result["made_with"]["threads"] == 1
    assert result["made_with"]["device"] == "cpu"
    assert result["made_with"]["versions"]["torchmetrics"] == version("torchmetrics")
    assert result["settings"] == {"repeats": 2, "classes": [3, 12], "pictures": 2, "size": 40}
    assert [row["classes"] for row in result["rows"]] == [3, 12]
    for row in result["rows"]:
        assert 0 < row["miou"]["lexiseg"] < 1
        assert row["miou"]["torchmetrics"] == pytest.approx(row["miou"]["lexiseg"], abs=1e-6)
        assert len(row["seconds"]["torchmetrics, unchecked"]["all"]) == 2
    assert "ms/picture" in capsys.readouterr().out


def test_nothing_is_timed_where_values_differ(monkeypatch):
    monkeypatch.setattr(metrics, "ours", lambda classes, pairs: 0.0)
    monkeypatch.setattr(metrics, "compare", pytest.fail)
    with pytest.raises(AssertionError, match="3 classes: the values differ"):
        metrics.main(["--classes", "3", "--pictures", "1", "--size", "20"])


def test_lseg_inference(tmp_path, small_clip):
    options = [*VIT, "--clip", small_clip, "--labels", "3", "6", "--size", "40", "64", "--repeats", "1"]
    lseg_inference.main([*options, "--out", str(tmp_path / "out")])
    path, result = only_result(tmp_path / "out")
    assert path.name.startswith("lseg_inference-vit_tiny_patch16_224-")
    assert [row["labels"] for row in result["rows"]] == [3, 6]
    for row in result["rows"]:
        assert row["equal_pixels"] >= 0.999
        assert row["labels_found"] > 1
        assert set(row["seconds"]) == {"lexiseg", lseg_inference.PLAIN, lseg_inference.GIVEN}


def test_lseg_memory(tmp_path, small_clip):
    options = [*VIT, "--clip", small_clip, "--labels", "9", "--size", "32", "48", "--blocks", "bottleneck"]
    lseg_memory.main([*options, "--peer", "always", "--out", str(tmp_path / "out")])
    path, result = only_result(tmp_path / "out")
    assert path.name.startswith("lseg_memory-vit_tiny_patch16_224-")
    (row,) = result["rows"]
    assert (row["labels"], row["block"], row["limit_bytes"]) == (9, "bottleneck", 4_000_000_000)
    assert row["lexiseg"]["imports_bytes"] < row["lexiseg"]["result"]["loaded_bytes"] <= row["lexiseg"]["peak_bytes"]
    assert row["peer"]["how"] == "measured"
    assert row["peer"]["peak_bytes"] > row["peer"]["imports_bytes"]


def test_a_peer_that_would_not_fit_is_not_run(monkeypatch):
    monkeypatch.setattr(lseg_memory, "peak_memory", pytest.fail)
    case = {"count": 10**9, "height": 360, "width": 480}
    computed = {"how": "computed", "peak_bytes": lseg_memory.peer_arrays(10**9, 360, 480)}
    assert lseg_memory.of_peer(case, block="none", measure="auto") == computed
    assert lseg_memory.of_peer({**case, "count": 1}, block="none", measure="never")["how"] == "computed"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lseg_training(tmp_path, monkeypatch, precision):
    # What takes a process for each candidate is tried above.
    memory = {"peak_bytes": 1, "imports_bytes": 0, "work_bytes": 1, "result": {"cuda_bytes": None}}
    monkeypatch.setattr(lseg_training, "peak_memory", lambda *_, **__: memory)
    # A processor without instructions for bf16 takes minutes for large products of them.
    monkeypatch.setitem(lseg_training.PEAK_SIDES, "cpu", 128)
    options = ["--model", VIT[1], "--features", "32", "--labels", "7", "--size", "64", "48", "--batch", "2"]
    options += ["--repeats", "1", "--precision", precision]
    lseg_training.main([*options, "--out", str(tmp_path)])
    path, result = only_result(tmp_path)
    assert path.name.startswith("lseg_training-vit_tiny_patch16_224-")
    assert path.name.endswith(f"-{precision}.json")
    (row,) = result["rows"]
    assert sorted(row["losses"]) == sorted(row["candidates"]) == sorted(lseg_training.CANDIDATES)
    assert row["losses"]["lexiseg"][0] > row["losses"]["lexiseg"][-1]  # it learns
    for candidate in row["candidates"].values():
        assert candidate["operations"] > 1e6
        assert candidate["share_of_peak"] > 0
        assert candidate["memory"] == memory


def test_losses_that_differ(tmp_path):
    options = {"model": VIT[1], "features": 8, "text_dim": 8, "labels": 3, "size": [32, 32], "batch": 2}
    given = argparse.Namespace(**options, device="cpu")
    first, data = lseg_training.network(given), lseg_training.data_for(given)
    other = (data[0], data[1], data[2].flip(0))
    steps = {
        "lexiseg": lseg_training.Step("lexiseg", first, data, precision="fp32"),
        "plain": lseg_training.Step("plain", lseg_training.network(given), other, precision="fp32"),
    }
    with pytest.raises(AssertionError, match="the losses differ"):
        lseg_training.check_losses(steps, tolerance=1e-4)


def test_pipeline(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "read_graph", lambda _: {"prepare": SimpleNamespace(params=["data.name"])})
    write_text(tmp_path / "params.yaml", "data:\n  name: world\n")
    private = tmp_path / ".lexiseg"
    monkeypatch.setattr(pipeline, "private_folder", lambda _: private)
    private.mkdir()
    with pytest.raises(StageError, match="no whole run of prepare"):
        pipeline.rows_of(tmp_path)
    for seconds, name, whole in (
        (9.0, "world", True),
        (2.0, "world", True),
        (1.0, "world", False),
        (5.0, "other", True),
    ):
        how = {"memory": 10, "disk": 1, "finished": "2026-01-01T00:00:00+00:00"}
        remember(private, Took("prepare", {"data.name": name}, seconds, whole=whole, **how))
    pipeline.main(["--root", str(tmp_path), "--out", str(tmp_path / "out")])
    path, result = only_result(tmp_path / "out")
    assert path.name.startswith("pipeline-")
    assert result["rows"] == [{"stage": "prepare", "seconds": 2.0, "memory_bytes": 10}]
    assert "2.0 s" in capsys.readouterr().out


@pytest.mark.slow
def test_serving(tmp_path, micro_tree):
    run(micro_tree, "lexiseg", "sync")
    options = ["--clients", "2", "--requests", "2", "--repeats", "1", "--threads", "1", "--root", str(micro_tree)]
    serving.main([*options, "--out", str(tmp_path / "out")])
    path, result = only_result(tmp_path / "out")
    assert path.name.startswith("serving-")
    assert result["made_with"]["versions"]["mlflow"] == version("mlflow")
    assert "root" not in result["settings"]
    (row,) = result["rows"]
    assert (row["clients"], row["requests"]) == (2, 4)
    assert set(row["requests_seen"]) == set(row["per_second"]) == set(row["seconds"])
    ours = row["requests_seen"]["lexiseg"]
    assert 0 < ours["latency_ms"]["p50"] <= ours["latency_ms"]["p99"]
    assert ours["phases_ms"]["vision"]["p50"] > 0
    assert row["requests_seen"]["mlflow"]["phases_ms"] == {}


def test_servers_that_answer_differently(monkeypatch):
    def answer(label_map):
        row = {"label_map": label_map, "legend": "[]", "segments": '[{"area": 1.0, "score": null}]'}
        return SimpleNamespace(ask=lambda _: SimpleNamespace(json=lambda: {"predictions": [row]}))

    serving.check_answers({"lexiseg": answer("a"), "mlflow": answer("a")})  # type: ignore[dict-item]
    with pytest.raises(AssertionError, match="mlflow answers otherwise than lexiseg"):
        serving.check_answers({"lexiseg": answer("a"), "mlflow": answer("b")})  # type: ignore[dict-item]


def test_the_page_has_the_commands():
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    commands = re.findall(r"`(python benchmarks/(\w+)\.py[^`]*)`", page)
    assert {script for _, script in commands} == {path.stem for path in SCRIPTS}
    for command, script in commands:
        assert f"    {command}\n" in (ROOT / f"benchmarks/{script}.py").read_text(encoding="utf-8")


def test_a_script_runs_by_its_path(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/metrics.py", "--classes", "3", "--pictures", "1", "--size", "20"]
    done = subprocess.run([*command, "--repeats", "1"], cwd=tmp_path, text=True, capture_output=True, check=True)
    assert done.stdout.startswith("3 classes, mIoU 0.")
    assert list(tmp_path.iterdir()) == []  # without --out nothing is written


# ---- what is published -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", RESULTS, ids=[file.stem for file in RESULTS])
def test_a_result_file_says_how_it_was_measured(file):
    result = read_json(file)
    made = result["made_with"]
    assert (ROOT / "benchmarks" / made["command"].split()[0]).is_file()
    assert re.fullmatch("[0-9a-f]{40}", made["commit"]), "published numbers are of a commit, without changes since"
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", made["date"])
    assert made["versions"]["python"]
    assert made["versions"]["torch"]
    assert made["hardware"]["processor"]
    assert result["rows"]
    if "benchmark" in result:
        precision = file.stem.rpartition("-")[2]
        assert file.name == harness.file_name(result["benchmark"], made, precision=precision)
        assert made["threads"] >= 1


def test_pamr(tmp_path):
    pamr.main(["--classes", "3", "--side", "32", "--repeats", "1", "--threads", "1", "--out", str(tmp_path)])
    path, result = only_result(tmp_path)
    assert path.name.startswith("pamr-")
    (row,) = result["rows"]
    assert set(row["seconds"]) == set(row["memory"]) == set(pamr.CANDIDATES)
    assert row["largest_difference"] < pamr.TOLERANCE


STEGO = ["--batch", "3", "--channels", "8", "--side", "4", "--dim", "5", "--points", "9", "--repeats", "1"]


@pytest.mark.parametrize("layout", ["tokens", "planes"])
def test_stego_loss(tmp_path, layout):
    stego_loss.main([*STEGO, "--layout", layout, "--out", str(tmp_path)])
    path, result = only_result(tmp_path)
    assert path.name.startswith("stego_loss-")
    (row,) = result["rows"]
    assert set(row["seconds"]) == {"lexiseg", "plain"}
    assert row["largest_difference"] < stego_loss.TOLERANCE


def test_stego_loss_compares_before_it_times(monkeypatch):
    monkeypatch.setattr(stego_loss, "plain", lambda given: 2 * stego_loss.ours(given))
    with pytest.raises(AssertionError, match="loss or gradients differ"):
        stego_loss.main(STEGO)


def test_neighbours(tmp_path):
    neighbours.main(["--pictures", "60", "--channels", "8", "--count", "5", "--repeats", "1", "--out", str(tmp_path)])
    _, result = only_result(tmp_path)
    (row,) = result["rows"]
    assert set(row["seconds"]) == set(row["memory"]) == {"lexiseg", "scikit-learn"}
    assert result["made_with"]["versions"]["scikit-learn"] == version("scikit-learn")


def test_neighbours_compares_before_it_times(monkeypatch):
    monkeypatch.setattr(neighbours, "ours", lambda vectors, count: torch.zeros(len(vectors), count + 1))
    with pytest.raises(AssertionError, match="the similarities differ"):
        neighbours.main(["--pictures", "60", "--channels", "8", "--count", "5"])


@pytest.fixture
def stand_in(monkeypatch):
    """The compiled peer is no part of a test environment: lexiseg itself takes its place."""
    monkeypatch.setattr(crf, "pydensecrf", crf.ours)
    monkeypatch.setattr(harness, "version", lambda package: "1")


def test_crf(tmp_path, stand_in):
    crf.main(["--side", "32", "--labels", "3", "--repeats", "1", "--iterations", "2", "--out", str(tmp_path)])
    _, result = only_result(tmp_path)
    assert [row["picture"] for row in result["rows"]] == ["drawn 0", "drawn 1", "drawn 2"]
    assert all(row["equal_labels"] == 1.0 and 0 < row["changed_labels"] < 1 for row in result["rows"])
    assert all(row["from_exact"]["lexiseg"]["equal_labels"] > 0.95 for row in result["rows"])


def test_crf_accuracy_alone(tmp_path, monkeypatch, stand_in, capsys):
    monkeypatch.setattr(crf, "compare", pytest.fail)
    monkeypatch.setattr(crf, "SMALL", {"side": 24, "labels": 4})
    crf.main(["--accuracy", "--iterations", "3", "--out", str(tmp_path)])
    path, result = only_result(tmp_path)
    assert path.name.startswith("crf-accuracy-")
    assert result["settings"] == {"accuracy": True, "iterations": 3, "pictures": None}
    for row in result["rows"]:
        assert row.keys() == {"picture", "from_exact"}
        found = row["from_exact"]
        assert (found["side"], found["labels"]) == (24, 4)
        assert found["lexiseg"] == found["pydensecrf2"]  # the stand-in
        assert 0 < found["lexiseg"]["mean_difference"] < 0.05 < found["lexiseg"]["largest_difference"] <= 1
    assert capsys.readouterr().out.count("4 labels on 24 x 24") == 3


def test_crf_is_near_exact_inference_or_nothing_is_timed(monkeypatch, stand_in):
    monkeypatch.setattr(crf, "ours", lambda image, shares, iterations, **_: shares[0].flip(0).numpy())
    with pytest.raises(AssertionError, match="have the labels of exact inference"):
        crf.main([])


def test_crf_compares_before_it_times(monkeypatch, stand_in):
    monkeypatch.setattr(crf, "pydensecrf", lambda image, shares, iterations, **_: shares[0].flip(0).numpy())
    with pytest.raises(AssertionError, match="% of the pixels have equal labels"):
        crf.main(["--side", "32", "--labels", "3"])


def test_pamr_compares_before_it_times(monkeypatch):
    monkeypatch.setitem(pamr.CANDIDATES, "plain, one by one", lambda image, masks: masks)
    with pytest.raises(AssertionError, match="the masks differ"):
        pamr.main(["--classes", "2", "--side", "32"])


def test_tcl_training(tmp_path, small_clip):
    small = ["--model", small_clip, "--size", "16", "--batch", "2", "--pairs", "3", "--few", "2", "--side", "4"]
    tcl_training.main([*small, "--repeats", "1", "--threads", "1", "--out", str(tmp_path)])
    path, found = only_result(tmp_path)
    assert path.name.startswith("tcl_training")
    memory, timed = found["rows"][:3], found["rows"][3]
    assert [(row["form"], row["pairs"]) for row in memory] == [("lexiseg", 3), ("lexiseg", 2), ("as it reads", 2)]
    # Both processes saw the same pairs, and made the same of them.
    assert memory[1]["memory"]["result"] == pytest.approx(memory[2]["memory"]["result"], rel=1e-4)
    # All parts beside the whole.
    assert timed["seconds"].keys() - timed["times_as_long"].keys() == {"whole step"}


def test_tcl_training_compares_before_it_measures(monkeypatch, small_clip):
    monkeypatch.setitem(tcl_training.FORMS, "as it reads", lambda embedding, text: embedding.sum())
    with pytest.raises(AssertionError, match="the two forms of TCL_f differ"):
        tcl_training.main(["--model", small_clip, "--size", "16"])


def test_promotion_error(tmp_path, micro_tree, monkeypatch):
    monkeypatch.setattr(promotion_error, "ROOT", micro_tree)
    out = tmp_path / "error.json"
    monkeypatch.setattr(sys, "argv", ["promotion_error.py", "--pairs", "2", "--images", "3", "--out", str(out)])
    promotion_error.main()
    rows = read_json(out)["rows"]
    assert [row["models"] for row in rows] == [list(pair) for pair in promotion_error.MODELS]
    assert all(row["pairs"] == 2 and 0 <= row["promoted"] <= 2 for row in rows)


def test_a_pair_of_equal_models_shares_two_answers():
    def model(right: int) -> ImageCounts:
        return ImageCounts(tuple("abc"), ("sky",), *(np.full((3, 1), value) for value in (right, 9, right)))

    rows, coin = np.array([2, 0]), np.array([True, False])
    one, other = promotion_error.exchanged(model(7), model(4), rows, coin)
    assert one.ids == other.ids == ("c", "a")
    assert (one.intersection.ravel().tolist(), other.intersection.ravel().tolist()) == ([7, 4], [4, 7])
