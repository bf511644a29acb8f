"""Official checkpoints -> model folders, against a second implementation of the network on the official names."""

from __future__ import annotations

import hashlib
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.official_lseg import write_checkpoint as write_lseg
from helpers.official_stego import VIT, as_map, head, lookup, vit, vit_state
from helpers.official_tcl import random_state as tcl_state
from helpers.stego_checkpoint import CLASSES, DIM, EXTRA, SETTINGS, SIZES, random_state, write_checkpoint
from helpers.tiny import SMALL, encoded, prepared, settings, text_table, timm_backbone
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import lexiseg
from lexiseg.cli import app
from lexiseg.data.label_maps import CITYSCAPES27, COCOSTUFF27, POTSDAM3
from lexiseg.errors import LabelError, ModelError, SettingsError
from lexiseg.evaluation.cluster_scores import ClusterMaps
from lexiseg.foreign import ForeignCheckpoint, read_checkpoint
from lexiseg.importing import import_model
from lexiseg.methods.stego import stages
from lexiseg.methods.stego.checkpoint import import_checkpoint
from lexiseg.settings import override, read_yaml
from lexiseg.stages import encode_trunk
from lexiseg.stages.settings import parse_settings, read_values
from lexiseg.storage import hash_tree, load_tensors, read_json, write_json
from lexiseg.workspace import model_identity


def pictures(height=32, width=48, count=1):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def official(state, images, *, kind="nonlinear", facet="feat", sizes=SIZES):
    """Codes by the official way: mean of the picture's and of its mirror image's."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
    body = {name.removeprefix("net.model."): value for name, value in state.items() if name.startswith("net.model.")}
    net = {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.cluster")}

    def codes(x):
        tokens = vit(body, sizes, x)[1 if facet == "KK" else 0]
        features = as_map(tokens, x, sizes["patch"])
        if kind == "none":
            return features
        if kind == "nonlinear":
            return head(net, features)
        return F.conv2d(features, net["cluster1.0.weight"], net["cluster1.0.bias"])

    return (codes(pixels) + codes(pixels.flip(-1)).flip(-1)) / 2


def imported(state, *, file_settings=None, **options):
    checkpoint = ForeignCheckpoint(file="x.ckpt", sha256="", tensors=state, settings={"cfg": file_settings or {}})
    return import_checkpoint(checkpoint, options)


@pytest.mark.parametrize("facet", ["feat", "KK"])
@pytest.mark.parametrize(("kind", "said"), [("nonlinear", "nonlinear"), ("linear", "linear"), ("none", None)])
def test_the_model_computes_what_the_official_one_does(tmp_path, kind, said, facet):
    state = random_state(kind=kind)
    file = write_checkpoint(
        tmp_path / "a.ckpt", state=state, settings={"projection_type": said, "dino_feat_type": facet}
    )
    import_model("stego", file, out=tmp_path / "model")
    scorer = lexiseg.load(tmp_path / "model")._scorer
    images = pictures(count=2)
    expected = official(state, images, kind=kind, facet=facet)
    torch.testing.assert_close(scorer.codes(images), expected, atol=2e-5, rtol=1e-4)
    upsampled = F.interpolate(expected, size=images.shape[1:3], mode="bilinear", align_corners=False)
    _, cosines = lookup(state["cluster_probe.clusters"], upsampled, None)
    logits = F.conv2d(upsampled, state["linear_probe.weight"], state["linear_probe.bias"])
    for number, maps in enumerate(scorer.score_maps(list(images))):
        found = ClusterMaps.unpack(scorer.maps, torch.from_numpy(maps))
        torch.testing.assert_close(found.cosines(height=32, width=48), cosines[number], atol=2e-5, rtol=1e-3)
        torch.testing.assert_close(found.logits(height=32, width=48), logits[number], atol=2e-4, rtol=1e-3)


def test_the_number_of_heads_is_in_no_tensor(tmp_path):
    state = random_state(VIT)
    file = write_checkpoint(tmp_path / "a.ckpt", state=state)
    import_model("stego", file, out=tmp_path / "model", options={"heads": 6})
    found = lexiseg.load(tmp_path / "model")._scorer.codes(pictures())
    torch.testing.assert_close(found, official(state, pictures(), sizes=VIT), atol=2e-5, rtol=1e-4)


def test_without_settings_the_tensors_and_the_options_decide():
    both = imported(random_state())
    assert both.config["head"] == {"features": 64, "dim": DIM, "kind": "nonlinear", "dropout": 0.1}
    assert imported(random_state(kind="linear")).config["head"]["kind"] == "linear"
    given = imported(random_state(kind="none"), head="none", facet="keys")
    assert given.config["head"] == {"features": 64, "dim": 64, "kind": "none", "dropout": 0.1}
    assert given.dropped["net.cluster1.0"] == 2
    assert given.trunk is not None
    assert given.trunk[0]["facet"] == "keys"
    assert "so the sizes alone decided" in both.notes[0]


@pytest.mark.parametrize(
    ("embed", "patch", "name"),
    [
        (384, 8, "vit_small_patch8_224"),
        (384, 16, "vit_small_patch16_224"),
        (768, 8, "vit_base_patch8_224"),
        (768, 16, "vit_base_patch16_224"),
    ],
)
def test_the_released_sizes_have_their_names(embed, patch, name):
    sizes = {"embed": 8, "depth": 12, "patch": patch, "img_size": 224}
    state = random_state(sizes, dim=90, classes=27, extra=0)
    assert len(state) == 162
    # Only the names and sizes count: tensors of the true width would take a while.
    wide = {24: 3 * embed, 32: 4 * embed, 8: embed}
    state = {
        key: torch.empty(
            [1] * 2 + [embed] if key.endswith("cls_token") else _widened(key, value.shape, wide, patch=patch),
            device="meta",
        )
        for key, value in state.items()
    }
    result = imported(state, file_settings={"dataset_name": "cocostuff27"})
    assert result.trunk is not None
    assert result.trunk[0]["name"] == name
    assert result.trunk[0]["options"] == {}
    assert result.trunk[0]["licence"].startswith("Apache-2.0")
    assert len(result.tensors) + len(result.trunk[1]) + sum(result.dropped.values()) == 162
    assert result.config["head"]["dim"] == 90


def _widened(key, shape, wide, *, patch):
    if key.endswith("patch_embed.proj.weight"):
        return (wide[8], 3, patch, patch)
    return [wide.get(size, size) for size in shape]


def test_a_lightning_checkpoint_becomes_a_model_folder(tmp_path):
    file = write_checkpoint(tmp_path / "demo.ckpt")
    report = import_model("stego", file, out=tmp_path / "demo")
    assert report.used == 42 - 3
    assert report.unexpected == ()
    assert dict(report.dropped) == {"train_cluster_probe": 1, "decoder": 2}
    lines = "\n".join(report.lines())
    assert "39 tensors used, none missing" in lines
    assert "left out, as nothing computes with it: decoder.* (2 tensors)" in lines
    assert "read as plain data, without its code: omegaconf.dictconfig.DictConfig" in lines
    assert "builtins" not in lines
    assert "7 clusters, 2 more than classes; a linear probe of 5 classes (class 0, …)" in lines
    assert "pos_inter_shift 0.1754346515479633" in lines
    assert "which cluster is which class, the file does not say" in lines
    assert "text side: none" in lines
    config = read_json(tmp_path / "demo/model.json")
    assert config["head"] == {"features": 64, "dim": DIM, "kind": "nonlinear", "dropout": 0.1}
    assert (config["clusters"], config["names"]) == (CLASSES + EXTRA, None)
    assert config["predict"] == {"flip": True, "crop": None, "filter": "bilinear", "max_side": 512}
    assert config["refine"]["crf_iterations"] == 10
    card = read_json(tmp_path / "demo/card.json")
    assert card["imported"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert card["imported"]["training"]["max_steps"] == 7000
    assert "MIT" in card["licences"]["weights"]
    assert card["licences"]["trunk"] == config["backbone"]["licence"] == "Apache-2.0; DINO, facebookresearch/dino"
    assert "text" not in card["licences"]
    # Neither where it was imported nor where it was trained.
    text = "".join(path.read_text() for path in (tmp_path / "demo").rglob("*.json"))
    assert str(tmp_path) not in text
    assert "somebody" not in text


def test_the_folder_answers_with_its_clusters(tmp_path, monkeypatch):
    import_model("stego", write_checkpoint(tmp_path / "demo.ckpt"), out=tmp_path / "demo")
    model = lexiseg.load(tmp_path / "demo")
    names = tuple(f"cluster {number}" for number in range(CLASSES + EXTRA))
    assert model.own_labels == names
    assert tuple(read_json(tmp_path / "demo/vocabulary.json")["names"]) == names
    result = model.segment(pictures(30, 50)[0])
    assert result.label_map.shape == (30, 50)
    assert np.isfinite(result.scores).all()
    with pytest.raises(LabelError, match="dog, which name no cluster"):
        model.segment(pictures()[0], ["dog"])
    monkeypatch.chdir(tmp_path)
    Image.fromarray(pictures()[0]).save("photo.png")
    done = CliRunner().invoke(app, ["predict", "photo.png", "--model", "demo", "--out", "found"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "found/photo.json").is_file()


def test_settings_in_omegaconf_are_read_without_it(tmp_path):
    found = read_checkpoint(write_checkpoint(tmp_path / "a.ckpt"))
    assert found.settings == {"n_classes": CLASSES, "cfg": SETTINGS}
    assert "omegaconf.nodes.AnyNode" in found.unread


def test_objects_of_omegaconf_itself_are_read_the_same(tmp_path):
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({**SETTINGS, "nested": {"deep": {"deeper": 1}}, "same": "${dim}"})
    for name, kept in (("a", {"n_classes": CLASSES, "cfg": config}), ("b", config)):
        torch.save({"state_dict": random_state(), "hyper_parameters": kept}, tmp_path / name)
    found = read_checkpoint(tmp_path / "a").settings
    # Tables are read down to the second level, references as they stand.
    assert found == {"n_classes": CLASSES, "cfg": {**SETTINGS, "same": "${dim}"}}
    assert read_checkpoint(tmp_path / "b").settings == {**SETTINGS, "same": "${dim}", "nested": {}}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_plain_state_dict(tmp_path, suffix):
    state, file = random_state(), tmp_path / f"plain{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    import_model("stego", file, out=tmp_path / "model")
    found = lexiseg.load(tmp_path / "model")._scorer.codes(pictures())
    torch.testing.assert_close(found, official(state, pictures()), atol=2e-5, rtol=1e-4)
    assert "training" not in read_json(tmp_path / "model/card.json")["imported"]


def test_halves_become_floats(tmp_path):
    half = {name: value.half() for name, value in random_state().items()}
    import_model("stego", write_checkpoint(tmp_path / "a.ckpt", state=half), out=tmp_path / "model")
    files = [tmp_path / f"model/{folder}model.safetensors" for folder in ("", "trunk/")]
    tensors = {name: value for file in files for name, value in load_tensors(file).items()}
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    assert torch.equal(tensors["probe.centres"], half["cluster_probe.clusters"].float())


def test_importing_twice_gives_equal_bytes(tmp_path):
    file = write_checkpoint(tmp_path / "demo.ckpt")
    for name in "ab":
        import_model("stego", file, out=tmp_path / name)
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b")


@pytest.mark.parametrize(
    ("dataset", "count", "names"),
    [
        ("cocostuff27", 27, COCOSTUFF27),
        ("cityscapes", 27, CITYSCAPES27),
        ("potsdam", 3, POTSDAM3),
        ("cocostuff15", 15, tuple(f"class {number}" for number in range(15))),
        ("directory", 2, ("class 0", "class 1")),
        (None, 1, ("class 0",)),
    ],
)
def test_class_names_follow_from_the_data_set_where_their_number_fits(dataset, count, names):
    result = imported(random_state(classes=count, extra=0), file_settings={"dataset_name": dataset})
    assert tuple(result.config["classes"]) == names


def test_class_names_that_are_given(tmp_path):
    file = write_checkpoint(tmp_path / "demo.ckpt", settings={"dataset_name": "potsdam"})
    import_model("stego", file, out=tmp_path / "a", classes=["a", "b", "c", "d", "e"])
    assert read_json(tmp_path / "a/model.json")["classes"] == ["a", "b", "c", "d", "e"]
    assert lexiseg.load(tmp_path / "a")._scorer.maps[-1] == "linear e"
    with pytest.raises(LabelError, match=r"3 class names for the linear probe .* has 5 classes") as caught:
        import_model("stego", file, out=tmp_path / "b", classes=["a", "b", "c"])
    assert "5 names" in caught.value.allowed
    assert "--classes" in caught.value.fix
    assert not (tmp_path / "b").exists()


def _without(state, start):
    return {key: value for key, value in state.items() if not key.startswith(start)}


def _changed(state, name, *shape):
    return {**state, name: torch.zeros(shape)}


FAULTS = {
    "DINO alone": (lambda s: vit_state(SIZES), "is no STEGO checkpoint: no cluster_probe.clusters, but blocks"),
    "TCL": (lambda s: tcl_state(clip=False), "is no STEGO checkpoint: no cluster_probe.clusters, but masker"),
    "a tensor is missing": (
        lambda s: _without(s, "net.cluster2.0.bias"),
        r"1 tensors missing \(in our words head.nonlinear.0.bias\)",
    ),
    "a branch is missing": (lambda s: _without(s, "net.cluster2."), "4 tensors missing"),
    "half a linear probe": (lambda s: _without(s, "linear_probe.bias"), "1 tensors missing .*linear.bias"),
    "no linear probe": (lambda s: _without(s, "linear_probe."), "no complete STEGO network"),
    "no head": (lambda s: _without(s, "net.cluster"), "no complete STEGO network"),
    "no trunk": (lambda s: _without(s, "net.model."), "no complete STEGO network"),
    "a block is missing": (
        lambda s: _without(s, "net.model.blocks.0.attn."),
        r"4 tensors missing \(in our words trunk.vit.blocks.0.attn",
    ),
    "codes of another size in the probe": (
        lambda s: _changed(s, "cluster_probe.clusters", 7, 9),
        r"1 of another size \(cluster_probe.clusters \(7, 9\) instead of \(7, 12\)",
    ),
    "another trunk": (
        lambda s: _without(s, "net.model.") | {f"net.model.{n}": v for n, v in vit_state(VIT).items()},
        "4 of another size .*net.cluster1.0.weight",
    ),
    "positions that are no square": (
        lambda s: _changed(s, "net.model.pos_embed", 1, 18, 64),
        "positions for 17 patches, which are no square",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_no_whole_stego(tmp_path, fault):
    change, message = FAULTS[fault]
    file = write_checkpoint(tmp_path / "demo.ckpt", state=change(random_state()))
    with pytest.raises(ModelError, match=message) as caught:
        import_model("stego", file, out=tmp_path / "out")
    assert caught.value.fix
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_lseg(tmp_path):
    with pytest.raises(ModelError, match="is no STEGO checkpoint") as caught:
        import_model("stego", write_lseg(tmp_path / "demo.ckpt"), out=tmp_path / "out")
    assert "mhamilton723/STEGO" in caught.value.allowed
    assert "a DINO file alone is a trunk" in caught.value.fix


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"arch": "feature-pyramid"}, {}, r"the settings in demo\.ckpt"),
        ({"dino_feat_type": "QQ"}, {}, r"the settings in demo\.ckpt"),
        ({"projection_type": "cubic"}, {}, r"the settings in demo\.ckpt"),
        ({}, {"depth": 3}, "the options of `lexiseg import stego`"),
        ({}, {"head": "cubic"}, "the options of `lexiseg import stego`"),
    ],
)
def test_settings_and_options_that_are_wrong(tmp_path, changes, options, message):
    file = write_checkpoint(tmp_path / "demo.ckpt", settings=changes)
    with pytest.raises(SettingsError, match=message):
        import_model("stego", file, out=tmp_path / "out", options=options)


def test_heads_that_do_not_divide_the_width(tmp_path):
    file = write_checkpoint(tmp_path / "demo.ckpt")
    with pytest.raises(ModelError, match="no complete STEGO network"):
        import_model("stego", file, out=tmp_path / "out", options={"heads": 7})


@pytest.mark.parametrize(
    "name", ["test_cluster_metrics.stats", "net.model.head.weight", "net.cluster2.7.weight", "\\1{0}"]
)
def test_unknown_tensors_are_reported_and_not_used(tmp_path, name):
    file = write_checkpoint(tmp_path / "demo.ckpt", state={**random_state(), name: torch.zeros(3)})
    report = import_model("stego", file, out=tmp_path / "out")
    assert f"unexpected, not used: {name}" in report.lines()
    assert read_json(tmp_path / "out/card.json")["imported"]["unexpected"] == [name]


@pytest.mark.parametrize("name", ["cluster_probe.clusters", "net.model.norm.bias"])
def test_values_that_are_not_finite(tmp_path, name):
    state = random_state()
    state[name][0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        import_model("stego", write_checkpoint(tmp_path / "a.ckpt", state=state), out=tmp_path / "out")


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


class Eval:
    def __reduce__(self):
        return eval, ("open('executed', 'w')",)


@pytest.mark.parametrize(("thing", "asked"), [(Code(), r"posix\.mkdir"), (Eval(), r"builtins\.eval")])
def test_code_in_a_checkpoint_is_not_executed(tmp_path, monkeypatch, thing, asked):
    monkeypatch.chdir(tmp_path)
    file = write_checkpoint(tmp_path / "demo.ckpt", harmless=thing)
    with pytest.raises(ModelError, match=f"asks for {asked}") as caught:
        import_model("stego", file, out=tmp_path / "out")
    assert "never executed" in caught.value.allowed
    assert not (tmp_path / "executed").exists()


def test_a_torchscript_archive(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(ModelError, match="a TorchScript archive") as caught:
        import_model("stego", tmp_path / "script.pt", out=tmp_path / "out")
    assert "state_dict" in caught.value.fix


@pytest.fixture
def tree(tmp_path):
    """A working tree as far as profiles need one."""
    tree = tmp_path / "tree"
    (tree / "profiles").mkdir(parents=True)
    (tree / "dvc.yaml").touch()
    for name in ("params.yaml", "profiles/embedded.yaml"):
        shutil.copyfile("profiles/embedded.yaml", tree / name)
    return tree


def test_a_profile_that_evaluates_it(tree, tmp_path, monkeypatch):
    file = write_checkpoint(tmp_path / "demo.ckpt")
    monkeypatch.chdir(tree)
    result = CliRunner().invoke(app, ["import", "stego", str(file), "--profile", "demo"])
    assert result.exit_code == 0, result.output
    assert "try it: lexiseg predict photo.jpg --model models/demo --out predictions" in result.output
    assert "using the profile demo" in result.output
    values = read_values(tree)
    parse_settings(values)
    identity, stego, trunk = model_identity(tree / "models/demo"), values["stego"], values["encode"]["trunk"]
    assert (stego["model"]["init"], trunk["weights"], trunk["source"]) == ("models/demo", "models/demo", "model")
    assert stego["model"]["sha256"] == trunk["sha256"] == identity
    assert (stego["model"]["head"], stego["model"]["dim"], stego["probe"]["kind"]) == ("nonlinear", DIM, "model")
    assert (values["lseg"]["run"], values["tcl"]["run"], stego["run"]) == (False, False, True)
    # The authors' evaluation.
    assert stego["predict"] == {"flip": True, "crop": 320, "filter": "nearest", "max_side": None}
    assert stego["refine"]["crf_iterations"] == 10
    # And their training, should it go on.
    assert stego["train"] == {"steps": 0, "batch": 32, "lr": 0.0005, "alarm": 0.85, "precision": "32-true"}
    loss = stego["loss"]
    assert (loss["self"], loss["knn"], loss["random"]) == (1, 0.577453483136995, 0.9058762625226623)
    assert (loss["self_shift"], loss["shifts"], loss["centring"]) == (0.45828472207, "fixed", "none")
    assert (loss["random_shift"], loss["knn_shift"]) == (0.31361241889448443, 0.1754346515479633)
    assert values["encode"]["clip"]["source"] == "pretrain"  # as it was


def test_a_clip_to_name_clusters_by(tree, tmp_path, monkeypatch):
    file, encode = write_checkpoint(tmp_path / "demo.ckpt"), encoded(tmp_path / "encode")
    monkeypatch.chdir(tree)
    command = ["import", "stego", str(file), "--text", str(encode), "--profile", "demo"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "text side: that of encode" in result.output
    values = read_values(tree)
    parse_settings(values)
    clip = values["encode"]["clip"]
    assert (clip["source"], clip["weights"], values["encode"]["text"]["source"]) == ("model", "models/demo", "clip")
    assert clip["sha256"] == model_identity(tree / "models/demo")
    assert hash_tree(tree / "models/demo/clip") == hash_tree(encode / "clip")
    assert hash_tree(tree / "models/demo/text") == hash_tree(encode / "text")
    assert read_json(tree / "models/demo/card.json")["licences"]["text"]


def test_what_cannot_name_clusters(tmp_path):
    file = write_checkpoint(tmp_path / "demo.ckpt")
    names = ["grass", "sky", "ring"]
    changes = {**text_table(tmp_path, names), "encode.clip.source": "none", **timm_backbone(tmp_path)}
    encoded(tmp_path / "table", changes=changes)
    encoded(tmp_path / "resnet")
    config = read_json(tmp_path / "resnet/clip/clip.json")
    write_json(tmp_path / "resnet/clip/clip.json", {**config, "model": {"vision_cfg": {"layers": [3, 4, 6, 3]}}})
    for folder, source in (("table", "table"), ("resnet", "clip")):
        with pytest.raises(ModelError, match=f"has no CLIP with a ViT: .* of the source {source}") as caught:
            import_model("stego", file, out=tmp_path / "out", text=tmp_path / folder)
        assert caught.value.allowed == "a folder with a CLIP, image tower included"
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A prepared data set, an imported model, and the settings that the import gives."""
    root = tmp_path_factory.mktemp("site")
    report = import_model("stego", write_checkpoint(root / "demo.ckpt"), out=root / "models/demo")
    values = override(read_yaml("profiles/embedded.yaml"), SMALL)
    small = {"stego.features.crop": 32, "stego.neighbours.count": 2, "stego.predict.crop": 32}
    values = override(override(values, report.settings or {}), small)
    prepare = prepared(root, height=32, width=32)
    return SimpleNamespace(root=root, model=root / "models/demo", prepare=prepare, values=values)


def test_the_graph_takes_it_as_it_is(site, tmp_path):
    chosen = parse_settings(site.values)
    encode_trunk.run(chosen, {"prepare": site.prepare}, made(tmp_path / "trunk"))
    assert hash_tree(tmp_path / "trunk") == hash_tree(site.model / "trunk")
    inputs = {"prepare": site.prepare, "encode-trunk": tmp_path / "trunk"}
    for name in ("features", "neighbours", "train", "probe"):
        getattr(stages, name)(chosen, inputs, made(tmp_path / name))
        inputs[f"stego/{name}"] = tmp_path / name
    found, expected = (load_tensors(folder / "model.safetensors") for folder in (tmp_path / "probe", site.model))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    before, after = (read_json(folder / "model.json") for folder in (site.model, tmp_path / "probe"))
    for key in ("head", "clusters", "classes"):
        assert after[key] == before[key]
    assert after["imported"] == read_json(site.model / "card.json")["imported"]
    assert after["imported"]["licence"].startswith("repository mhamilton723/STEGO: MIT")


def made(folder):
    folder.mkdir()
    return folder


def test_its_trunk_is_part_of_what_it_is(site, tmp_path):
    shutil.copytree(site.model, tmp_path / "demo")
    (tmp_path / "demo/card.json").write_text("{}")
    assert model_identity(tmp_path / "demo") == site.values["stego"]["model"]["sha256"]
    (tmp_path / "demo/trunk/trunk.json").write_text("{}")
    assert model_identity(tmp_path / "demo") != model_identity(site.model)


def test_another_folder_than_the_hash_says(site, tmp_path):
    wrong = parse_settings(override(site.values, {"encode.trunk.sha256": "0" * 64}))
    with pytest.raises(ModelError, match="has the hash") as caught:
        encode_trunk.run(wrong, {"prepare": site.prepare}, tmp_path)
    assert "encode.trunk.sha256" in caught.value.allowed


def test_a_model_folder_without_a_trunk(site, tmp_path):
    (tmp_path / "model.json").write_text("{}")
    trunk = {"encode.trunk.weights": str(tmp_path), "encode.trunk.sha256": model_identity(tmp_path)}
    with pytest.raises(ModelError, match="holds no trunk") as caught:
        encode_trunk.run(parse_settings(override(site.values, trunk)), {"prepare": site.prepare}, tmp_path)
    assert "encode.trunk.weights" in caught.value.fix


def test_settings_that_lack_the_folder():
    with pytest.raises(SettingsError, match="source model needs `weights`"):
        settings({"encode.trunk.source": "model"})
