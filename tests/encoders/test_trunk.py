"""Frozen trunks: ViTs of timm, read out densely."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import encode_settings, timm_backbone

from lexiseg.encoders.backbone_trunk import backbone_trunk
from lexiseg.encoders.from_timm import save_backbone
from lexiseg.encoders.tiny_trunk import TinyTrunk
from lexiseg.encoders.trunk import NOT_RUN, build_trunk, load_trunk, save_trunk
from lexiseg.encoders.vit_trunk import Facet, Positions, VitTrunk, build_vit, dino_positions
from lexiseg.errors import ModelError
from lexiseg.storage import write_json

SMALL: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 3}
STATISTICS: dict[str, Any] = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def small(
    name: str = "vit_small_patch8_224.dino", *, facet: Facet = "features", positions: Positions = "timm", **options: Any
) -> VitTrunk:
    torch.manual_seed(0)
    vit = build_vit(name, {**SMALL, "img_size": 32, **options})
    return VitTrunk(vit, facet=facet, positions=positions, **STATISTICS)


def pictures(height=32, width=32):
    rng = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, height, width), generator=rng, dtype=torch.uint8)


@pytest.mark.parametrize("name", ["vit_small_patch8_224.dino", "vit_small_patch14_reg4_dinov2.lvd142m"])
def test_features_are_the_tokens_after_the_last_norm(name):
    trunk = small(name, img_size=56)
    side = 56 if trunk.multiple == 14 else 32
    images = pictures(side, side)
    mean, std = (torch.tensor(STATISTICS[part]).view(1, 3, 1, 1) for part in ("mean", "std"))
    tokens = trunk.vit.forward_features((images.float() / 255 - mean) / std)[:, trunk.vit.num_prefix_tokens :]
    cells = side // trunk.multiple
    assert trunk(images).shape == (2, 24, cells, cells)
    torch.testing.assert_close(trunk(images).flatten(2).transpose(1, 2), tokens)


@pytest.mark.parametrize("positions", ["timm", "dino"])
def test_pictures_of_any_size(positions):
    assert small(positions=positions)(pictures(24, 56)).shape == (2, 24, 3, 7)


def test_positions_of_dino_are_those_of_timm_at_the_trained_size_and_near_them_elsewhere():
    dino, plain = small(positions="dino"), small()
    torch.testing.assert_close(dino(pictures()), plain(pictures()))
    apart = (dino(pictures(40, 40)) - plain(pictures(40, 40))).abs().max()
    assert 0 < float(apart) < 0.5


def test_positions_are_read_a_little_apart():
    positions = torch.randn(1, 1 + 16, 8)
    assert dino_positions(positions, height=4, width=4) is positions
    found = dino_positions(positions, height=6, width=5)
    assert found.shape == (1, 31, 8)
    torch.testing.assert_close(found[:, 0], positions[:, 0])
    grid = positions[:, 1:].view(1, 4, 4, 8).permute(0, 3, 1, 2)
    exact = F.interpolate(grid, size=(6, 5), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    assert not torch.allclose(found[:, 1:], exact, atol=1e-4)
    assert float((found[:, 1:] - exact).abs().max()) < 0.3


def attention_input(trunk, images):
    """What the last block's attention reads, and what it makes keys of by its own code."""
    last, kept = trunk.vit.blocks[-1], []
    hook = last.attn.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    trunk(images)
    hook.remove()
    return kept[0]


def as_tokens(maps):
    return maps.flatten(2).transpose(1, 2)


def test_keys_are_those_of_the_last_block():
    trunk = small(facet="keys")
    with torch.no_grad():
        trunk.vit.blocks[-1].attn.qkv.bias.copy_(torch.randn(72))
    images = pictures()
    keys = trunk.vit.blocks[-1].attn.qkv(attention_input(trunk, images))[:, 1:, 24:48]
    torch.testing.assert_close(as_tokens(trunk(images)), keys)


# The kinds of attention of Eva: one matrix with its biases beside it, one without bias, one for each.
@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3_qkvb", "vit_small_patch16_dinov3", "eva02_base_patch16_clip_224"]
)
def test_keys_of_eva_are_those_it_attends_with(name):
    trunk = small(name, facet="keys")
    attention, seen = trunk.vit.blocks[-1].attn, []
    for name_ in ("q_bias", "k_bias", "v_bias"):  # pretrained ones are not 0 either, except the key's
        if getattr(attention, name_) is not None:
            torch.nn.init.normal_(getattr(attention, name_))
    attention.k_norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    found = as_tokens(trunk(pictures()))
    keys = seen[0].transpose(1, 2).flatten(2)[:, trunk.vit.num_prefix_tokens :]  # of (B, heads, tokens, numbers)
    torch.testing.assert_close(found, keys)
    assert trunk.channels == found.shape[-1] == 24


def test_keys_may_be_narrower_than_the_vit():
    trunk = small("vit_base_patch16_sapiens2", facet="keys", embed_dim=32, num_heads=4, num_kv_heads=2)
    assert trunk(pictures()).shape == (2, 16, 2, 2)
    assert trunk.channels == 16


def test_blocks_without_one_attention_have_no_keys():
    with pytest.raises(ModelError) as error:
        small("vit_base_patch16_xp_224", facet="keys")
    assert "`encode.trunk.facet: keys` with blocks of the kind" in error.value.found
    assert "qkv or k_proj" in error.value.allowed
    assert "encode.trunk.facet: features" in error.value.fix


def test_nothing_learns_or_drops():
    trunk = small()
    assert not trunk.training
    assert not any(parameter.requires_grad for parameter in trunk.parameters())


def test_sides_that_are_no_whole_patches_are_refused():
    with pytest.raises(ModelError) as error:
        small()(pictures(30, 32))
    assert error.value.found == "pictures of 30 x 32 pixels"
    assert "multiples of 8" in error.value.allowed
    with pytest.raises(ModelError, match="pictures of 4 x 4 pixels"):
        small()(pictures(4, 4))


def test_what_is_no_vit_is_refused():
    with pytest.raises(ModelError) as error:
        build_vit("resnet18", {})
    assert "the trunk resnet18" in error.value.found
    assert "encode.trunk.source: backbone" in error.value.fix
    with pytest.raises(ModelError, match="no backbone `vit_of_nobody`"):
        build_vit("vit_of_nobody", {})
    with pytest.raises(ModelError, match="the trunk swin_tiny_patch4_window7_224, a SwinTransformer"):
        build_vit("swin_tiny_patch4_window7_224", {})


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vit_base_mci_224"])
def test_a_hybrid_is_refused(name):
    with pytest.raises(ModelError) as error:
        VitTrunk(build_vit(name, {"depth": 1}), facet="features", positions="timm", **STATISTICS)
    assert error.value.found == "a trunk whose patches are cut by HybridEmbed"
    assert "square patches side by side" in error.value.allowed
    assert "encode.trunk.name" in error.value.fix


def test_patches_of_unequal_sides_are_refused():
    with pytest.raises(ModelError) as error:
        small(patch_size=(8, 16))
    assert error.value.found == "a trunk whose patches are cut by PatchEmbed, 8 x 16 pixels"


def test_overlapping_patches_are_refused():
    vit: Any = build_vit("vit_small_patch8_224.dino", {**SMALL, "img_size": 32})
    vit.patch_embed.proj.stride = (4, 4)
    with pytest.raises(ModelError, match="PatchEmbed, 8 x 8 pixels"):
        VitTrunk(vit, facet="features", positions="timm", **STATISTICS)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),  # registers
        ("deit3_small_patch16_224", {}),  # no position for the class token
        ("vit_base_patch16_siglip_224", {}),  # no class token
        ("vit_small_patch16_dinov3", {}),  # no learned positions
        ("vit_small_patch8_224.dino", {"img_size": (32, 48)}),  # no square
    ],
)
def test_positions_of_dino_need_the_vit_of_dino(name, options):
    with pytest.raises(ModelError) as error:
        small(name, positions="dino", **options)
    assert error.value.found.startswith("`encode.trunk.positions: dino` with ")
    assert "one class token and a square of learned positions" in error.value.allowed
    assert "encode.trunk.positions: timm" in error.value.fix


# ---- folders -----------------------------------------------------------------------------------------------------


def vit_config(**changes):
    values = {"source": "timm", "name": "vit_small_patch8_224.dino", "options": {**SMALL, "img_size": 32}}
    return {**values, "facet": "keys", "positions": "dino", "mean": [0.5] * 3, "std": [0.25] * 3, **changes}


def cnn_trunk(folder, **changes):
    save_backbone(folder, encode_settings({**timm_backbone(folder), **changes}).backbone)
    return backbone_trunk(folder / "backbone", stride=8)


def saved(folder, kind):
    torch.manual_seed(0)
    if kind == "backbone":
        trunk, config = cnn_trunk(folder / "encode")
    elif kind == "pretrain":
        trunk = TinyTrunk(image_size=32, layers=1)
        config = {"source": "pretrain", "model": trunk.config}
    else:
        config = vit_config()
        trunk = build_trunk(config)
    save_trunk(folder / "trunk", trunk, config)
    return trunk.eval()


@pytest.mark.parametrize("kind", ["pretrain", "timm", "backbone"])
def test_a_saved_trunk_is_loaded_frozen(tmp_path, kind):
    trunk = saved(tmp_path, kind)
    torch.manual_seed(1)
    loaded = load_trunk(tmp_path / "trunk")
    images = pictures(40, 24)
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    found = loaded(images)
    torch.testing.assert_close(found, trunk(images).detach())  # torch attends by other code where nothing learns
    assert not found.requires_grad
    assert (loaded.multiple, loaded.channels) == (trunk.multiple, found.shape[1])
    assert sorted(path.name for path in (tmp_path / "trunk").iterdir()) == ["model.safetensors", "trunk.json"]


@pytest.mark.parametrize("kind", ["pretrain", "timm", "backbone"])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (30, 32), (32, 36)])
def test_sides_that_are_no_whole_cells_are_refused_by_every_kind(tmp_path, kind, height, width):
    saved(tmp_path, kind)
    with pytest.raises(ModelError) as error:
        load_trunk(tmp_path / "trunk")(pictures(height, width))
    assert error.value.found == f"pictures of {height} x {width} pixels"
    assert error.value.allowed == "sides that are multiples of 8, the trunk's patch or stride"
    assert error.value.fix == "resize or crop them first"


def test_a_folder_without_a_trunk(tmp_path):
    with pytest.raises(ModelError) as error:
        load_trunk(tmp_path)
    assert error.value.found == f"{tmp_path} has no trunk.json"
    assert "the stage encode-trunk" in error.value.allowed
    assert "dvc repro encode-trunk" in error.value.fix
    write_json(tmp_path / NOT_RUN, {"trunk": "none"})
    with pytest.raises(ModelError, match="says that there is no trunk"):
        load_trunk(tmp_path)


def test_the_clips_own_tower_is_no_trunk(tmp_path):
    write_json(tmp_path / "backbone/backbone.json", {"source": "clip"})
    with pytest.raises(ModelError) as error:
        backbone_trunk(tmp_path / "backbone", stride=8)
    assert "`encode.backbone.source` is clip" in error.value.found
    assert error.value.allowed == "a CNN of timm"
    assert "encode.backbone.source: timm" in error.value.fix


def test_a_vit_as_backbone_is_no_trunk(tmp_path):
    """Its pyramid would begin with random layers."""
    changes = {"source": "random", "name": "vit_tiny_patch16_224", "weights": None, "sha256": None}
    with pytest.raises(ModelError) as error:
        cnn_trunk(tmp_path, **{f"encode.backbone.{key}": value for key, value in changes.items()})
    assert "the backbone is the ViT vit_tiny_patch16_224" in error.value.found
    assert error.value.allowed == "a CNN of timm"
    assert "encode.trunk.source: timm" in error.value.fix
