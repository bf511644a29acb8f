"""Official checkpoints -> model folders, against a second implementation of the network on the official names."""

import hashlib
import os
import shutil
import zipfile
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from helpers.official_lseg import TEXT, clip_model, clip_state, forward, random_state, write_checkpoint
from helpers.tiny import encoded, text_table, timm_backbone
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import lexiseg
from lexiseg.cli import app
from lexiseg.errors import LabelError, LexisegError, ModelError, SettingsError
from lexiseg.foreign import ForeignCheckpoint, read_checkpoint
from lexiseg.importing import import_model
from lexiseg.methods.lseg.build import build_model
from lexiseg.methods.lseg.checkpoint import import_checkpoint
from lexiseg.stages.settings import parse_settings, read_values
from lexiseg.storage import hash_tree, read_json
from lexiseg.workspace import model_identity

IMAGE = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(5))
WORDS = torch.randn(5, TEXT, generator=torch.Generator().manual_seed(6))


@pytest.fixture(scope="module")
def clip():
    return clip_state()


@pytest.fixture
def lightning(tmp_path, clip):
    """Writes a checkpoint into the test's folder."""

    def write(name="demo.ckpt", *, state=None, with_clip=True, **more):
        return write_checkpoint(tmp_path / name, state=state, clip=clip if with_clip else {}, **more)

    return write


def network(state, **changes):
    settings = changes.pop("settings", {})
    checkpoint = ForeignCheckpoint(file="x.ckpt", sha256="", tensors=state, settings=settings)
    imported = import_checkpoint(checkpoint, changes)
    model = build_model(imported.config)
    model.load_state_dict(dict(imported.tensors))
    return model.eval(), imported


@pytest.mark.parametrize(("arch_option", "depth"), [(0, 0), (1, 0), (1, 1), (1, 3), (2, 1), (2, 4)])
def test_the_network_computes_what_the_official_one_does(arch_option, depth):
    state = random_state(block=arch_option > 0)
    settings = {"arch_option": arch_option, "block_depth": depth, "activation": "lrelu"}
    model, imported = network(state, settings=settings)
    expected = forward(state, IMAGE, WORDS, arch_option=arch_option, block_depth=depth)
    with torch.inference_mode():
        actual = model(IMAGE, torch.nn.functional.normalize(WORDS, dim=1))
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)
    assert imported.unexpected == ()
    assert imported.dropped == {"pretrained.model.head": 2, "scratch.refinenet4.resConfUnit1": 12}
    assert imported.config["mean"] == [0.5] * 3


def test_sizes_that_are_no_multiples_of_32():
    # The official skip addition fails here; ours ends each path at the size of the next map.
    model, _ = network(random_state())
    with torch.inference_mode():
        assert model(IMAGE[..., :48, :80], torch.eye(TEXT)[:3]).shape == (1, 3, 48, 80)
        with pytest.raises(ModelError, match="multiples of 16"):
            model(IMAGE[..., :50, :80], torch.eye(TEXT)[:3])


def test_the_published_sizes_have_their_names():
    state = random_state()
    with torch.device("meta"):
        vit = timm.create_model("vit_large_patch16_384")
        reassemble = {1: (256, 4), 2: (512, 2), 3: (1024, 0), 4: (1024, 3)}
    for name in [name for name in state if name.startswith(("pretrained", "scratch.layer"))]:
        del state[name]
    state |= {f"pretrained.model.{name}": value for name, value in vit.state_dict().items()}
    for level, (channels, kernel) in reassemble.items():
        shapes = {"0.project.0.weight": (1024, 2048), "0.project.0.bias": (1024,), "3.weight": (channels, 1024, 1, 1)}
        shapes |= {"3.bias": (channels,)}
        if kernel:
            shapes |= {"4.weight": (channels, channels, kernel, kernel), "4.bias": (channels,)}
        for name, shape in shapes.items():
            state[f"pretrained.act_postprocess{level}.{name}"] = torch.empty(shape, device="meta")
        state[f"scratch.layer{level}_rn.weight"] = torch.empty(32, channels, 3, 3, device="meta")
    checkpoint = ForeignCheckpoint(file="demo_e200.ckpt", sha256="", tensors=state)
    imported = import_checkpoint(checkpoint, {})
    backbone = imported.config["backbone"]
    assert (backbone["name"], backbone["options"]) == ("vit_large_patch16_384", {})
    assert backbone["channels"] == [256, 512, 1024, 1024]
    assert imported.config["model"]["readout"] == "project"


def test_the_resnet_of_the_zero_shot_models():
    torch.manual_seed(0)
    resnet: Any = timm.create_model("resnet50", num_classes=0).eval()
    names = {"conv1": "layer1.0", "bn1": "layer1.1", "layer1": "layer1.4"}
    state = {name: value for name, value in random_state().items() if name.startswith("scratch")}
    for level, channels in enumerate((256, 512, 1024, 2048), start=1):
        state[f"scratch.layer{level}_rn.weight"] = 0.02 * torch.randn(32, channels, 3, 3)
    for name, value in resnet.state_dict().items():
        first, _, rest = name.partition(".")
        state[f"pretrained.{names.get(first, first)}.{rest}"] = value
    model, imported = network(state)
    assert imported.unexpected == ()
    assert imported.config["backbone"]["name"] == "resnet50"
    assert imported.config["mean"] == [0.485, 0.456, 0.406]
    assert imported.config["model"]["block"] == "none"
    with torch.inference_mode():
        maps = model.backbone(IMAGE)
        x = resnet.maxpool(resnet.act1(resnet.bn1(resnet.conv1(IMAGE))))
        for found, stage in zip(maps, (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4), strict=True):
            x = stage(x)
            torch.testing.assert_close(found, x)


def test_a_lightning_checkpoint_becomes_a_model_folder(lightning, tmp_path):
    file = lightning(callbacks={"best": 1})
    report = import_model("lseg", file, out=tmp_path / "demo", classes=["dog", "grass"])
    assert report.unexpected == ()
    assert report.unread == ("argparse.Namespace",)
    lines = "\n".join(report.lines())
    assert "none missing" in lines
    assert "scratch.refinenet4.resConfUnit1.* (12 tensors)" in lines
    assert "read as plain data, without its code: argparse.Namespace" in lines
    config = read_json(tmp_path / "demo/model.json")
    assert (config["model"]["block"], config["model"]["block_depth"]) == ("bottleneck", 2)
    card = read_json(tmp_path / "demo/card.json")
    assert card["imported"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert "MIT" in card["licences"]["weights"]
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "demo").rglob("*.json"))
    model = lexiseg.load(tmp_path / "demo")
    picture = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    result = model.segment(picture, ["dog", "a café on grass", "その他", "🐕"])
    assert result.label_map.shape == (70, 90)
    assert np.isfinite(result.scores).all()


def test_the_text_side_is_the_clip_in_the_file(lightning, tmp_path, clip):
    import_model("lseg", lightning(), out=tmp_path / "demo")
    vectors = lexiseg.load(tmp_path / "demo")._scorer.text.embed(["dog", "grass"])
    model = clip_model()
    model.load_state_dict(clip)
    with torch.inference_mode():
        tokens = open_clip.SimpleTokenizer(context_length=16)(["dog", "grass"])
        expected = torch.nn.functional.normalize(model.eval().encode_text(tokens), dim=1)
    torch.testing.assert_close(vectors, expected)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_plain_state_dict_needs_to_be_told_the_block(lightning, tmp_path, suffix):
    state = random_state(block=True)
    file = tmp_path / f"plain{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    import_model("lseg", lightning(), out=tmp_path / "text")
    with pytest.raises(ModelError, match="--set block="):
        import_model("lseg", file, out=tmp_path / "a", text=tmp_path / "text")
    options = {"block": "depthwise", "block_depth": 4, "activation": "tanh"}
    import_model("lseg", file, out=tmp_path / "a", text=tmp_path / "text", options=options)
    config = read_json(tmp_path / "a/model.json")["model"]
    assert {key: config[key] for key in options} == options


def test_importing_twice_gives_equal_bytes(lightning, tmp_path):
    file = lightning()
    for name in "ab":
        import_model("lseg", file, out=tmp_path / name)
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b")


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def _without(state, name):
    return {key: value for key, value in state.items() if key != name}


def _changed(state, name, shape):
    return {**state, name: torch.zeros(shape)}


FAULTS = {
    "another method": (lambda s: {"visual.proj": torch.zeros(2)}, "is no LSeg checkpoint"),
    "a tensor is missing": (
        lambda s: _without(s, "scratch.layer2_rn.weight"),
        r"1 tensors missing \(in our words decoder.layer_rn.1",
    ),
    "a block is missing": (
        lambda s: {k: v for k, v in s.items() if "blocks.1." not in k},
        r"12 tensors missing \(in our words backbone.vit.blocks.1",
    ),
    "another size": (
        lambda s: _changed(s, "scratch.head1.weight", (TEXT, 7, 1, 1)),
        r"1 of another size \(scratch.head1.weight \(64, 7, 1, 1\) instead of \(64, 32, 1, 1\)",
    ),
    "no backbone": (
        lambda s: {k: v for k, v in s.items() if k.startswith("scratch")},
        "a ResNet with",
    ),
    "no reassembling": (
        lambda s: {k: v for k, v in s.items() if "postprocess3" not in k},
        "no complete LSeg network",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_no_whole_lseg(lightning, tmp_path, fault):
    change, message = FAULTS[fault]
    file = lightning(state=change(random_state()), with_clip=False)
    with pytest.raises(ModelError, match=message) as caught:
        import_model("lseg", file, out=tmp_path / "out", text=tmp_path)
    assert caught.value.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pretrained.model.{1}", "pretrained.model.}", "scratch.layer1_rn.{0:>3000000000}"])
def test_names_in_a_file_are_no_formats(lightning, tmp_path, name):
    report = import_model("lseg", lightning(state={**random_state(), name: torch.zeros(2)}), out=tmp_path / "out")
    assert report.unexpected == (name,)


def test_what_a_pickle_may_hold_beside_tensors(tmp_path, clip):
    endless: list = []
    endless.append(endless)
    nested: list = []
    for _ in range(40):
        nested = [nested, nested]
    file = write_checkpoint(tmp_path / "odd.ckpt", clip=clip)
    content = torch.load(file, weights_only=False)
    settings = {"arch_option": 1, "block_depth": 2, "endless": endless, "nested": nested, "flat": [1, "a"]}
    torch.save({"state_dict": {**content["state_dict"], 7: torch.zeros(1)}, "hyper_parameters": settings}, file)
    found = read_checkpoint(file)
    assert found.settings == {"arch_option": 1, "block_depth": 2, "flat": [1, "a"]}
    assert all(isinstance(name, str) for name in found.tensors)
    import_model("lseg", file, out=tmp_path / "out")


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(10**9), torch.eye(3).to_sparse(), torch.empty(3, device="meta")],
    ids=["expanded", "sparse", "meta"],
)
def test_tensors_that_are_not_all_there(lightning, tmp_path, tensor):
    file = lightning(state={**random_state(), "scratch.head1.bias": tensor})
    with pytest.raises(ModelError, match=r"sparse, without values, or larger than what is stored .*head1\.bias"):
        import_model("lseg", file, out=tmp_path / "out")


def test_values_that_are_not_finite(lightning, tmp_path):
    state = random_state()
    state["scratch.head1.bias"][3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        import_model("lseg", lightning(state=state), out=tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "settings", "error", "message"),
    [
        ({"block": "bottleneck"}, None, ModelError, "without scratch.head_block"),
        ({"readout": "ignore"}, None, ModelError, "with weights of the readout `project`"),
        ({}, {"block_depth": "two"}, SettingsError, "hyper-parameters in x.ckpt"),
        ({}, {"activation": "gelu"}, SettingsError, "hyper-parameters in x.ckpt"),
    ],
)
def test_options_and_settings_that_contradict_the_file(options, settings, error, message):
    state = random_state(block=settings is not None)
    with pytest.raises(error, match=message):
        network(state, settings={"arch_option": 1, **(settings or {})}, **options)


def test_how_an_imported_model_predicts(lightning, tmp_path):
    import_model("lseg", lightning(), out=tmp_path / "a")
    assert read_json(tmp_path / "a/model.json")["predict"]["max_side"] == 520
    options = {"predict.flip": True, "predict.window": 32, "predict.base_size": 64}
    import_model("lseg", lightning(), out=tmp_path / "b", options=options)
    found = read_json(tmp_path / "b/model.json")["predict"]
    assert (found["flip"], found["window"], found["base_size"], found["max_side"]) == (True, 32, 64, None)
    with pytest.raises(SettingsError, match="flips"):
        import_model("lseg", lightning(), out=tmp_path / "c", options={"predict.flips": True})


def test_only_the_clip_that_is_used_has_to_be_whole(lightning, tmp_path, clip):
    import_model("lseg", lightning(), out=tmp_path / "good")
    partial = {name: value for name, value in clip.items() if not name.startswith("visual")}
    file = write_checkpoint(tmp_path / "partial.ckpt", clip=partial)
    with pytest.raises(ModelError, match="the CLIP in the checkpoint is not complete") as caught:
        import_model("lseg", file, out=tmp_path / "out")
    assert "--text" in caught.value.fix
    import_model("lseg", file, out=tmp_path / "out", text=tmp_path / "good")


def test_code_in_a_checkpoint_is_not_executed(lightning, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = lightning(harmless=Code())
    with pytest.raises(ModelError, match=r"asks for posix\.mkdir") as caught:
        import_model("lseg", file, out=tmp_path / "out")
    assert "never executed" in caught.value.allowed
    assert not (tmp_path / "executed").exists()


def test_archives_that_torch_save_did_not_write(lightning, tmp_path):
    file = lightning()
    with zipfile.ZipFile(file) as stored, zipfile.ZipFile(tmp_path / "b.ckpt", "w", zipfile.ZIP_DEFLATED) as packed:
        for item in stored.namelist():
            packed.writestr(item, stored.read(item))
    with pytest.raises(ModelError, match="a compressed archive"):
        read_checkpoint(tmp_path / "b.ckpt")
    damaged = bytearray(file.read_bytes())
    start = damaged.rfind(b"PK\x01\x02")
    damaged[start + 6] = 100  # the version of zip that is needed to read the last part
    (tmp_path / "c.ckpt").write_bytes(damaged)
    assert read_checkpoint(tmp_path / "c.ckpt").tensors  # zipfile refuses it, torch does not look there
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(ModelError, match="a TorchScript archive"):
        read_checkpoint(tmp_path / "script.pt")


@pytest.mark.parametrize("size", [0, 10, 700, -100])
def test_a_truncated_file(lightning, tmp_path, size):
    file = lightning()
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelError, match="is damaged, no checkpoint at all"):
        import_model("lseg", file, out=tmp_path / "out")


def test_unknown_tensors_are_reported_and_not_used(lightning, tmp_path):
    file = lightning(state={**random_state(), "auxiliary.weight": torch.zeros(3)})
    report = import_model("lseg", file, out=tmp_path / "out")
    assert report.unexpected == ("auxiliary.weight",)
    assert "unexpected, not used: auxiliary.weight" in report.lines()
    assert read_json(tmp_path / "out/card.json")["imported"]["unexpected"] == ["auxiliary.weight"]


def test_a_text_side_is_needed_and_has_to_fit(lightning, tmp_path):
    file = lightning(with_clip=False)
    with pytest.raises(ModelError, match="carries no CLIP"):
        import_model("lseg", file, out=tmp_path / "out")
    with pytest.raises(ModelError, match=r"no text/text\.json"):
        import_model("lseg", file, out=tmp_path / "out", text=tmp_path)
    other = {**random_state(), "scratch.head1.weight": torch.zeros(48, 32, 1, 1), "scratch.head1.bias": torch.zeros(48)}
    import_model("lseg", lightning(), out=tmp_path / "good")
    with pytest.raises(ModelError, match=r"64 numbers .* for a network of 48"):
        import_model(
            "lseg", lightning("other.ckpt", state=other, with_clip=False), out=tmp_path / "out", text=tmp_path / "good"
        )


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("nothing", {}, ModelError, "no importer for `nothing`"),
        ("lseg", {"depth": 3}, SettingsError, "depth"),
        ("lseg", {"heads": 7}, ModelError, "no complete LSeg network"),
        ("lseg", {"block": "both"}, SettingsError, "block"),
    ],
)
def test_wrong_requests(lightning, tmp_path, method, options, error, message):
    with pytest.raises(error, match=message):
        import_model(method, lightning(), out=tmp_path / "out", options=options)


def test_nothing_is_overwritten(lightning, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(LexisegError, match="exists"):
        import_model("lseg", lightning(), out=tmp_path / "out")


@pytest.fixture
def tree(tmp_path):
    """A working tree as far as profiles need one."""
    tree = tmp_path / "tree"
    (tree / "profiles").mkdir(parents=True)
    (tree / "dvc.yaml").touch()
    for name in ("params.yaml", "profiles/embedded.yaml"):
        shutil.copyfile("profiles/embedded.yaml", tree / name)
    return tree


def test_a_profile_that_evaluates_it(lightning, tree, monkeypatch):
    monkeypatch.chdir(tree)
    command = ["import", "lseg", str(lightning()), "--profile", "demo"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "using the profile demo" in result.output
    values = read_values(tree)
    parse_settings(values)
    assert values["profile"] == "demo"
    assert values["lseg"]["model"]["init"] == values["encode"]["clip"]["weights"] == "models/demo"
    assert values["lseg"]["model"]["sha256"] == model_identity(tree / "models/demo")
    assert values["lseg"]["train"]["steps"] == 0
    assert values["encode"]["backbone"]["source"] == "clip"
    assert values["baselines"] == ["maskclip"]
    again = CliRunner().invoke(app, [*command, "--out", "models/again"])
    assert isinstance(again.exception, SettingsError)  # before anything is written
    assert not (tree / "models/again").exists()


def test_no_profile_for_a_text_side_that_the_graph_cannot_name(lightning, tree, tmp_path, monkeypatch):
    before = (tree / "params.yaml").read_text()
    names = ["grass", "sky", "ring"]
    table = encoded(
        tmp_path / "encode",
        changes={**text_table(tmp_path, names, dim=TEXT), "encode.clip.source": "none", **timm_backbone(tmp_path)},
    )
    file = lightning(with_clip=False)
    monkeypatch.chdir(tree)
    result = CliRunner().invoke(app, ["import", "lseg", str(file), "--text", str(table), "--profile", "demo"])
    assert isinstance(result.exception, SettingsError)
    assert "no profile was saved" in result.exception.found
    assert (tree / "params.yaml").read_text() == before
    assert not (tree / "profiles/demo.yaml").exists()


def test_by_command_and_predict_with_it(lightning, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = lightning()
    (tmp_path / "classes.txt").write_text("dog\n\ngrass\n")
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(tmp_path / "photo.png")
    run = CliRunner().invoke
    result = run(app, ["import", "lseg", str(file), "--classes", "classes.txt", "--licence", "CC0"])
    assert result.exit_code == 0, result.output
    assert "written to models/demo" in result.output
    assert read_json("models/demo/card.json")["licences"]["weights"] == "CC0"
    arguments = ["predict", "photo.png", "--labels", "dog, grass", "--model", "models/demo", "--out", "found"]
    result = run(app, arguments)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == [
        "photo.json",
        "photo.png",
        "photo_overlay.png",
    ]
    for option in ("heads", "=3", "heads=[1", "heads="):
        wrong = run(app, ["import", "lseg", str(file), "--set", option, "--out", "other"])
        assert isinstance(wrong.exception, SettingsError), option
    (tmp_path / "many.txt").write_text("".join(f"label {number}, and more\n" for number in range(700)))
    arguments = ["predict", "photo.png", "--labels-file", "many.txt", "--model", "models/demo", "--out", "found"]
    result = run(app, arguments)
    assert result.exit_code == 0, result.output
    assert "nothing of" in result.output
    assert len(read_json("found/photo.json")["labels"]) == 700
    for given in (["--labels", "dog", *arguments[2:4]], []):
        wrong = run(app, ["predict", "photo.png", "--model", "models/demo", "--out", "found", *given])
        assert isinstance(wrong.exception, LabelError)
