"""Runners for the fixtures of LSeg: official tensors in, ours compared with the official ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lexiseg.evaluation.episodes import EpisodeMeter
from lexiseg.evaluation.multiscale import multi_scale_scores, pad_bottom_right
from lexiseg.foreign import ForeignCheckpoint
from lexiseg.methods.lseg.build import build_model
from lexiseg.methods.lseg.checkpoint import import_checkpoint, our_name
from lexiseg.methods.lseg.loss import pixel_cross_entropy
from lexiseg.methods.lseg.model import LSeg
from lexiseg.methods.lseg.regularisation import ACTIVATIONS, SpatialRegularisation
from lexiseg.segmentation import IGNORE_LABEL
from parity.fixtures import close, part

# "as lseg_b16_arch0" stands for the tiny ViT that the fixtures of one family share.
TINY_HEADS = 4


def imported(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> LSeg:
    """The fixture's network, through the importer that users have."""
    options = config.get("options", {})
    settings = {
        "arch_option": config["arch_option"],
        "block_depth": config["block_depth"],
        "activation": options.get("activation", config.get("activation", "lrelu")),
    }
    vit = config["vit"]
    heads = vit["heads"] if isinstance(vit, dict) else TINY_HEADS
    state = {f"net.{name}": value for name, value in part(tensors, "state_dict.").items()}
    checkpoint = ForeignCheckpoint(file="fixture.ckpt", sha256="", tensors=state, settings=settings)
    result = import_checkpoint(checkpoint, {"heads": heads})
    assert result.unexpected == ()
    model = build_model(result.config)
    model.load_state_dict(dict(result.tensors))
    if "hooks" in config:
        assert list(model.backbone.taps) == config["hooks"]  # type: ignore[arg-type]
    return model.eval()


def run_network(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """lseg_*_arch*: the forward pass, with everything on the way."""
    model, tolerance = imported(tensors, description["config"]), description["tolerance"]
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda module, inputs, output: seen.update({name: output})

    backbone: Any = model.backbone
    for level, block in enumerate(backbone.taps):
        backbone.vit.blocks[block].register_forward_hook(keep(f"tap{level + 1}"))
        backbone.reassemble[level].register_forward_hook(keep(f"reassembled{level + 1}"))
        model.decoder.refinenet[level].register_forward_hook(keep(f"path{level + 1}"))
    model.head.register_forward_hook(keep("image_embedding_raw"))
    text = F.normalize(tensors["text_features_raw"], dim=1)
    subset = F.normalize(tensors["text_features_raw_subset"], dim=1)
    with torch.inference_mode():
        logits = model(tensors["input"], text)
        small = model.score(model.embed(tensors["input"]), text)
        few = model(tensors["input"], subset)
        # With more labels than channels the embeddings are computed, with fewer the head is folded into them.
        many = F.interpolate(small, size=logits.shape[-2:], mode="bilinear", align_corners=True)
    seen |= {"logits_before_final_upsample": small, "image_embedding_raw": seen["image_embedding_raw"][:, :, ::4, ::4]}
    close(logits, tensors["logits_fp32"], tolerance["logits_fp32"])
    close(many, tensors["logits_fp32"], tolerance["logits_fp32"])
    close(few, tensors["logits_fp32_subset"], tolerance["logits_fp32"])
    close(logits, tensors["logits_fp16path"], tolerance["logits_fp16path"])
    torch.testing.assert_close(torch.tensor(model.scale), tensors["logit_scale"])
    golden = part(tensors, "mid.")
    assert golden.keys() == seen.keys()
    for name, expected in golden.items():
        close(seen[name], expected, tolerance["mid"])


def run_blocks(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """lseg_spatial_reg_blocks: one and four applications of each block, in and out of place."""
    names = {tuple(name.split(".")[:2]) for name in tensors if "state_dict" in name}
    assert names
    for kind, activation in sorted(names):
        state = part(tensors, f"{kind}.{activation}.state_dict.depthwise.depthwise.")

        def applied(depth: int, *, kind: Any = kind, activation: Any = activation, state: Any = state) -> Tensor:
            module = SpatialRegularisation(kind, depth=depth, activation=activation)
            module.depthwise.load_state_dict(state)
            with torch.inference_mode():
                torch.testing.assert_close(module.apply_(tensors["input"].clone()), module(tensors["input"]))
                return module(tensors["input"])

        golden = part(tensors, f"{kind}.{activation}.")
        close(applied(1), golden["once_noact"], description["tolerance"])
        close(ACTIVATIONS[activation](applied(1)), golden["once_act"], description["tolerance"])
        close(applied(4), golden["depth4"], description["tolerance"])


def run_multi_scale(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """lseg_multiscale_eval: scales, flip and sliding windows around a small convolution."""
    config, tolerance = description["config"], description["tolerance"]
    weight, bias = tensors["model.conv.weight"], tensors["model.conv.bias"]
    black = [-1.0, -1.0, -1.0]  # (0 - mean) / std with the ViT's statistics of 0.5
    pictures = sorted({key.partition(".")[0] for key in tensors if key.endswith(".input")})
    assert pictures, "a fixture without pictures"
    for name in pictures:
        image = tensors[f"{name}.input"]
        for flip in (True, False):
            calls = []

            def forward(piece: Tensor, calls: list[Any] = calls) -> Tensor:
                calls.append(piece.shape)
                return torch.tanh(F.conv2d(piece, weight, bias, padding=weight.shape[-1] // 2))

            scores = multi_scale_scores(
                image,
                forward,
                scales=config["scales"],
                base_size=config["base_size"],
                window=config["crop_size"],
                flip=flip,
                black=black,
            )
            close(scores, tensors[f"{name}.scores.flip{int(flip)}"], tolerance)
            assert len(calls) == description["crop_forward_calls"][f"{name}.flip{int(flip)}"]
        close(pad_bottom_right(image, height=100, width=100, black=black), tensors[f"{name}.pad100"], tolerance)


def run_gradients(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """lseg_train_grads: training forward, loss, selected gradients, running statistics after."""
    config, tolerance = description["config"], description["tolerance"]
    model = imported(tensors, config).train()
    text = F.normalize(tensors["text_features_raw"], dim=1)
    target = tensors["target"]
    logits = model(tensors["input"], text)
    close(logits.detach(), tensors["logits"], tolerance["logits"])
    loss = pixel_cross_entropy(logits, torch.where(target == config["ignore_index"], IGNORE_LABEL, target))
    close(loss.detach(), tensors["loss"], tolerance["loss"])
    loss.backward()
    parameters = dict(model.named_parameters())
    for name, expected in part(tensors, "grad.").items():
        gradient = parameters[str(our_name(name))].grad
        assert gradient is not None, name
        close(gradient, expected, tolerance["grad"])
    for name in description["params_without_gradient"]:
        ours = parameters.get(str(our_name(name)))
        assert ours is None or ours.grad is None, name
    buffers = dict(model.named_buffers())
    assert part(tensors, "grad."), "a fixture without gradients"
    assert part(tensors, "after."), "a fixture without running statistics"
    for name, expected in part(tensors, "after.").items():
        close(buffers[str(our_name(name))], expected, tolerance["logits"])


def run_few_shot_metrics(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """lseg_fewshot_metrics: intersections and unions of two-label episodes, and the two means over them."""
    tolerance = description["tolerance"]
    classes = [str(id) for id in range(5, 10)]
    meter = EpisodeMeter(classes)
    batches = sorted({name.partition(".")[0] for name in tensors if name.endswith(".pred")})
    assert batches
    for name in batches:
        batch = part(tensors, f"{name}.")
        for row, class_id in enumerate(batch["class_id"].tolist()):
            question = (batch["pred"][row], batch["gt"][row], batch["ignore"][row] > 0, str(class_id))
            alone = EpisodeMeter(classes)
            alone.update(*question)
            meter.update(*question)
            close(torch.from_numpy(alone.intersection.sum(0)).float(), batch["inter"][:, row], tolerance)
            close(torch.from_numpy(alone.union.sum(0)).float(), batch["union"][:, row], tolerance)
    for name, value in meter.result().items():
        close(torch.tensor(100 * (value or 0.0)), tensors[name], tolerance)


RUNNERS = {
    r"lseg_.*_arch\d.*": run_network,
    r"lseg_spatial_reg_blocks.*": run_blocks,
    r"lseg_multiscale_eval.*": run_multi_scale,
    r"lseg_train_grads.*": run_gradients,
    r"lseg_fewshot_metrics.*": run_few_shot_metrics,
}
