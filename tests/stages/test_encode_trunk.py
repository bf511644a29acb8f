"""The stage encode-trunk: a trunk of every source, on files made here."""

from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from helpers.tiny import encode_settings, prepared, timm_backbone
from pydantic import ValidationError
from safetensors.torch import save_file

from lexiseg.encoders import from_timm
from lexiseg.encoders.features import load_features
from lexiseg.encoders.from_timm import save_backbone
from lexiseg.encoders.settings import TrunkSettings
from lexiseg.encoders.tiny_trunk import TinyTrunk
from lexiseg.encoders.trunk import load_trunk, save_trunk
from lexiseg.errors import DataError, ModelError, SettingsError
from lexiseg.settings import View
from lexiseg.stages.encode_trunk import run
from lexiseg.storage import hash_tree, read_json, sha256_of_file, write_json
from lexiseg.workspace import model_identity

DECLARED = ["seed", "threads", "encode.backbone", "encode.self_supervised", "encode.trunk"]  # as in dvc.yaml
DINO = "vit_small_patch8_224.dino"
SIZES: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 32}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return {"prepare": prepared(tmp_path_factory.mktemp("data"))}


def encode_trunk(inputs, out, changes=None, *, seed=0):
    block = SimpleNamespace(seed=seed, threads=1, encode=encode_settings(changes))
    run(View(block, DECLARED), inputs, out)
    return hash_tree(out)


def pictures(height=16, width=24):
    rng = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, height, width), generator=rng, dtype=torch.uint8)


def dino(folder, *, suffix=".safetensors", prefix="", **changes):
    """A small ViT with random weights, the file it was saved to, and settings that name both."""
    torch.manual_seed(2)
    vit: Any = timm.create_model(DINO, pretrained=False, num_classes=0, dynamic_img_size=True, **SIZES).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = {f"{prefix}{name}": value for name, value in vit.state_dict().items()}
    state[f"{prefix.removesuffix('backbone.')}head.mlp.0.weight"] = torch.ones(2, 2)
    path = folder / f"dino{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    block = {"source": "timm", "name": DINO, "weights": str(path), "sha256": sha256_of_file(path), "options": SIZES}
    block = {**block, "licence": "Apache-2.0; DINO", **changes}
    return vit, {f"encode.trunk.{key}": value for key, value in block.items()}


# ---- pretrain ----------------------------------------------------------------------------------------------------


def test_pretrained_on_the_pictures(inputs, tmp_path):
    assert sorted(encode_trunk(inputs, tmp_path)) == ["curve.csv", "model.safetensors", "trunk.json"]
    config = read_json(tmp_path / "trunk.json")
    assert config["source"] == "pretrain"
    assert config["model"] == {"image_size": 16, "width": 128, "layers": 1}
    assert "the licence of those pictures applies" in config["licence"]
    assert (tmp_path / "curve.csv").read_text().startswith("step,loss\n1,")
    trunk = load_trunk(tmp_path)
    assert trunk(pictures()).shape == (2, 128, 2, 3)
    assert not any(parameter.requires_grad for parameter in trunk.parameters())


def test_twice_gives_equal_bytes_and_the_seed_counts(inputs, tmp_path):
    one = encode_trunk(inputs, tmp_path / "a")
    assert one == encode_trunk(inputs, tmp_path / "b")
    assert one["model.safetensors"] != encode_trunk(inputs, tmp_path / "c", seed=1)["model.safetensors"]


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("split", "scenes", "the split `scenes`"),
        ("split", "iconic", "the shortest side 8 pixels"),
        ("crop", 24, "side 16"),
    ],
)
def test_pictures_that_nothing_can_be_learned_from(inputs, tmp_path, key, value, found):
    with pytest.raises(DataError, match=found) as caught:
        encode_trunk(inputs, tmp_path / "out", {f"encode.self_supervised.{key}": value})
    assert caught.value.allowed
    assert caught.value.fix
    assert not (tmp_path / "out").exists()


def test_photographs_are_resized(tmp_path):
    inputs = {"prepare": prepared(tmp_path, height=20, width=28)}
    encode_trunk(inputs, tmp_path / "out", {"encode.self_supervised.size": 24})
    assert read_json(tmp_path / "out/trunk.json")["model"]["image_size"] == 24


# ---- timm --------------------------------------------------------------------------------------------------------


def test_a_safetensors_file_of_timm(tmp_path):
    vit, changes = dino(tmp_path)
    files = encode_trunk({}, tmp_path / "out", changes)
    assert sorted(files) == ["model.safetensors", "trunk.json"]
    config = read_json(tmp_path / "out/trunk.json")
    assert config["name"] == DINO
    assert config["licence"] == "Apache-2.0; DINO"
    assert config["mean"] == pytest.approx([0.485, 0.456, 0.406])  # what timm states
    trunk, images = load_trunk(tmp_path / "out"), pictures(32, 32)
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        tokens = vit.forward_features((images.float() / 255 - mean) / std)[:, 1:]
    torch.testing.assert_close(trunk(images).flatten(2).transpose(1, 2), tokens)
    assert files == encode_trunk({}, tmp_path / "again", changes)
    assert str(tmp_path) not in (tmp_path / "out/trunk.json").read_text()


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.", "module.backbone.", "teacher.backbone."])
def test_the_authors_own_file(tmp_path, prefix):
    _, changes = dino(tmp_path)
    expected = encode_trunk({}, tmp_path / "a", changes)
    _, changes = dino(tmp_path, suffix=".pth", prefix=prefix)
    assert encode_trunk({}, tmp_path / "b", changes) == expected


def test_readout_and_statistics_of_the_settings(tmp_path):
    vit, changes = dino(tmp_path, facet="keys", positions="dino", mean=[0.5] * 3, std=[0.25] * 3)
    encode_trunk({}, tmp_path / "out", changes)
    trunk, images, kept = load_trunk(tmp_path / "out"), pictures(32, 32), []
    vit.blocks[-1].attn.qkv.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad():
        vit.forward_features((images.float() / 255 - 0.5) / 0.25)
    torch.testing.assert_close(trunk(images).flatten(2).transpose(1, 2), kept[0][:, 1:, 24:48])
    assert trunk(pictures(40, 24)).shape == (2, 24, 5, 3)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"name": "vit_small_patch16_224.dino"}, "has 2 of another shape (patch_embed.proj.weight, pos_embed)"),
        ({"options": {**SIZES, "depth": 3}}, "lacks 12 tensors (blocks.2."),
        ({"sha256": "0" * 64}, "has sha256"),
        ({"weights": "nowhere/dino.pth"}, "no weight file at"),
        ({"name": "vit_of_nobody"}, "no backbone `vit_of_nobody`"),
        ({"name": "resnet18", "options": {}}, "the trunk resnet18"),
        ({"name": "vit_tiny_r_s16_p8_224", "options": {"depth": 1}}, "patches are cut by HybridEmbed"),
        ({"name": "vit_small_patch16_dinov3", "positions": "dino"}, "`encode.trunk.positions: dino` with Eva"),
    ],
)
def test_what_is_no_such_vit(tmp_path, changes, found):
    _, values = dino(tmp_path, **changes)
    with pytest.raises(ModelError) as caught:
        encode_trunk({}, tmp_path / "out", values)
    assert found in caught.value.found
    assert caught.value.allowed
    assert caught.value.fix
    assert not (tmp_path / "out").exists()


def test_the_hub(tmp_path, monkeypatch):
    vit, changes = dino(tmp_path, weights="hub", sha256=None)
    create, asked = timm.create_model, []

    def hub(name, *, pretrained=False, **options):
        if pretrained:
            asked.append((name, options))
            return vit
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(from_timm.timm, "create_model", hub)
    encode_trunk({}, tmp_path / "out", changes)
    assert asked == [(DINO, {"num_classes": 0, "dynamic_img_size": True, **SIZES})]
    assert torch.equal(load_trunk(tmp_path / "out").vit.pos_embed, vit.pos_embed)  # type: ignore[union-attr]

    def offline(name, *, pretrained=False, **options):
        if pretrained:
            raise OSError("cannot reach the hub")
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(from_timm.timm, "create_model", offline)
    with pytest.raises(ModelError) as caught:
        encode_trunk({}, tmp_path / "offline", changes)
    assert "cannot reach the hub" in caught.value.found
    assert "`encode.trunk.weights`" in caught.value.fix


# ---- backbone, model, none ---------------------------------------------------------------------------------------


def test_the_backbone_of_the_settings(tmp_path):
    changes = timm_backbone(tmp_path)
    save_backbone(tmp_path / "encode", encode_settings(changes).backbone)
    changes |= {"encode.trunk.source": "backbone", "encode.trunk.stride": 4}
    files = encode_trunk({}, tmp_path / "out", changes)
    assert sorted(files) == ["model.safetensors", "trunk.json"]
    assert files == encode_trunk({}, tmp_path / "again", changes)
    config, trunk = read_json(tmp_path / "out/trunk.json"), load_trunk(tmp_path / "out")
    assert (config["source"], config["stride"], config["licence"]) == ("backbone", 4, "Apache-2.0")
    expected = load_features(tmp_path / "encode", stride=4)(pictures())
    torch.testing.assert_close(trunk(pictures()), expected)
    assert expected.shape == (2, trunk.channels, 4, 6)


def test_a_random_backbone_depends_on_the_seed_alone(tmp_path):
    changes = {"encode.backbone.source": "random", "encode.backbone.name": "mobilenetv3_small_050"}
    changes |= {"encode.trunk.source": "backbone"}
    one, again, other = (encode_trunk({}, tmp_path / str(n), changes, seed=n // 2) for n in range(3))
    assert one == again
    assert one != other


def model_folder(folder, *, trunk=True):
    """What of a registered model counts here, and settings that name it."""
    write_json(folder / "model.json", {"method": "stego"})
    if trunk:
        save_trunk(
            folder / "trunk", net := TinyTrunk(image_size=16, layers=1), {"source": "pretrain", "model": net.config}
        )
    block = {"source": "model", "weights": str(folder), "sha256": model_identity(folder)}
    return {f"encode.trunk.{key}": value for key, value in block.items()}


def test_the_trunk_of_a_model_folder(tmp_path):
    changes = model_folder(tmp_path / "model")
    (tmp_path / "out").mkdir()
    assert encode_trunk({}, tmp_path / "out", changes) == hash_tree(tmp_path / "model/trunk")
    with pytest.raises(ModelError, match="model has the hash"):
        encode_trunk({}, tmp_path / "other", {**changes, "encode.trunk.sha256": "0" * 64})


def test_a_model_folder_without_a_trunk(tmp_path):
    with pytest.raises(ModelError) as caught:
        encode_trunk({}, tmp_path / "out", model_folder(tmp_path / "model", trunk=False))
    assert caught.value.found == f"{tmp_path / 'model'} holds no trunk"
    assert "trunk/trunk.json" in caught.value.allowed
    assert "`encode.trunk.source`" in caught.value.fix


def test_no_trunk(tmp_path, capsys):
    assert list(encode_trunk({}, tmp_path, {"encode.trunk.source": "none"})) == ["not-run.json"]
    assert read_json(tmp_path / "not-run.json") == {"trunk": "none", "run": False}
    assert "encode.trunk.source: none" in capsys.readouterr().out
    with pytest.raises(ModelError, match="there is no trunk"):
        load_trunk(tmp_path)


# ---- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": None}, "source timm needs"),
        ({"licence": None}, "source timm needs"),
        ({"sha256": None}, "needs its `sha256`"),
    ],
)
def test_settings_say_what_timm_needs(values, message):
    plain = {**encode_settings().trunk.model_dump(), "source": "timm", "name": "x", "weights": "x.pth"}
    plain |= {"sha256": "0" * 64, "licence": "x"}
    TrunkSettings(**plain)
    with pytest.raises(ValidationError, match=message):
        TrunkSettings(**{**plain, **values})


@pytest.mark.parametrize("source", ["clip", "none"])
def test_a_backbone_that_is_none_is_refused_before_anything_runs(source):
    with pytest.raises(SettingsError) as caught:
        encode_settings({"encode.trunk.source": "backbone", "encode.backbone.source": source})
    assert "trunk.source backbone needs backbone.source timm or random" in caught.value.allowed
