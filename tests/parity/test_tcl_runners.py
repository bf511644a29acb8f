"""TCL's runners on fixtures of a second implementation: each passes on right tensors and fails on wrong ones."""

from __future__ import annotations

import json
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers.official_tcl import CLIP, LOSSES, Official, random_state
from safetensors.torch import save_file

from benchmarks.plain import plain_pamr
from parity.fixtures import part
from parity.tcl import RUNNERS
from parity.test_parity import load_fixture, runner_of

TOLERANCE = {"rtol": 1e-3, "atol": 2e-5}
CONFIG = {"clip": CLIP, **LOSSES, "sim2mask": {"init_w": 8.0, "init_b": -0.5, "tau": 1.0}, "world_size": 1}
PAMR: dict[str, Any] = {"num_iter": 10, "dilations": [1, 2, 4, 8, 12, 24]}


def ids_of(count, *, seed):
    """Token ids whose largest is at the end of the text."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 90, (count, CLIP["context_length"]), generator=rng)
    ends = torch.randint(4, CLIP["context_length"], (count,), generator=rng)
    for row, end in zip(ids, ends, strict=True):
        row[end:] = 0
        row[end] = CLIP["vocab_size"] - 1
    return ids


def forward_fixture():
    state, rng = random_state(), torch.Generator().manual_seed(1)
    official = Official(state)
    images, ids = torch.randn(4, 3, 64, 64, generator=rng), ids_of(4, seed=2)
    noise = torch.rand(4, 4, 16, 16, generator=rng)
    tensors = {f"state.{name}": value for name, value in state.items()}
    tensors |= {"image": images, "text_tokens": ids, "uniform_noise": noise}
    with torch.no_grad():
        found = official.losses(images, ids, noise)
        soft = found.pop("soft")
        tokens, _ = official.tokens(images)
        last = f"clip_image_encoder.clip_visual.transformer.resblocks.{CLIP['vision_layers'] - 1}"
        own = torch.eye(4, dtype=torch.bool)
        tensors |= {f"ret.{name}": value for name, value in found.items()}
        tensors |= {
            "total_loss": sum(found.values(), torch.tensor(0.0)),
            "ret.mask": soft[own][:, None],
            "ret.neg_mask": soft[~own].reshape(4, 3, 16, 16),
            "masker.soft_all": soft,
            "masker.pos_deterministic": (soft[own] > 0.5).float()[:, None],
            "masker.image_emb": official.embedding(images),
            "image_feat_LND": tokens.transpose(0, 1),
            "text_emb": official.text(ids),
            "clip_dense_prehead": official.dense(images, last),
            "clip_global_emb": official.image(images),
        }
    return tensors, {"config": CONFIG, "tolerance": TOLERANCE}


def gradient_fixture():
    tensors, description = forward_fixture()
    state = part(tensors, "state.")
    trained = {n: v.requires_grad_() for n, v in state.items() if n.startswith(("masker.", "tcl"))}
    found = Official(state).losses(tensors["image"], tensors["text_tokens"], tensors["uniform_noise"])
    found.pop("soft")
    gradients = torch.autograd.grad(sum(found.values(), torch.tensor(0.0)), list(trained.values()))
    tensors = {name: value.detach() for name, value in tensors.items()}
    tensors |= {f"grad.{name}": value for name, value in zip(trained, gradients, strict=True)}
    return tensors, {**description, "tolerance": {"rtol": 2e-3, "atol": 2e-5}}


def inference_fixture():
    tensors, description = forward_fixture()
    official, rng = Official(part(tensors, "state.")), torch.Generator().manual_seed(4)
    ids = ids_of(15, seed=5).view(5, 3, -1)
    last = f"clip_image_encoder.clip_visual.transformer.resblocks.{CLIP['vision_layers'] - 1}"
    head = ("clip_image_encoder.clip_proj.ln", "clip_image_encoder.clip_proj.proj")
    with torch.no_grad():
        text = F.normalize(official.text(ids.flatten(0, 1)).view(5, 3, -1).mean(dim=1), dim=1)
        tensors |= {"text_tokens": ids, "text_embedding": text}
        for tag, (height, width), sides in (("aligned", (64, 80), (0, 0, 0, 0)), ("padded", (52, 75), (2, 3, 6, 6))):
            image = torch.randn(1, 3, height, width, generator=rng)
            padded = F.pad(image, sides)
            cosines = official.cosines(official.embedding(padded), text)
            soft = (8.0 * cosines - 0.5).sigmoid()
            dense = official.head(official.dense(padded, last).movedim(1, -1), *head).movedim(-1, 1)
            known = (10 * (official.cosines(dense, text) - 0.25)).sigmoid()
            known = F.interpolate(known, size=soft.shape[2:], mode="bilinear", align_corners=False)
            guide = F.interpolate(padded, size=soft.shape[2:], mode="bilinear", align_corners=True)
            tensors |= {f"{tag}.image": image, f"{tag}.simmap": cosines}
            drawn = plain_pamr(guide, soft, iterations=PAMR["num_iter"], dilations=PAMR["dilations"])
            for refined, mask in enumerate((soft, drawn)):
                for weight in (0.0, 0.3):
                    mixed = weight * known + (1 - weight) * mask
                    whole = F.interpolate(mixed, size=padded.shape[2:], mode="bilinear", align_corners=False)
                    found = whole[:, :, sides[2] : sides[2] + height, sides[0] : sides[0] + width]
                    tensors[f"{tag}.mask_pamr{refined}_kp{weight}"] = found
    return tensors, {**description, "config": {**CONFIG, "pamr": PAMR}}


def tokenizer_fixture():
    strings = ["a cat", "naïve &amp; loud", "many words " * 60, ""]
    tokens = open_clip.SimpleTokenizer(context_length=77)(strings)
    return {"tokens": tokens}, {"strings": strings, "tolerance": "exact"}


@pytest.mark.parametrize(
    ("name", "make", "perturbed"),
    [
        ("tcl_model_forward", forward_fixture, "masker.image_emb"),
        ("tcl_model_forward", forward_fixture, "ret.tclf_loss"),
        ("tcl_model_forward", forward_fixture, "state.masker.sim2mask.b"),
        ("tcl_model_grads", gradient_fixture, "grad.masker.image_encoder.decoder.decoder.net.1.conv.gate.gate"),
        ("tcl_inference", inference_fixture, "padded.mask_pamr1_kp0.3"),
        ("tcl_tokenizer", tokenizer_fixture, "tokens"),
    ],
)
def test_a_runner_tells_right_from_wrong(name, make, perturbed):
    tensors, description = make()
    run = runner_of(name)
    assert run
    assert run in RUNNERS.values()
    run(tensors, description)
    wrong = tensors[perturbed] + (1 if perturbed == "tokens" else 0.05)
    with pytest.raises(AssertionError):
        run({**tensors, perturbed: wrong}, description)


def test_a_fixture_that_builds_upon_another(tmp_path):
    save_file({"state.a": torch.zeros(1), "ids": torch.zeros(1)}, tmp_path / "tcl_model_forward_2.safetensors")
    save_file({"ids": torch.ones(1)}, tmp_path / "tcl_inference_2.safetensors")
    for name, config in (("tcl_model_forward_2", {"a": 1, "b": 1}), ("tcl_inference_2", {"b": 2})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"config": config}))
    tensors, description = load_fixture(tmp_path, "tcl_inference_2")
    assert sorted(tensors) == ["ids", "state.a"]
    assert tensors["ids"] == 1
    assert description["config"] == {"a": 1, "b": 2}
