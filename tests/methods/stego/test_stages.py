"""STEGO through its nodes, from features to a registered model, and k-means beside it."""

from __future__ import annotations

import csv
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.micro import save
from helpers.tiny import encoded, prepare_again, prepared, settings, validated, vocabulary_of

import lexiseg
from lexiseg.data.dataset import PreparedSplit
from lexiseg.errors import DataError, LabelError, ModelError
from lexiseg.evaluation.cluster_scores import ClusterMaps, map_names
from lexiseg.evaluation.predictions import read_predictions
from lexiseg.methods.stego import stages
from lexiseg.methods.stego.ablations import TABLES
from lexiseg.methods.stego.build import new_head, save_head
from lexiseg.methods.stego.diagnostics import diagnose
from lexiseg.methods.stego.features import FeatureStore
from lexiseg.methods.stego.model import build_head
from lexiseg.methods.stego.refine import refiner
from lexiseg.methods.stego.segmenter import StegoSegmenter
from lexiseg.methods.stego.stages import read_neighbours
from lexiseg.pipeline import read_graph
from lexiseg.settings import View
from lexiseg.stages import encode_trunk, evaluate, register
from lexiseg.stages.registry import stage_function
from lexiseg.storage import hash_tree, load_tensors, read_json, save_tensors, write_json
from lexiseg.workspace import model_identity, require_root

NAMED = {"evaluate.protocol": "generic"}
NODES = ("features", "neighbours", "train", "probe", "predict")


def run(node, inputs, root, changes=None):
    """One of STEGO's own nodes, with the settings that dvc.yaml declares for it and no others."""
    chosen = settings({**NAMED, **(changes or {})})
    out = root / node
    out.mkdir(parents=True)
    declared = read_graph(require_root())[f"stego-{node}"].params
    getattr(stages, node)(View(chosen, declared), inputs, out)
    return out


def built(root, *, counts, changes=None, prepare=None):
    """All of STEGO's nodes on a data set."""
    prepare = prepare or prepared(root, counts=counts)
    inputs = {"prepare": prepare, "encode": encoded(root / "encode", vocabulary=vocabulary_of(prepare))}
    inputs |= validated(root)
    chosen = settings({**NAMED, **(changes or {})})
    inputs["encode-trunk"] = root / "encode-trunk"
    inputs["encode-trunk"].mkdir()
    encode_trunk.run(chosen, inputs, inputs["encode-trunk"])
    for node in NODES:
        inputs[f"stego/{node}"] = run(node, inputs, root / "stego", changes)
    evaluate.run(chosen, inputs, root / "stego/evaluate", method="stego")
    inputs["stego/evaluate/metrics.json"] = root / "stego/evaluate/metrics.json"
    inputs["stego/evaluate/tables"] = root / "stego/evaluate/tables"
    inputs["stego/name"] = run("name", inputs, root / "stego", changes)
    register.run(chosen, inputs, root / "stego/register", method="stego")
    return SimpleNamespace(root=root, inputs=inputs)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return built(tmp_path_factory.mktemp("site"), counts={"train": 5, "iconic": 3, "test": 3})


def test_every_node_repeats_itself(site, tmp_path):
    for node in NODES:
        first = hash_tree(site.root / "stego" / node)
        assert first == hash_tree(run(node, site.inputs, tmp_path)), node
    assert "curve.csv" in hash_tree(site.root / "stego/train")
    assert "pictures/similarities.png" in hash_tree(site.root / "stego/train")
    assert "pictures/usage.png" in hash_tree(site.root / "stego/probe")


def test_training_reads_no_label(site, tmp_path, monkeypatch):
    for way in ("semantic", "__getitem__"):
        monkeypatch.setattr(f"lexiseg.data.dataset.PreparedSplit.{way}", lambda *_: pytest.fail("a label was read"))
    for node in ("features", "neighbours", "train"):
        run(node, site.inputs, tmp_path)
    run("probe", site.inputs, tmp_path / "1", {"stego.probe.linear": False, "stego.probe.kind": "gradient"})
    run("probe", site.inputs, tmp_path / "2", {"stego.protocol": "unlabelled", "stego.probe.clusters": 3})
    with pytest.raises(pytest.fail.Exception, match="a label was read"):
        run("probe", site.inputs, tmp_path / "3")


def test_predictions_are_maps_of_clusters_and_of_the_linear_probe(site):
    names, found = read_predictions(site.root / "stego/predict", "test")
    assert names == map_names(3, ("grass", "sky", "ring"))
    for _, maps in found:
        assert maps.shape == (3 + 5 + 3, 2, 2)


def test_metrics_of_clusters(site):
    content = read_json(site.inputs["stego/evaluate/metrics.json"])
    metrics = content["splits"]["test"]
    assert 0 < metrics["miou"] <= 1
    assert 0 < metrics["linear_miou"] <= 1
    assert sorted(content["clusters"]["names"]) == ["grass", "ring", "sky"]
    assert content["protocol"]["card"]["matching"] == {"split": "evaluated", "unmatched": "error", "clusters": 3}


def test_names_by_a_clip_are_worth_what_the_counts_say(site):
    naming = read_json(site.inputs["stego/name"] / "naming.json")
    assert sorted(naming["names"]) == ["grass", "ring", "sky"]
    with (site.inputs["stego/evaluate/tables"] / "test_cluster_classes.csv").open() as stream:
        header, *rows = csv.reader(stream)
    right = sum(int(row[header.index(name)]) for row, name in zip(rows, naming["names"], strict=True))
    total = sum(int(value) for row in rows for value in row[1:])
    assert naming["splits"]["test"]["text_named_accuracy"] == pytest.approx(right / total)


def test_a_changed_crf_is_scored_without_the_model(site, tmp_path, monkeypatch):
    for loader in ("segmenter.StegoSegmenter.load", "build.load_model", "build.load_trunk"):
        monkeypatch.setattr(f"lexiseg.methods.stego.{loader}", lambda *_, **__: pytest.fail("the model was loaded"))
    hashes = set()
    for number, iterations in enumerate((0, 2)):
        changes = {**NAMED, "stego.refine.crf_iterations": iterations}
        evaluate.run(settings(changes), site.inputs, tmp_path / f"{number}", method="stego")
        hashes.add(read_json(tmp_path / f"{number}/metrics.json")["protocol"]["hash"])
    assert len(hashes) == 2
    graph = read_graph(require_root())
    reading = {name.partition("@")[0] for name, node in graph.items() if "stego.refine" in node.params}
    assert reading == {"stego-evaluate", "stego-register", "kmeans-evaluate"}


@pytest.mark.parametrize("kind", ["raw", "pca", "whitened"])
def test_kmeans_beside_it_is_the_same_probe_on_other_features(site, tmp_path, kind):
    stages.kmeans_predict(settings(NAMED), site.inputs, tmp_path, kind=kind)
    config = read_json(tmp_path / "model/model.json")
    assert config["head"]["kind"] == {"raw": "none"}.get(kind, kind)
    inputs = {**site.inputs, f"baselines/kmeans-{kind}/predict": tmp_path}
    evaluate.run(settings(NAMED), inputs, tmp_path / "evaluate", method=f"baselines/kmeans-{kind}")
    theirs, ours = read_json(tmp_path / "evaluate/metrics.json"), read_json(site.inputs["stego/evaluate/metrics.json"])
    assert theirs["protocol"] == ours["protocol"]
    # As a head of STEGO's own graph it gives the same.
    if kind != "raw":
        head = {"stego.model.head": kind, "stego.train.steps": 0}
        inputs = {**site.inputs, "stego/train": run("train", site.inputs, tmp_path, head)}
        inputs["stego/probe"] = run("probe", inputs, tmp_path, head)
        assert (
            hash_tree(inputs["stego/probe"])["model.safetensors"] == hash_tree(tmp_path / "model")["model.safetensors"]
        )


def test_the_registered_model_gives_named_maps(site, tmp_path):
    model = lexiseg.load(site.root / "stego/register")
    assert sorted(model.own_labels) == ["grass", "ring", "sky"]
    image = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    result = model.segment(image)
    assert result.label_map.shape == (24, 40)
    # By words that name no cluster, the CLIP decides.
    other = model.segment(image, ["lawn", "a red ring"])
    assert other.labels == ("lawn", "a red ring")
    card = read_json(site.root / "stego/register/card.json")
    assert card["method"] == "stego"
    assert card["licences"]["backbone"].startswith("trained here")


@pytest.mark.parametrize("iterations", [0, 3])
def test_the_registered_model_gives_what_was_evaluated(site, tmp_path, iterations):
    changes = {**NAMED, "stego.refine.crf_iterations": iterations}
    evaluate.run(settings(changes), site.inputs, tmp_path / "evaluate", method="stego")
    inputs = {**site.inputs, "stego/evaluate/metrics.json": tmp_path / "evaluate/metrics.json"}
    register.run(settings(changes), inputs, tmp_path / "register", method="stego")
    model, split = lexiseg.load(tmp_path / "register"), PreparedSplit(site.inputs["prepare"], "test")
    names, found = read_predictions(site.root / "stego/predict", "test")
    refine = refiner(settings(changes).stego.refine.model_dump())
    classes = read_json(tmp_path / "evaluate/metrics.json")["clusters"]["names"]
    for id, saved in found:
        image = split.image(split.ids.index(id))
        maps = model._scorer.score_maps([image])[0]
        assert np.abs(maps - saved).max() < 2e-3  # saved with 16 bits
        logits = 2 * ClusterMaps.unpack(names, torch.from_numpy(maps)).cosines(height=16, width=16).numpy()
        evaluated = (logits if refine is None else refine(logits, image)).argmax(axis=0)
        result = model.segment(image)
        assert (np.array(result.labels)[result.label_map] == np.array(classes)[evaluated]).mean() > 0.99
        # Of some of the labels: the best cluster among theirs.
        two = model.segment(image, classes[:2])
        best = (logits if refine is None else refine(logits, image))[:2].argmax(axis=0)
        assert (two.label_map == best).mean() > 0.99


def test_large_pictures_are_refined_as_the_trunk_sees_them(site, monkeypatch):
    options = settings({**NAMED, "stego.predict.max_side": 16}).stego.predict.model_dump()
    segmenter = StegoSegmenter.load(site.root / "stego/register", predict=options)
    seen = []

    def refine(logits, picture):
        seen.append((logits.shape, picture.shape))
        return logits

    image = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    label_map, scores = segmenter.segment(image, segmenter.names, refine=refine)
    assert seen == [((3, 8, 16), (8, 16, 3))]
    assert label_map.shape == (32, 64)
    assert scores.shape == (3, 8, 16)


def test_a_model_without_a_clip_knows_its_own_names_alone(site, tmp_path):
    (site.root / "bare").mkdir()
    for file in ("model.json", "model.safetensors"):
        (site.root / "bare" / file).write_bytes((site.root / "stego/register" / file).read_bytes())
    (site.root / "bare/trunk").symlink_to(site.root / "stego/register/trunk")
    model = lexiseg.load(site.root / "bare")
    image = np.zeros((16, 16, 3), np.uint8)
    assert model.segment(image, ["grass", "sky"]).labels == ("grass", "sky")
    with pytest.raises(LabelError, match="which name no cluster"):
        model.segment(image, ["tiger"])


def test_the_paper_s_probe(site, tmp_path):
    changes = {"stego.probe.kind": "gradient", "stego.probe.extra": 2}
    folder = run("probe", site.inputs, tmp_path, changes)
    assert read_json(folder / "model.json")["clusters"] == 5
    header = (folder / "curve.csv").read_text().splitlines()[0]
    assert header == "step,cluster,linear"


def test_a_shift_rule_and_fixed_shifts(site, tmp_path):
    fixed = {"self_shift": 0.2, "knn_shift": 0.1, "random_shift": 0.5}
    changes = {"stego.loss.shifts": "fixed", **{f"stego.loss.{key}": value for key, value in fixed.items()}}
    table = read_json(run("train", site.inputs, tmp_path, changes) / "similarities.json")
    assert {kind: row["b"] for kind, row in table["shifts"].items()} == {"self": 0.2, "neighbours": 0.1, "random": 0.5}


def test_diagnose_reads_what_there_is(site, tmp_path):
    table, lines = diagnose(site.root / "stego", settings(NAMED).stego, seed=0, out=tmp_path)
    assert table["clusters"]["usage"]
    assert any(line.startswith("shift b of self pairs") for line in lines)
    assert {path.name for path in tmp_path.iterdir()} == {"similarities.png", "usage.png"}
    with pytest.raises(DataError, match=r"no index\.json"):
        diagnose(tmp_path, settings(NAMED).stego, seed=0, out=tmp_path)


def test_diagnose_refuses_features_of_another_trunk(site, tmp_path):
    shutil.copytree(site.root / "stego", tmp_path / "stego")
    config = read_json(tmp_path / "stego/train/model.json")
    config["head"] |= {"features": 5, "kind": "linear"}
    save_head(tmp_path / "stego/train", build_head(config["head"]), config)
    with pytest.raises(ModelError, match="and a head for 5") as caught:
        diagnose(tmp_path / "stego", settings(NAMED).stego, seed=0, out=tmp_path)
    assert "dvc repro stego-train" in caught.value.fix


@pytest.mark.parametrize("missing", ["features", "neighbours"])
def test_stages_that_did_not_run_say_so(site, tmp_path, missing):
    shutil.copytree(site.root / "stego", tmp_path / "stego")
    shutil.rmtree(tmp_path / "stego" / missing)
    write_json(tmp_path / "stego" / missing / "not-run.json", {"method": "stego", "run": False})
    with pytest.raises(DataError, match="says that its stage did not run") as caught:
        diagnose(tmp_path / "stego", settings(NAMED).stego, seed=0, out=tmp_path)
    assert "stego.run: true" in caught.value.fix


def test_a_crop_is_for_evaluation_and_not_for_use(site, tmp_path):
    changes = {"stego.predict.crop": 16, "stego.predict.max_side": None, "stego.predict.flip": True}
    prepare = prepared(tmp_path, height=24, width=40, counts={"test": 2})
    inputs = {**site.inputs, "prepare": prepare}
    inputs["stego/predict"] = run("predict", inputs, tmp_path, changes)
    assert {maps.shape[1:] for _, maps in read_predictions(inputs["stego/predict"], "test")[1]} == {(2, 2)}
    evaluate.run(settings({**NAMED, **changes}), inputs, tmp_path / "evaluate", method="stego")
    assert read_json(tmp_path / "evaluate/metrics.json")["protocol"]["card"]["centre_crop"] == 16
    segmenter = StegoSegmenter.load(
        site.root / "stego/register", predict=settings({**NAMED, **changes}).stego.predict.model_dump()
    )
    image = np.zeros((32, 64, 3), np.uint8)
    assert segmenter.segment(image, ["sky"])[1].shape == (1, 2, 4)


# ---- data and settings that do not fit ----------------------------------------------------------------------------


def test_fewer_pictures_than_neighbours(site, tmp_path):
    with pytest.raises(DataError, match="5 pictures to find 7 neighbours") as caught:
        run("neighbours", site.inputs, tmp_path, {"stego.neighbours.count": 7})
    assert "stego.neighbours.count" in caught.value.fix


def test_one_picture_only(site, tmp_path):
    inputs = {**site.inputs, "stego/features": run("features", site.inputs, tmp_path, {"stego.features.pictures": 1})}
    with pytest.raises(DataError, match="1 picture to find 2 neighbours"):
        run("neighbours", inputs, tmp_path)


def test_five_crops_make_five_of_one_picture(site, tmp_path):
    changes = {"stego.features.pictures": 1, "stego.features.five_crop": True}
    inputs = {**site.inputs, "stego/features": run("features", site.inputs, tmp_path, changes)}
    inputs["stego/neighbours"] = run("neighbours", inputs, tmp_path)
    assert read_neighbours(inputs["stego/neighbours"]).shape == (5, 2)
    run("train", inputs, tmp_path, changes)


def test_more_clusters_than_cells(site, tmp_path):
    with pytest.raises(DataError, match="20 feature vectors for 50 clusters"):
        run("probe", site.inputs, tmp_path, {"stego.probe.clusters": 50})


def test_constant_pictures_give_no_nan(tmp_path):
    prepare = prepared(tmp_path, counts={"train": 4, "test": 2})
    for split, count in (("train", 4), ("test", 2)):
        for number in range(count):
            save(tmp_path / f"raw/images/{split}/{number}.png", np.full((16, 16, 3), 40 * number, np.uint8))
    prepare = prepare_again(tmp_path)
    changes = {"stego.probe.clusters": 2, "stego.train.steps": 2}
    built(tmp_path / "site", counts={}, changes=changes, prepare=prepare)
    assert "nan" not in (tmp_path / "site/stego/train/curve.csv").read_text()


def test_data_without_labels(tmp_path):
    prepare = prepared(tmp_path, counts={"train": 4, "test": 2})
    for split in ("train", "test"):
        for mask in (tmp_path / "raw/masks" / split).glob("*.png"):
            mask.unlink()
    prepare = prepare_again(tmp_path)
    changes = {"stego.probe.clusters": 3, "stego.protocol": "unlabelled"}
    site = built(tmp_path / "site", counts={}, changes=changes, prepare=prepare)
    metrics = read_json(site.inputs["stego/evaluate/metrics.json"])["splits"]["test"]
    assert set(metrics) == {"clusters_used", "usage_entropy", "mean_cosine"}
    # Class names there are, and a CLIP: it names the clusters.
    assert set(lexiseg.load(tmp_path / "site/stego/register").own_labels) <= {"grass", "sky", "ring"}
    with pytest.raises(DataError, match="miou") as caught:
        evaluate.run(
            settings({**NAMED, **changes, "stego.protocol": "clusters"}), site.inputs, tmp_path / "x", method="stego"
        )
    assert "unlabelled" in caught.value.fix


def from_folder(folder, **more):
    """Settings that start from a model folder."""
    start = {"stego.model.init": str(folder), "stego.model.sha256": model_identity(folder)}
    return {**start, **{f"stego.{key.replace('__', '.')}": value for key, value in more.items()}}


def test_a_training_goes_on_from_a_model_folder(site, tmp_path):
    start = site.root / "stego/register"
    run("train", site.inputs, tmp_path / "as_it_is", from_folder(start, train__steps=0))
    run("train", site.inputs, tmp_path / "goes_on", from_folder(start, train__steps=2, model__dropout=0.5))
    before, kept, after = (
        load_tensors(folder / "model.safetensors")["head.linear.weight"]
        for folder in (start, tmp_path / "as_it_is/train", tmp_path / "goes_on/train")
    )
    assert torch.equal(before, kept)
    assert not torch.equal(before, after)
    changed = settings({**NAMED, **from_folder(start, model__dropout=0.5)}).stego.model
    head, config = new_head(changed, store=FeatureStore(site.inputs["stego/features"]), seed=0)
    assert (head.dropout, config["dropout"]) == (0.5, 0.5)


def test_kmeans_beside_an_imported_model_finds_centres_of_its_own(site, tmp_path):
    changes = {**NAMED, **from_folder(site.root / "stego/register", train__steps=0, probe__kind="model")}
    inputs = {**site.inputs, "stego/train": run("train", site.inputs, tmp_path, changes)}
    same = load_tensors(run("probe", inputs, tmp_path, changes) / "model.safetensors")["probe.centres"]
    assert torch.equal(same, load_tensors(site.root / "stego/register/model.safetensors")["probe.centres"])
    declared = read_graph(require_root())["kmeans-predict@raw"].params
    for kind in ("raw", "whitened"):
        stages.kmeans_predict(View(settings(changes), declared), inputs, tmp_path / kind, kind=kind)
        found = load_tensors(tmp_path / kind / "model/model.safetensors")["probe.centres"]
        assert found.shape != same.shape or not torch.equal(found, same)


def test_another_trunk_of_as_many_channels(site, tmp_path):
    shutil.copytree(site.inputs["encode-trunk"], tmp_path / "encode-trunk")
    tensors = load_tensors(tmp_path / "encode-trunk/model.safetensors")
    save_tensors(tmp_path / "encode-trunk/model.safetensors", {name: value + 1 for name, value in tensors.items()})
    with pytest.raises(ModelError, match="for a head that was trained on"):
        run("predict", {**site.inputs, "encode-trunk": tmp_path / "encode-trunk"}, tmp_path)


def test_a_clip_without_a_vit_names_nothing(site, tmp_path, monkeypatch):
    monkeypatch.setattr("lexiseg.encoders.clip.FrozenClip.is_dense", False)
    naming = read_json(run("name", site.inputs, tmp_path) / "naming.json")
    assert naming["names"] is None
    assert "no ViT" in naming["reason"]


def test_pictures_of_one_colour_cannot_be_whitened(tmp_path):
    prepared(tmp_path, counts={"train": 4, "test": 2})
    for split, count in (("train", 4), ("test", 2)):
        for number in range(count):
            save(tmp_path / f"raw/images/{split}/{number}.png", np.full((16, 16, 3), 90, np.uint8))
    flat = save_flat_features(tmp_path / "features")
    inputs = {"prepare": prepare_again(tmp_path), "stego/features": flat}
    with pytest.raises(DataError, match="the same everywhere") as caught:
        stages.kmeans_predict(settings(NAMED), inputs, tmp_path / "out", kind="whitened")
    assert "stego.baselines" in caught.value.fix


def save_flat_features(folder):
    """A store of four pictures whose features are all the same."""
    save_tensors(folder / "features-00000.safetensors", {"features": torch.full((4, 2, 2, 8), 0.37).half()})
    index = {"ids": list("0123"), "channels": 8, "height": 2, "width": 2, "shards": ["features-00000.safetensors"]}
    write_json(folder / "index.json", index)
    return folder


def test_a_folder_of_another_method(site, tmp_path):
    write_json(tmp_path / "train/model.json", {"method": "lseg"})
    with pytest.raises(ModelError, match="a model of 'lseg'"):
        run("probe", {**site.inputs, "stego/train": tmp_path / "train"}, tmp_path)


def test_stego_and_kmeans_do_not_run_where_it_is_off(tmp_path):
    chosen = settings({"stego.run": False})
    for name in ("stego-probe", "kmeans-predict@raw"):
        stage_function(name)(chosen, {}, tmp_path / name)
        assert read_json(tmp_path / name / "not-run.json") == {"method": "stego", "run": False}


@pytest.mark.parametrize(("table", "name"), [(table, name) for table in TABLES for name in TABLES[table]])
def test_every_variant_is_a_setting(table, name):
    assert settings({"stego.probe.clusters": None, **TABLES[table][name]}).stego
