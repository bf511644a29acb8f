import copy
import json
import shutil
import subprocess

import pytest

from lexiseg.pipeline import hash_dependencies, read_lock
from lexiseg.storage import write_json, write_text
from lexiseg.tracking.identity import method_fingerprint
from lexiseg.tracking.records import read_record
from lexiseg.tracking.sync import gather
from lexiseg.tracking.workplace import Workplace


def place_of(tree):
    return Workplace(tree.root, read_lock(tree.root))


def test_record_of_a_method(tree):
    place = place_of(tree)
    record = read_record(place, "lseg")
    assert (record.method, record.experiment) == ("lseg", "lexiseg-tiny")
    assert record.fingerprint == method_fingerprint(place.lock, "lseg")
    assert record.metrics == {
        "test/miou": 0.5,
        "test/miou_seen": 0.6,
        "test/miou_unseen": 0.25,  # boundary_f is null, and `pairs` below a count
        "encode/test/image_to_text_r1": 0.75,
    }
    assert record.curves == {"train/loss": ((0, 1.0), (1, 0.5), (2, 0.333333))}
    assert record.params == {
        "data.name": "tiny",
        "data.workers": "2",
        "seed": "0",
        "encode.clip.source": "pretrain",
        "encode.clip.model": "null",
        "encode.stand_ins": "{}",
        "lseg.train.lr": "0.001",
        "lseg.train.crop": "null",
        "lseg.train.scale": "[0.5, 2.0]",
        "evaluate.protocol": "generic",
        "evaluate.splits": '["test"]',
    }
    assert list(record.files) == [
        "encode/metrics.json",
        "evaluate/metrics.json",
        "evaluate/pictures/test_0.png",
        "evaluate/tables/test_per_class.csv",
        "train/curve.csv",
    ]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tree.root, capture_output=True, text=True).stdout.strip()
    assert record.tags == {
        "lexiseg.fingerprint": record.fingerprint,
        "lexiseg.method": "lseg",
        "lexiseg.protocol": "generic",
        "lexiseg.protocol_hash": "a" * 64,
        "lexiseg.data_version": place.lock["prepare"]["deps"][0]["md5"],
        "lexiseg.commit": head,
        "lexiseg.profile": "tiny",  # as the report recorded it
        "lexiseg.seed": "0",
    }
    assert record.data == ("tiny", record.tags["lexiseg.data_version"])
    assert record.model is not None
    assert record.model.path == tree.root / "outputs/lseg/register"


def test_pictures_that_a_stage_draws_of_its_own_work(tree):
    write_text(tree.root / "outputs/lseg/train/pictures/similarities.png", "picture")
    tree.ran()
    record = read_record(place_of(tree), "lseg")
    assert record.files["train/similarities.png"] == tree.root / "outputs/lseg/train/pictures/similarities.png"


def test_record_of_a_baseline_has_no_curve_and_no_model(tree):
    record = read_record(place_of(tree), "linear")
    assert record.method == "baselines/linear"
    assert record.params["baseline.linear.steps"] == "5"
    assert (record.curves, record.model) == ({}, None)


def test_record_of_a_baseline_of_another_group(tree):
    """`kmeans-evaluate@raw` is the run "baselines/kmeans-raw", and no model."""
    root = tree.root / "outputs/baselines"
    for part in ("predict", "evaluate"):
        shutil.copytree(root / "linear" / part, root / "kmeans-raw" / part)
    tree.metrics("baselines/kmeans-raw", usage_entropy=0.75)
    lock = read_lock(tree.root)
    for part in ("predict", "evaluate"):
        stage = copy.deepcopy(lock[f"baseline-{part}@linear"])
        for entry in [*stage["deps"], *stage["outs"]]:
            entry["path"] = entry["path"].replace("baselines/linear", "baselines/kmeans-raw")
        lock[f"kmeans-{part}@raw"] = stage
    content = hash_dependencies(tree.root, [str(root / "kmeans-raw/evaluate/metrics.json")])
    next(out for out in lock["kmeans-evaluate@raw"]["outs"] if out["path"].endswith("metrics.json"))["md5"] = content[
        str(root / "kmeans-raw/evaluate/metrics.json")
    ]
    place = Workplace(tree.root, lock)
    assert place.why_not("kmeans-evaluate@raw") is None
    record = read_record(place, "kmeans-raw")
    assert (record.method, record.model, record.curves) == ("baselines/kmeans-raw", None, {})
    assert record.metrics["test/usage_entropy"] == 0.75
    assert "evaluate/tables/test_per_class.csv" in record.files
    assert record.fingerprint != read_record(place, "linear").fingerprint


def test_profile_before_the_report_ran(tree):
    lock = read_lock(tree.root)
    del lock["report"]
    assert read_record(Workplace(tree.root, lock), "lseg").tags["lexiseg.profile"] == "other"


@pytest.mark.parametrize("name", ["code.py", "new.py"])
def test_commit_is_dirty_when_code_differs_from_it(tree, name):
    write_text(tree.root / "src/lexiseg/methods/lseg" / name, "# edited\n")
    tree.ran()
    place = place_of(tree)
    assert read_record(place, "lseg").tags["lexiseg.commit"].endswith("-dirty")


def test_commit_is_dirty_when_code_was_edited_after_the_run(tree):
    write_text(tree.root / "src/lexiseg/evaluation/code.py", "# edited\n")
    tree.git("add", "-A")
    tree.git("commit", "-qm", "second")
    assert read_record(place_of(tree), "lseg").tags["lexiseg.commit"].endswith("-dirty")


def test_other_changes_do_not_make_it_dirty(tree):
    write_text(tree.root / "notes.txt", "hello")
    write_text(tree.root / "src/lexiseg/unrelated.py", "")
    assert not read_record(place_of(tree), "lseg").tags["lexiseg.commit"].endswith("-dirty")


def test_without_git(tree):
    (tree.root / ".git").rename(tree.root / "not-git")
    write_text(tree.root / ".dvc/config", "[core]\n    no_scm = true\n")
    place = place_of(tree)
    assert read_record(place, "lseg").tags["lexiseg.commit"] == "unknown"


def test_encoder_numbers_belong_to_the_encoders_that_were_used(tree):
    write_json(tree.root / "outputs/encode/text.json", {"name": "another"})
    tree.ran("encode", "encode-evaluate", "baseline-predict@linear", "baseline-evaluate@linear")
    # lseg's entries still say the encoders before.
    place = place_of(tree)
    assert place.why_not("lseg-evaluate") == "lseg-train used another outputs/encode than there is now"
    assert "encode/test/image_to_text_r1" in read_record(place, "linear").metrics
    assert "encode/test/image_to_text_r1" not in read_record(place, "lseg").metrics


def test_scores_need_not_be_on_disk(tree):
    for file in (tree.root / "outputs/lseg/predict").iterdir():
        file.unlink()
    assert place_of(tree).why_not("lseg-evaluate") is None


def test_results_that_do_not_belong_together_are_passed_over(tree, capsys):
    tree.metrics("lseg", miou=0.9)  # not what dvc.lock says
    (tree.root / "outputs/baselines/linear/evaluate/tables/test_per_class.csv").unlink()
    (tree.root / "outputs/baselines/linear/evaluate/tables").rmdir()
    assert gather(tree.root) == []
    said = capsys.readouterr().err
    assert "lseg is not published: outputs/lseg/evaluate/metrics.json is not what dvc.lock says" in said
    assert "linear is not published: outputs/baselines/linear/evaluate/tables is not on disk" in said
    assert "`dvc repro`" in said


def test_a_model_folder_of_another_training_is_passed_over(tree):
    lock = read_lock(tree.root)
    next(dep for dep in lock["lseg-register"]["deps"] if dep["path"] == "outputs/lseg/train")["md5"] = "before"
    assert read_record(Workplace(tree.root, lock), "lseg").model is None


def test_nothing_ran(tree, capsys):
    (tree.root / "dvc.lock").unlink()
    assert gather(tree.root) == []
    assert "nothing to publish" in capsys.readouterr().err


def test_extent_tells_names_not_values(tree):
    record = read_record(place_of(tree), "lseg")
    tree.metrics("lseg", miou=0.7)
    tree.ran()
    assert read_record(place_of(tree), "lseg").extent == record.extent
    tree.metrics("lseg", boundary_f=0.7)
    tree.ran()
    assert read_record(place_of(tree), "lseg").extent != record.extent
    assert json.loads((tree.root / "outputs/lseg/evaluate/metrics.json").read_text())["method"] == "lseg"
