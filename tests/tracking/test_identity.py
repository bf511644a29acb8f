import copy

import pytest

from lexiseg.errors import StageError
from lexiseg.pipeline import read_lock
from lexiseg.tracking.identity import is_own, lineage, method_fingerprint, method_of, methods_in, stage_name, stale


@pytest.fixture(scope="module")
def recorded(finished_tree):
    return read_lock(finished_tree)


@pytest.fixture
def lock(recorded):
    return copy.deepcopy(recorded)


def entry(lock, stage, kind, path):
    return next(entry for entry in lock[stage][kind] if entry["path"] == path)


def test_methods_predict_and_are_evaluated(lock):
    assert methods_in(lock) == ["linear", "lseg"]  # encode-evaluate is no method
    lock["lseg-evaluate"]["params"]["params.yaml"]["lseg.run"] = False
    assert methods_in(lock) == ["linear"]
    lock["lseg-evaluate"]["params"]["params.yaml"]["lseg.run"] = True
    assert methods_in(lock) == ["linear", "lseg"]
    del lock["lseg-predict"]
    assert methods_in(lock) == ["linear"]
    assert methods_in({}) == []


@pytest.fixture
def with_kmeans(lock):
    """Baselines of a group of their own, which run where STEGO does."""
    for kind in ("raw", "pca"):
        for part in ("predict", "evaluate"):
            stage = copy.deepcopy(lock[f"baseline-{part}@linear"])
            for entry in [*stage["deps"], *stage["outs"]]:
                entry["path"] = entry["path"].replace("baselines/linear", f"baselines/kmeans-{kind}")
            stage["params"]["params.yaml"]["stego.run"] = True
            lock[f"kmeans-{part}@{kind}"] = stage
    return lock


def test_baselines_of_another_group_have_its_name(with_kmeans):
    lock = with_kmeans
    assert methods_in(lock) == ["kmeans-pca", "kmeans-raw", "linear", "lseg"]
    assert stage_name(lock, "kmeans-raw", "evaluate") == "kmeans-evaluate@raw"
    assert stage_name(lock, "kmeans-pca", "predict") == "kmeans-predict@pca"
    assert stage_name(lock, "linear", "evaluate") == "baseline-evaluate@linear"
    assert stage_name(lock, "lseg", "evaluate") == "lseg-evaluate"
    assert stage_name(lock, "kmeans-raw", "register") not in lock  # only methods are registered
    own = [name for name in lock if is_own(name, "kmeans-raw")]
    assert own == ["kmeans-predict@raw", "kmeans-evaluate@raw"]
    assert [name for name in own if name in lineage(lock, "kmeans-evaluate@raw")] == own


def test_baselines_of_a_method_that_did_not_run_are_none(with_kmeans):
    for kind in ("raw", "pca"):
        with_kmeans[f"kmeans-evaluate@{kind}"]["params"]["params.yaml"]["stego.run"] = False
    assert methods_in(with_kmeans) == ["linear", "lseg"]


def test_fingerprints_of_baselines_of_another_group(with_kmeans):
    before = {kind: method_fingerprint(with_kmeans, f"kmeans-{kind}") for kind in ("raw", "pca")}
    assert before["raw"] != before["pca"]
    with_kmeans["kmeans-predict@raw"]["params"]["params.yaml"]["seed"] = 7
    assert method_fingerprint(with_kmeans, "kmeans-raw") != before["raw"]
    assert method_fingerprint(with_kmeans, "kmeans-pca") == before["pca"]


@pytest.mark.parametrize(
    ("stage", "method"),
    [
        ("lseg-train", "lseg"),
        ("encode-evaluate", "encode"),
        ("baseline-predict@linear", "linear"),
        ("baseline-predict@my-own", "my-own"),
        ("kmeans-evaluate@raw", "kmeans-raw"),
    ],
)
def test_the_method_of_a_stage(stage, method):
    assert method_of(stage) == method
    assert is_own(stage, method)
    part = stage.partition("@")[0].rpartition("-")[2]
    assert stage_name({stage: {}}, method, part) == stage


def test_lineage_ends_with_the_stage_itself(lock):
    assert lineage(lock, "lseg-evaluate") == ["prepare", "encode", "lseg-train", "lseg-predict", "lseg-evaluate"]
    assert "lseg-train" not in lineage(lock, "baseline-evaluate@linear")


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("lseg-train", lambda stage: stage["params"]["params.yaml"]["lseg.train"].update(lr=0.1)),
        ("lseg-evaluate", lambda stage: stage["params"]["params.yaml"]["evaluate"].update(protocol="world")),
        ("lseg-train", lambda stage: stage["deps"][2].update(md5="other code")),
        ("lseg-evaluate", lambda stage: stage["deps"][2].update(md5="other code")),
        ("lseg-train", lambda stage: stage["deps"][0].update(md5="other encoders")),
    ],
)
def test_fingerprint_follows_settings_code_and_what_comes_from_outside(lock, stage, change):
    before = {method: method_fingerprint(lock, method) for method in ("lseg", "linear")}
    change(lock[stage])
    assert method_fingerprint(lock, "lseg") != before["lseg"]
    assert method_fingerprint(lock, "linear") == before["linear"]


def test_fingerprint_leaves_out_what_cannot_change_a_number(lock):
    before = method_fingerprint(lock, "lseg")
    lock["lseg-register"]["params"]["params.yaml"]["lseg.predict"]["resize"] = [64, 64]
    lock["lseg-train"]["cmd"] = "another spelling"
    # What passes between the method's own stages follows from the rest.
    entry(lock, "lseg-predict", "deps", "outputs/lseg/train")["md5"] = "same settings, another machine"
    del lock["report"], lock["encode-evaluate"]
    assert method_fingerprint(lock, "lseg") == before
    assert len(before) == 64


def test_unknown_method(lock):
    with pytest.raises(StageError) as caught:
        method_fingerprint(lock, "tcl")
    assert "'tcl'" in caught.value.found
    assert "linear, lseg" in caught.value.allowed
    assert "dvc repro" in caught.value.fix


def test_stale_names_the_stage_and_what_it_used(lock):
    assert all(stale(lock, stage) == [] for stage in lock)
    entry(lock, "lseg-train", "outs", "outputs/lseg/train")["md5"] = "trained again"
    assert stale(lock, "lseg-evaluate") == ["lseg-predict used another outputs/lseg/train than there is now"]
    assert stale(lock, "baseline-evaluate@linear") == []
