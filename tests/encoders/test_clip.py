import os

import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import CAPTIONS, open_clip_model, tiny_clip
from safetensors.torch import save_file

from lexiseg.encoders.clip import (
    FrozenClip,
    dense_embeddings,
    load_clip,
    save_open_clip,
    save_tiny_clip,
    value_path_block,
)
from lexiseg.encoders.tiny_clip import local_attention_mask
from lexiseg.errors import ModelError
from lexiseg.storage import hash_tree, read_json, sha256_of_file

NAME = "lexiseg-test"


@pytest.fixture
def original(tmp_path):
    return open_clip_model(tmp_path / "configs")


@pytest.fixture
def tiny(tmp_path):
    save_tiny_clip(*tiny_clip(), tmp_path / "tiny")
    return load_clip(tmp_path / "tiny")


def pixels(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def saved(folder, original, *, weights=None, **arguments):
    """Write the model's weights as a file (unless there is one), and from it the folder."""
    if weights is None:
        weights = folder / "weights.safetensors"
        save_file(original.state_dict(), weights)
    arguments = {"name": NAME, "pretrained": str(weights), "sha256": None, "licence": "MIT", **arguments}
    save_open_clip(folder / "clip", **arguments)
    return load_clip(folder / "clip")


# ---- folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "pt", "checkpoint"])
def test_a_weight_file_gives_bitwise_equal_features(tmp_path, original, kind):
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    state = original.state_dict()
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if kind == "checkpoint" else state, path)
    clip = saved(tmp_path, original, weights=path, sha256=sha256_of_file(path))
    images, tokens = pixels(2, 3, 32, 32), open_clip.get_tokenizer(NAME)(CAPTIONS)
    with torch.inference_mode():
        assert torch.equal(clip.tokenize(CAPTIONS), tokens)
        assert torch.equal(clip.model.encode_text(tokens), original.encode_text(tokens))  # type: ignore[operator]
        expected = original.encode_image(clip.normalise(images))
        assert torch.equal(clip.embed_images(images), F.normalize(expected, dim=-1))


def test_what_the_folder_states(tmp_path, original):
    clip = saved(tmp_path, original)
    assert (clip.kind, clip.licence, clip.dim, clip.patch_size) == ("open_clip", "MIT", 24, 8)
    assert clip.mean == open_clip.OPENAI_DATASET_MEAN
    assert clip.std == open_clip.OPENAI_DATASET_STD
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())
    assert not clip.model.training
    assert clip.unknown_words("xyzzy") == []  # byte pairs spell every word


def test_the_folder_carries_its_tokenizer(tmp_path, original, monkeypatch):
    saved(tmp_path, original)
    expected = open_clip.get_tokenizer(NAME)(["a photo of a zebra"])
    monkeypatch.setattr("gzip.open", _only_below(tmp_path / "clip"))
    assert torch.equal(load_clip(tmp_path / "clip").tokenize(["a photo of a zebra"]), expected)


def _only_below(folder):
    import gzip

    real = gzip.open

    def opened(path, *arguments, **more):
        assert str(path).startswith(str(folder)), path
        return real(path, *arguments, **more)

    return opened


def test_equal_weights_give_equal_folders(tmp_path, original):
    for name in "ab":
        (tmp_path / name).mkdir()
        saved(tmp_path / name, original)
        save_tiny_clip(*tiny_clip(), tmp_path / name / "tiny")
    for kind in ("clip", "tiny"):
        assert hash_tree(tmp_path / "a" / kind) == hash_tree(tmp_path / "b" / kind)


def test_a_tiny_clip_comes_back_bitwise(tiny):
    model, tokenizer = tiny_clip()
    model.requires_grad_(False)  # torch takes another path, with other last bits, where it might need a gradient
    images = pixels(2, 3, 16, 16)
    assert (tiny.kind, tiny.dim, tiny.patch_size, tiny.mean) == ("tiny", 24, 8, (0.5, 0.5, 0.5))
    with torch.inference_mode():
        assert torch.equal(
            tiny.embed_images(images), F.normalize(model.encode_image((images.float() / 255 - 0.5) / 0.5), dim=-1)
        )
        assert torch.equal(tiny.model.encode_text(tiny.tokenize(CAPTIONS)), model.encode_text(tokenizer(CAPTIONS)))
    assert tiny.unknown_words("a purple ring") == ["purple"]


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ModelError) as caught:
        load_clip(tmp_path)
    assert "no clip.json" in caught.value.found
    assert "CLIP folder" in caught.value.allowed
    assert "dvc repro encode" in caught.value.fix


# ---- texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny", "open_clip"])
def test_a_text_has_one_embedding_alone_and_among_others(request, tmp_path, original, kind):
    clip: FrozenClip = request.getfixturevalue("tiny") if kind == "tiny" else saved(tmp_path, original)
    alone = clip.embed_texts(["a red ring"])
    assert alone.shape == (1, 24)
    assert float(alone.norm()) == pytest.approx(1, abs=1e-6)
    others = [f"{caption} {number}" for number in range(10) for caption in CAPTIONS]
    for position in (0, 1, 7, 31, 32, 39):
        texts = [*others[:position], "a red ring", *others[position:]]
        assert torch.equal(clip.embed_texts(texts)[position], alone[0])
    assert clip.embed_texts([]).shape == (0, 24)


# ---- dense embeddings --------------------------------------------------------------------------------------------


def long_clip():
    """A CLIP with the release's context of 77 tokens."""
    torch.manual_seed(0)
    vision = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 16, "image_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3}
    model = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)  # type: ignore[arg-type]
    tokenize = open_clip.SimpleTokenizer(context_length=77)
    return FrozenClip(model=model, tokenize=tokenize, mean=(0,) * 3, std=(1,) * 3, dim=32, kind="open_clip", licence="")


def test_texts_are_computed_as_far_as_they_go():
    clip = long_clip()
    texts = ["dog", "", "a dog on the grass beside a tree", "dog " * 20, "cat " * 60, "word " * 200, "その他 🐕"]
    texts += [f"label {number}" for number in range(70)]
    lengths = []
    clip.model.transformer.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))  # type: ignore[union-attr]
    found = clip.embed_texts(texts)
    assert sorted(set(lengths)) == [8, 16, 32, 77]
    with torch.inference_mode():
        expected = F.normalize(clip.model.encode_text(clip.tokenize(texts)), dim=1)  # type: ignore[operator]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    for text, vector in zip(texts, found, strict=True):  # bit by bit what it is alone
        assert torch.equal(clip.embed_texts([text])[0], vector)


def reference(visual, images, *, mask=None):
    """MaskCLIP spelt out: in the last block a mask lets each token attend to itself alone."""
    tokens = visual.conv1(images).flatten(2).transpose(1, 2)
    classes = visual.class_embedding.expand(len(tokens), 1, -1)
    tokens = visual.ln_pre(torch.cat([classes, tokens], dim=1) + visual.positional_embedding)
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        tokens = block(tokens, attn_mask=mask)
    alone = torch.full((tokens.shape[1], tokens.shape[1]), float("-inf")).fill_diagonal_(0)
    patches = visual.ln_post(last(tokens, attn_mask=alone))[:, 1:] @ visual.proj
    side = int(patches.shape[1] ** 0.5)
    return F.normalize(patches, dim=-1).transpose(1, 2).unflatten(2, (side, side))


@torch.inference_mode()
def test_the_value_path_is_attention_to_oneself(original, tiny):
    images = torch.randn(2, 3, 32, 32)
    found = dense_embeddings(original.visual, images)
    assert found.shape == (2, 24, 4, 4)
    assert torch.allclose(found, reference(original.visual, images), atol=1e-5)
    assert torch.allclose(found.norm(dim=1), torch.ones(2, 4, 4), atol=1e-5)
    images = torch.randn(2, 3, 16, 16)
    expected = reference(tiny.model.visual, images, mask=local_attention_mask(2, 2))
    assert torch.allclose(dense_embeddings(tiny.model.visual, images), expected, atol=1e-5)


@torch.inference_mode()
def test_a_value_path_block_treats_every_token_alike(original):
    block, tokens = original.visual.transformer.resblocks[-1], torch.randn(1, 5, 32)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.allclose(
        value_path_block(block, tokens)[:, order], value_path_block(block, tokens[:, order]), atol=1e-6
    )


def test_dense_embeddings_of_other_sizes(tmp_path, original, tiny):
    assert saved(tmp_path, original).embed_patches(pixels(1, 3, 24, 40)).shape == (1, 24, 3, 5)
    assert tiny.embed_patches(pixels(1, 3, 24, 40)).shape == (1, 24, 3, 5)


def test_a_tower_that_is_no_vit():
    with pytest.raises(ModelError) as caught:
        dense_embeddings(torch.nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 8, 8))
    assert "Conv2d" in caught.value.found
    assert "ViT of open_clip" in caught.value.allowed
    assert "`maskclip`" in caught.value.fix


# ---- what is refused ---------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_not_run(tmp_path, original):
    torch.save({"state_dict": original.state_dict(), "extra": Evil(tmp_path / "hacked")}, tmp_path / "evil.pt")
    with pytest.raises(ModelError) as caught:
        saved(tmp_path, original, weights=tmp_path / "evil.pt")
    assert "more than tensors" in caught.value.found
    assert "never executed" in caught.value.allowed
    assert "safetensors" in caught.value.fix
    assert not (tmp_path / "hacked").exists()
    assert not (tmp_path / "clip/clip.json").exists()


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pt", "empty.safetensors", "empty.pt"])
def test_a_truncated_file(tmp_path, original, name):
    whole = tmp_path / f"whole{name[name.index('.') :]}"
    save_file(original.state_dict(), whole) if whole.suffix == ".safetensors" else torch.save(
        original.state_dict(), whole
    )
    content = whole.read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2] if name.startswith("cut") else b"")
    with pytest.raises(ModelError) as caught:
        saved(tmp_path, original, weights=tmp_path / name)
    assert name in caught.value.found
    assert not (tmp_path / "clip").exists()


def test_weights_of_another_architecture(tmp_path, original):
    other = open_clip_model(tmp_path / "configs", name="lexiseg-test-wide", width=48)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ModelError) as caught:
        saved(tmp_path, original, weights=tmp_path / "other.safetensors")
    assert "do not load into lexiseg-test" in caught.value.found
    assert "size mismatch" in caught.value.found
    assert f"complete state_dict of {NAME}" in caught.value.allowed
    assert "`encode.clip.model`" in caught.value.fix


def test_another_hash(tmp_path, original):
    with pytest.raises(ModelError) as caught:
        saved(tmp_path, original, sha256="0" * 64)
    assert sha256_of_file(tmp_path / "weights.safetensors") in caught.value.found
    assert "0" * 64 in caught.value.allowed
    assert "params.yaml" in caught.value.fix


@pytest.mark.parametrize(
    ("arguments", "found", "allowed", "fix"),
    [
        ({"name": "ViT-Q-99"}, "ViT-Q-99", "ViT-B-16, ", "choose one"),
        # its tokenizer would have to come from a hub: taking CLIP's own would give wrong vectors silently
        ({"name": "ViT-B-16-SigLIP"}, "ViT-B-16-SigLIP", "comes with its tokenizer", "choose one"),
        ({"name": "coca_ViT-B-32"}, "coca_ViT-B-32", "ViT-B-16, ", "choose one"),
        ({"name": "ViT-B-32", "pretrained": "nowhere.pt"}, "neither a file nor a tag", "openai, ", "weights add"),
        ({"name": NAME, "pretrained": "nowhere.pt"}, "neither a file nor a tag", "no tags", "weights add"),
        ({"name": "ViT-B-32", "pretrained": "openai"}, "QuickGELU", "same activation", "ViT-B-32-quickgelu"),
        (
            {"name": "ViT-B-32-quickgelu", "pretrained": "laion2b_s34b_b79k"},
            "neither a file nor a tag",
            "openai",
            "weights add",
        ),
    ],
)
def test_what_open_clip_cannot_give(tmp_path, original, arguments, found, allowed, fix):
    with pytest.raises(ModelError) as caught:
        saved(tmp_path, original, **arguments)
    assert found in caught.value.found
    assert allowed in caught.value.allowed
    assert fix in caught.value.fix


def test_a_tag_without_a_network(tmp_path, original, monkeypatch):
    def offline(*_, **__):
        raise RuntimeError("Failed to download weights for tag 'openai'\noffline")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(ModelError) as caught:
        saved(tmp_path, original, name="ViT-B-32-quickgelu", pretrained="openai")
    assert "Failed to download" in caught.value.found
    assert "network" in caught.value.allowed
    assert "HF_HUB_OFFLINE=0" in caught.value.fix


def test_the_config_is_plain_json(tmp_path, original):
    saved(tmp_path, original)
    config = read_json(tmp_path / "clip/clip.json")
    assert sorted(config) == ["kind", "licence", "mean", "model", "std"]
    assert str(tmp_path) not in (tmp_path / "clip/clip.json").read_text()
