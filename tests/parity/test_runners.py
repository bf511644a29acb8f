"""The runners themselves, on fixtures made here: each passes on right tensors and fails on wrong ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.official_lseg import SIZES, TEXT, forward, random_state

from lexiseg.foreign import ForeignCheckpoint
from lexiseg.methods.lseg.build import build_model
from lexiseg.methods.lseg.checkpoint import import_checkpoint, our_name
from parity.lseg import RUNNERS as LSEG
from parity.test_parity import runner_of

TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}


def network(**settings):
    state = random_state(block=settings["arch_option"] > 0)
    checkpoint = ForeignCheckpoint(file="x", sha256="", tensors=state, settings=settings)
    imported = import_checkpoint(checkpoint, {"heads": SIZES["heads"]})
    model = build_model(imported.config)
    model.load_state_dict(dict(imported.tensors))
    return state, model


@pytest.mark.parametrize(
    "name",
    ["lseg_b16_arch0", "lseg_b16_arch2_depthwise", "lseg_multiscale_eval", "lseg_train_grads", "lseg_fewshot_metrics"],
)
def test_names_of_known_kinds(name):
    assert runner_of(name) in LSEG.values()


def test_unknown_names():
    assert runner_of("lseg_something_else") is None


def network_fixture():
    config = {"arch_option": 2, "block_depth": 3, "options": {"activation": "lrelu"}, "vit": {"heads": 1}}
    state, model = network(arch_option=2, block_depth=3, activation="lrelu")
    rng = torch.Generator().manual_seed(1)
    images, text = torch.randn(1, 3, 64, 96, generator=rng), torch.randn(6, TEXT, generator=rng)
    tensors = {f"state_dict.{key}": value for key, value in state.items()}
    tensors |= {"input": images, "text_features_raw": text, "text_features_raw_subset": text[[2, 4, 0]]}
    logits = forward(state, images, text, arch_option=2, block_depth=3)
    few = forward(state, images, text[[2, 4, 0]], arch_option=2, block_depth=3)
    tensors |= {"logits_fp32": logits, "logits_fp16path": logits + 0.001, "logits_fp32_subset": few}
    tensors["logit_scale"] = torch.tensor(1 / 0.07)
    seen = {}
    backbone: Any = model.eval().backbone
    for level in range(4):
        parts = {"tap": backbone.vit.blocks[level], "reassembled": backbone.reassemble[level]}
        for what, module in {**parts, "path": model.decoder.refinenet[level]}.items():
            name = f"{what}{level + 1}"
            module.register_forward_hook(lambda m, i, output, name=name: seen.update({name: output}))
    model.head.register_forward_hook(lambda m, i, output: seen.update({"image_embedding_raw": output[:, :, ::4, ::4]}))
    with torch.no_grad():
        seen["logits_before_final_upsample"] = model.score(model.embed(images), F.normalize(text, dim=1))
    tensors |= {f"mid.{name}": value for name, value in seen.items()}
    tolerance = {name: {"atol": 0.002, "rtol": 1e-3} for name in ("logits_fp32", "logits_fp16path", "mid")}
    return tensors, {"config": config, "tolerance": tolerance}, "mid.path2"


def gradient_fixture():
    config = {"arch_option": 1, "block_depth": 2, "activation": "lrelu", "ignore_index": -1, "vit": {"heads": 1}}
    state, model = network(arch_option=1, block_depth=2, activation="lrelu")
    rng = torch.Generator().manual_seed(2)
    images, text = torch.randn(2, 3, 64, 64, generator=rng), torch.randn(6, TEXT, generator=rng)
    target = torch.randint(-1, 6, (2, 64, 64), generator=rng)
    logits = model.train()(images, F.normalize(text, dim=1))
    loss = F.cross_entropy(logits, target, ignore_index=-1)
    loss.backward()
    tensors = {f"state_dict.{key}": value for key, value in state.items()}
    tensors |= {"input": images, "target": target, "text_features_raw": text, "loss": loss.detach()}
    tensors["logits"] = logits.detach()
    parameters: Any = {name: value.grad for name, value in model.named_parameters()}
    buffers = dict(model.named_buffers())
    for name in ("pretrained.model.cls_token", "scratch.head1.bias", "scratch.layer4_rn.weight"):
        tensors[f"grad.{name}"] = parameters[our_name(name)]
    name = "scratch.refinenet1.resConfUnit2.bn1.running_mean"
    tensors[f"after.{name}"] = buffers[str(our_name(name))].clone()
    without = ["pretrained.model.norm.bias", "pretrained.model.head.bias", "scratch.refinenet4.resConfUnit1.bn1.bias"]
    tolerance = dict.fromkeys(("logits", "loss", "grad"), TOLERANCE)
    return tensors, {"config": config, "tolerance": tolerance, "params_without_gradient": without}, f"after.{name}"


def multi_scale_fixture():
    """A plain double loop over windows, in double precision."""
    rng = torch.Generator().manual_seed(3)
    image, weight, bias = (torch.randn(*s, generator=rng) for s in ((1, 3, 40, 70), (4, 3, 5, 5), (4,)))
    base, side, stride, scales = 52, 48, 32, [0.5, 1.0, 1.75]
    tensors = {"model.conv.weight": weight, "model.conv.bias": bias, "landscape.input": image}
    calls = {}

    def pad(x, rows, columns):
        return F.pad(x, (0, max(0, columns - x.shape[3]), 0, max(0, rows - x.shape[2])), value=-1.0)

    def resize(x, rows, columns):
        return F.interpolate(x, size=(rows, columns), mode="bilinear", align_corners=True)

    for flip in (0, 1):
        total, count = torch.zeros(1, 4, 40, 70, dtype=torch.float64), 0

        def both(piece):
            once = torch.tanh(F.conv2d(piece, weight.double(), bias.double(), padding=2))
            again = torch.tanh(F.conv2d(piece.flip(3), weight.double(), bias.double(), padding=2)).flip(3)
            return once + again if flip else once  # noqa: B023

        for scale in scales:
            columns = math.ceil(base * scale)
            rows = math.floor(40 * columns / 70 + 0.5)
            scaled = pad(resize(image.double(), rows, columns), side, side)
            scores = torch.zeros(1, 4, *scaled.shape[2:], dtype=torch.float64)
            times = torch.zeros(1, 1, *scaled.shape[2:], dtype=torch.float64)
            down = 1 if max(rows, columns) <= side else math.ceil((scaled.shape[2] - side) / stride) + 1
            right = 1 if max(rows, columns) <= side else math.ceil((scaled.shape[3] - side) / stride) + 1
            for top in range(0, down * stride, stride):
                for left in range(0, right * stride, stride):
                    piece = scaled[:, :, top : top + side, left : left + side]
                    found = both(pad(piece, side, side))[:, :, : piece.shape[2], : piece.shape[3]]
                    scores[:, :, top : top + side, left : left + side] += found
                    times[:, :, top : top + side, left : left + side] += 1
                    count += 1 + flip
            total += resize((scores / times)[:, :, :rows, :columns], 40, 70)
        tensors[f"landscape.scores.flip{flip}"] = total.float()
        calls[f"landscape.flip{flip}"] = count
    tensors["landscape.pad100"] = pad(image, 100, 100)
    config = {"base_size": base, "crop_size": side, "scales": scales}
    description = {"config": config, "crop_forward_calls": calls, "tolerance": TOLERANCE}
    return tensors, description, "landscape.scores.flip1"


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("lseg_b16_arch2_depthwise", network_fixture),
        ("lseg_train_grads", gradient_fixture),
        ("lseg_multiscale_eval", multi_scale_fixture),
    ],
)
def test_a_runner_tells_right_from_wrong(name, make):
    tensors, description, perturbed = make()
    run = runner_of(name)
    assert run
    run(tensors, description)
    with pytest.raises(AssertionError):
        run({**tensors, perturbed: tensors[perturbed] + 0.05}, description)
