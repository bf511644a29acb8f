"""STEGO's runners on fixtures of a second implementation: each passes on right tensors and fails on wrong ones."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.official_stego import (
    VIT,
    Training,
    as_map,
    centred,
    contrastive_crf,
    correspondence,
    cosines,
    dropped,
    head,
    head_state,
    lookup,
    mean_field,
    metrics,
    neighbours,
    pair_loss,
    super_perm,
    unit,
    vit,
    vit_state,
)

from parity.stego import RUNNERS
from parity.test_parity import runner_of

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
VARIANTS: dict[str, dict[str, bool]] = {
    "default": {"pointwise": True, "zero_clamp": True, "stabalize": False},
    "no_pointwise": {"pointwise": False, "zero_clamp": True, "stabalize": False},
    "no_clamp": {"pointwise": True, "zero_clamp": False, "stabalize": False},
    "stabilized": {"pointwise": True, "zero_clamp": True, "stabalize": True},
}
METRICS = {"hungarian27": (27, 0), "hungarian3": (3, 0), "linear27": (27, 0), "extra": (5, 2), "missing": (6, 0)}
# Classes, sizes of the picture and of the logits, noise of the picture.
CRFS = {
    "two": (2, (24, 24), (24, 24), 3.0),
    "same": (5, (40, 40), (40, 40), 30.0),
    "lowres": (4, (32, 40), (4, 5), 6.0),
}
STEPS = 3


def random_coords(rng, batch, size):
    return 2 * torch.rand(batch, size, size, 2, generator=rng) - 1


def random_partners(rng, count, batch):
    return torch.stack([super_perm(torch.randperm(batch, generator=rng)) for _ in range(count)])


def keep_masks(rng, *shape):
    return (torch.rand(shape, generator=rng) < 0.9).float()


def losses_fixture():
    rng = torch.Generator().manual_seed(1)
    config: dict[str, Any] = {
        "shifts": {"pos_intra": 0.18, "pos_inter": 0.12, "neg_inter": 0.46},
        "weights": {"intra": 0.67, "inter": 0.25, "neg": 0.63},
        "neg_samples": 5,
        "variants": VARIANTS,
        "feature_samples": {"default": 5, "other": 3},
        "helper.shift": 0.3,
    }
    tensors = {"feats": torch.randn(4, 24, 5, 6, generator=rng), "code": torch.randn(4, 10, 5, 6, generator=rng)}
    for name in ("feats", "code"):
        tensors[f"{name}_pos"] = tensors[name] + 0.5 * torch.randn(tensors[name].shape, generator=rng)
    for tag, options in VARIANTS.items():
        size = config["feature_samples"]["default" if tag == "default" else "other"]
        coords, partners = [random_coords(rng, 4, size) for _ in range(2)], random_partners(rng, 5, 4)
        codes = [tensors[name].clone().requires_grad_() for name in ("code", "code_pos")]
        features = (tensors["feats"], tensors["feats_pos"])
        found = correspondence(features, codes, coords, partners, config["shifts"], options)
        intra, inter, neg = (found[f"{kind}_loss"].mean() for kind in ("intra", "inter", "neg"))
        total = 0.67 * intra + 0.25 * inter + 0.63 * neg
        gradients = torch.autograd.grad(total, codes)
        given = {"coords1": coords[0], "coords2": coords[1], "neg_perms": partners}
        given |= {"intra_loss": intra, "inter_loss": inter, "neg_loss_mean": neg, "total": total}
        given |= {"grad_code": gradients[0], "grad_code_pos": gradients[1]}
        if tag == "default":
            given |= {f"{kind}_cd_sample0": found[f"{kind}_cd"][0] for kind in ("intra", "inter")}
            given["neg_loss_sub"] = found["neg_loss"][::4]
            given |= {name: found[name] for name in ("sampled_feats", "sampled_code")}
        else:
            given |= {name: found[name] for name in ("intra_cd", "inter_cd", "neg_cd", "neg_loss")}
        tensors |= {f"{tag}.{name}": value.detach() for name, value in given.items()}
    f, g = (torch.randn(2, 8, 3, 4, generator=rng) for _ in range(2))
    s, t = (torch.randn(2, 6, 3, 4, generator=rng) for _ in range(2))
    raw, close = cosines(f, g), cosines(s, t)
    tensors |= {"helper.f1": f, "helper.f2": g, "helper.c1": s, "helper.c2": t}
    tensors |= {"helper.fd_raw": raw, "helper.fd_centered": centred(raw), "helper.cd": close}
    tensors["helper.loss"] = pair_loss(raw, close, config["helper.shift"], VARIANTS["default"])
    return tensors, {"config": config, "tolerance": TOLERANCE}


def backbone_fixture():
    rng = torch.Generator().manual_seed(2)
    trunk, top = vit_state(), head_state(VIT["embed"], 14)
    tensors = {f"state.model.{name}": value for name, value in trunk.items()}
    tensors |= {f"state.{name}": value for name, value in top.items()}
    for tag, shape in (("square", (2, 3, 32, 32)), ("rect", (1, 3, 24, 40))):
        image = torch.randn(shape, generator=rng)
        tokens, keys = vit(trunk, VIT, image)
        features, keys = (as_map(one, image, VIT["patch"]) for one in (tokens, keys))
        tensors |= {f"{tag}.image": image, f"{tag}.feat": features, f"{tag}.code": head(top, features)}
        tensors |= {
            f"{tag}.feat_KK": keys,
            f"{tag}.code_KK": head(top, keys),
            f"{tag}.cls": tokens[:, 0, :, None, None],
        }
    features, masks = tensors["square.feat"], keep_masks(rng, 3, 2, VIT["embed"])
    alone = {name: torch.zeros_like(value) if name.startswith("cluster2") else value for name, value in top.items()}
    tensors["square.code_linear_only"] = head(alone, features)
    tensors |= {"train.feat": dropped(features, masks[2]), "train.code": head(top, features, masks[:2])}
    tensors["train.keep_masks"] = masks
    return tensors, {"config": {"vit": VIT, "code_dim": 14, "dropout_p": 0.1}, "tolerance": TOLERANCE}


def clusters_fixture():
    rng = torch.Generator().manual_seed(3)
    centres, x = torch.randn(7, 12, generator=rng), torch.randn(3, 12, 6, 5, generator=rng)
    tensors = {"clusters": centres, "x": x}
    for tag, alpha in (("alpha_none", None), ("alpha_2", 2.0), ("alpha_3.0", 3.0)):
        given = centres.clone().requires_grad_()
        loss, near = lookup(given, x, alpha)
        tensors[f"{tag}.grad_clusters"] = torch.autograd.grad(loss, given)[0]
        tensors[f"{tag}.loss"], near = loss.detach(), near.detach()
        if alpha is None:
            tensors[f"{tag}.probs"] = (near == near.amax(dim=1, keepdim=True)).float()
        else:
            tensors[f"{tag}.probs"] = (alpha * near).softmax(dim=1)
            tensors[f"{tag}.log_probs"] = (alpha * near).log_softmax(dim=1)
    trained, losses = centres.clone().requires_grad_(), []
    optimiser = torch.optim.Adam([trained], lr=0.005)
    for _ in range(10):
        loss, _ = lookup(trained, x, None)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    tensors |= {"adam10.losses": torch.stack(losses), "adam10.clusters": trained.detach()}
    config = {"dim": 12, "n_clusters": 7, "adam_lr": 0.005, "adam_steps": 10}
    return tensors, {"config": config, "tolerance": TOLERANCE}


def epsilons_fixture():
    rng = torch.Generator().manual_seed(4)
    sizes = {**VIT, "depth": 1, "img_size": 16}
    tensors = {}
    for name, scale in (("norm_tiny", 1e-11), ("norm_small", 1e-8)):
        given = scale * torch.randn(2, 6, 3, 4, generator=rng)
        tensors |= {f"{name}.in": given, f"{name}.out": unit(given)}
    state = vit_state(sizes, scale=1e-3)
    tensors |= {f"state.{name}": value for name, value in state.items()}
    tensors["image"] = torch.randn(1, 3, 16, 16, generator=rng)
    tensors["tokens"], _ = vit(state, sizes, tensors["image"])
    centres, x = (5e-13 * torch.randn(shape, generator=rng) for shape in ((4, 6), (2, 6, 3, 4)))
    loss, near = lookup(centres, x, 2.0)
    tensors |= {"cluster_tiny.clusters": centres, "cluster_tiny.x": x}
    tensors |= {"cluster_tiny.loss_alpha2": loss, "cluster_tiny.probs_alpha2": (2 * near).softmax(dim=1)}
    return tensors, {"config": {"vit": sizes}, "tolerance": TOLERANCE}


def permutations_fixture():
    rng, tensors = torch.Generator().manual_seed(5), {}
    for size in (2, 3, 4, 7, 16):
        orders = torch.stack([torch.randperm(size, generator=rng) for _ in range(6)])
        partners = torch.stack([super_perm(order) for order in orders])
        tensors |= {f"n{size}.randperm": orders, f"n{size}.super_perm": partners}
    return tensors, {"tolerance": "exact"}


def metrics_fixture():
    """Clusters that are mostly one class each, by a random order."""
    rng, tensors, percent = torch.Generator().manual_seed(6), {}, {}
    for tag, (classes, extra) in METRICS.items():
        labels = torch.randint(0, classes, (6, 20, 18), generator=rng)
        noise = torch.randint(0, classes + extra, labels.shape, generator=rng)
        clear = torch.rand(labels.shape, generator=rng) < 0.6
        predicted = torch.where(clear, torch.randperm(classes, generator=rng)[labels], noise)
        if tag == "missing":
            labels[(labels == 2) | (labels == 5)] = 0
            predicted[(predicted == 1) | (predicted == 5)] = 3
        kind = torch.rand(labels.shape, generator=rng)
        labels[kind < 0.1], labels[kind > 0.9] = -1, 255
        found = metrics(predicted, labels, classes, extra, matched=tag != "linear27")
        percent[tag] = {name: float(found.pop(name)) for name in ("m/mIoU", "m/Accuracy")}
        tensors |= {f"{tag}.preds": predicted, f"{tag}.labels": labels}
        tensors |= {f"{tag}.{name}": value for name, value in found.items()}
    config = {"n_classes/extra": {tag: list(sizes) for tag, sizes in METRICS.items()}}
    return tensors, {"config": config, "values_percent": percent}


def label_maps_fixture():
    """The tables, by ranges of values with one class."""
    ranges = """9 0; 11 1-8; 8 9-14; 7 15-24; 6 25-32; 10 33-42; 5 43-50; 2 51-60; 3 61-70; 0 71-76; 1 77-82; 4 83-90;
        17 91-92 103-104 108 130 136 140 151 166-167; 22 93 96 118 123 128 133 141 162 168; 20 94-95 127 150 157 165;
        15 97 106-107 109 111 122 129 132 155 160 164; 25 98 112 137 145 163; 16 99 131 138 142; 13 100 113-117;
        12 101-102; 23 105 156; 21 110 124-125 135 139 143-144 146 148 153 158; 26 119 147 154 177-178;
        14 120-121 152 169; 24 126 134 149 159 161 181; 18 170-176; 19 179-180"""
    table = torch.full((182,), -1)
    for line in ranges.split(";"):
        coarse, *parts = line.split()
        for first, _, last in (one.partition("-") for one in parts):
            table[int(first) : int(last or first) + 1] = int(coarse)
    assert bool((table >= 0).all())
    tensors = {"coco_fine_to_coarse": table, "potsdam_fine_to_coarse": torch.tensor([0, 1, 2, 2, 0, 1])}
    return tensors, {"tolerance": "exact"}


def neighbours_fixture():
    feats = torch.randn(40, 16, 5, 5, generator=torch.Generator().manual_seed(7))
    pooled, numbers, values = neighbours(feats, 30)
    tensors = {"feats": feats, "pooled": pooled, "nns": numbers, "topk_sims": values}
    return tensors, {"config": {"topk": 30, "neighbours_used": "positions 1..7"}, "tolerance": TOLERANCE}


def scene(tag):
    """A picture of a few areas with noise, and logits that are more often right than not.

    With this much noise in some, other kernels than the official ones give clearly other labels.
    """
    rng, (classes, (height, width), grid, noise) = torch.Generator().manual_seed(8), CRFS[tag]
    areas = torch.randint(0, classes, (4, 5), generator=rng)
    areas = areas.repeat_interleave(height // 4, dim=0).repeat_interleave(-(-width // 5), dim=1)[:, :width]
    colours = torch.randint(40, 216, (classes, 3), generator=rng)
    image = colours[areas] + noise * torch.randn(height, width, 3, generator=rng)
    truth = F.one_hot(areas[:: height // grid[0], :: width // grid[1]], classes).movedim(-1, 0)
    return image.clamp(0, 255).to(torch.uint8), 1.7 * truth + torch.randn(classes, *grid, generator=rng)


def crf_fixture():
    tensors = {}
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for tag in CRFS:
        image, logits = scene(tag)
        tensors |= {f"{tag}.image": ((image / 255 - mean) / std).movedim(-1, 0), f"{tag}.rgb_uint8": image}
        tensors |= {f"{tag}.logits": logits, f"{tag}.Q": mean_field(image, logits)}
    limits = {
        "argmax_agreement_min": {"two": 0.99, "same": 0.96, "lowres": 0.98},
        "mean_abs_dQ_max": {"two": 0.005, "same": 0.02, "lowres": 0.01},
    }
    return tensors, {"tolerance": {"other_algorithm_or_exact_inference": limits}}


def contrastive_fixture():
    rng = torch.Generator().manual_seed(9)
    config = {"n_samples": 40, "alpha": 0.5, "beta": 0.15, "gamma": 0.05, "w1": 10.0, "w2": 3.0, "shift": 0.0}
    guidance, code = torch.randn(2, 3, 14, 12, generator=rng), torch.randn(2, 8, 14, 12, generator=rng)
    guidance[:, :, :, 1::2] = guidance[:, :, :, ::2] + 0.1
    coords = torch.stack([torch.randint(0, side, (40,), generator=rng) for side in (14, 12)])
    loss = contrastive_crf(guidance, code, coords, config)
    tensors = {"guidance": guidance, "code": code, "coords": coords, "loss": loss, "loss_mean": loss.mean()}
    return tensors, {"config": config, "tolerance": TOLERANCE}


def steps_fixture(*, seed=10):
    rng = torch.Generator().manual_seed(seed)
    config: dict[str, Any] = {
        "vit": VIT,
        "dim": 12,
        "n_classes": 6,
        "batch": 4,
        "feature_samples": 4,
        "neg_samples": 5,
        "net_lr": 0.0005,
        "probe_lr": 0.005,
        "weights": {"neg": 0.63, "knn": 0.25, "self_": 0.67},
        "shifts": {"neg": 0.46, "knn": 0.12, "self_": 0.18},
        "pointwise": True,
        "zero_clamp": True,
    }
    width, side = VIT["embed"], VIT["img_size"]
    state = {f"net.model.{name}": value for name, value in vit_state(seed=seed).items()}
    state |= {f"net.{name}": value for name, value in head_state(width, 12, seed=seed).items()}
    shapes = {
        "train_cluster_probe.clusters": (6, 12),
        "cluster_probe.clusters": (6, 12),
        "linear_probe.weight": (6, 12, 1, 1),
    }
    shapes |= {"linear_probe.bias": (6,), "decoder.weight": (width, 12, 1, 1), "decoder.bias": (width,)}
    state |= {name: 0.3 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    training = Training(state, config)
    tensors = {f"init.{name}": value for name, value in state.items()}
    for number in range(STEPS):
        image, near = (torch.randn(4, 3, side, side, generator=rng) for _ in range(2))
        batch = {
            "img": image,
            "img_pos": 0.7 * image + 0.7 * near,
            "label": torch.randint(-1, 6, (4, side, side), generator=rng).short(),
            "keep_masks": keep_masks(rng, 6, 4, width).to(torch.uint8),
            "coords1": random_coords(rng, 4, 4),
            "coords2": random_coords(rng, 4, 4),
            "neg_perms": random_partners(rng, 5, 4),
        }
        log = training.step(batch)
        after = {name: value for name, value in training.state.items() if not name.startswith("net.model.")}
        tensors |= {f"step{number}.{name}": value for name, value in batch.items()}
        tensors |= {f"step{number}.log.{name}": value for name, value in log.items()}
        tensors |= {f"step{number}.after.{name}": value.detach().clone() for name, value in after.items()}
    tensors["eval.img"] = torch.randn(4, 3, side, side, generator=rng)
    tensors |= {f"eval.{name}": value for name, value in training.evaluate(tensors["eval.img"]).items()}
    limits = {"losses": TOLERANCE, "params_after": {"rtol": 1e-3, "atol": 2e-5, "note": "Adam amplifies differences"}}
    return tensors, {"config": config, "tolerance": limits}


MAKERS = {
    "stego_corr_loss": losses_fixture,
    "stego_backbone_head": backbone_fixture,
    "stego_cluster_lookup": clusters_fixture,
    "stego_epsilons": epsilons_fixture,
    "stego_super_perm": permutations_fixture,
    "stego_metrics": metrics_fixture,
    "stego_label_maps": label_maps_fixture,
    "stego_knn": neighbours_fixture,
    "stego_crf": crf_fixture,
    "stego_contrastive_crf": contrastive_fixture,
    "stego_training_steps": steps_fixture,
}
LOSSES = ("intra_loss", "inter_loss", "neg_loss_mean", "total", "grad_code", "grad_code_pos")
WHOLE = ("intra_cd", "inter_cd", "neg_cd", "neg_loss")
PARTS = ("intra_cd_sample0", "inter_cd_sample0", "neg_loss_sub", "sampled_feats", "sampled_code")
SCORES = ("stats", "histogram", "iou")
MATCHED = ("assign_rows", "assign_cols", "mapped_preds")
LOG = (*(f"{kind}.{pair}" for kind in ("loss", "cd") for pair in ("pos_intra", "pos_inter", "neg_inter")),)
AFTER = (
    *(f"net.cluster{layer}.{kind}" for layer in ("1.0", "2.0", "2.2") for kind in ("weight", "bias")),
    *(f"{probe}.clusters" for probe in ("cluster_probe", "train_cluster_probe")),
    *(f"{layer}.{kind}" for layer in ("linear_probe", "decoder") for kind in ("weight", "bias")),
)


def combined(*parts):
    return [".".join(names) for names in product(*parts)]


# Every tensor that the official code gave out.
OUTPUTS = {
    "stego_corr_loss": [
        *combined(VARIANTS, LOSSES),
        *combined(["default"], PARTS),
        *combined([tag for tag in VARIANTS if tag != "default"], WHOLE),
        *combined(["helper"], ("loss", "cd", "fd_raw", "fd_centered")),
    ],
    "stego_backbone_head": [
        *combined(("square", "rect"), ("feat", "code", "feat_KK", "code_KK", "cls")),
        *("square.code_linear_only", "train.feat", "train.code"),
    ],
    "stego_cluster_lookup": [
        *combined(("alpha_none", "alpha_2", "alpha_3.0"), ("loss", "probs", "grad_clusters")),
        *("alpha_2.log_probs", "alpha_3.0.log_probs", "adam10.losses", "adam10.clusters"),
    ],
    "stego_epsilons": [
        *("norm_tiny.out", "norm_small.out", "tokens", "cluster_tiny.loss_alpha2", "cluster_tiny.probs_alpha2")
    ],
    "stego_super_perm": combined(("n2", "n3", "n4", "n7", "n16"), ("super_perm",)),
    "stego_metrics": [*combined(METRICS, SCORES), *combined([tag for tag in METRICS if tag != "linear27"], MATCHED)],
    "stego_label_maps": ["coco_fine_to_coarse", "potsdam_fine_to_coarse"],
    "stego_knn": ["pooled", "nns", "topk_sims"],
    "stego_contrastive_crf": ["loss", "loss_mean"],
    "stego_training_steps": [
        *combined(
            [f"step{number}" for number in range(STEPS)], ["log"], [*LOG, "loss.linear", "loss.cluster", "loss.total"]
        ),
        *combined([f"step{number}" for number in range(STEPS)], ["after"], AFTER),
        *combined(["eval"], ("linear_logprob", "cluster_logprob", "linear_pred", "cluster_pred")),
    ],
}


@cache
def fixture(kind):
    return MAKERS[kind]()


def altered(tensor):
    """One value in the second half made another; all of them where a small share may differ."""
    if tensor.dtype == torch.uint8:
        return tensor + 1
    values = tensor.flatten().clone()
    values[2 * len(values) // 3] += 0.05 if values.is_floating_point() else -1
    return values.view(tensor.shape)


def test_there_is_a_fixture_for_every_runner():
    assert {runner_of(kind) for kind in MAKERS} == set(RUNNERS.values())


@pytest.mark.parametrize("kind", MAKERS)
def test_a_runner_passes_on_right_tensors(kind):
    RUNNERS[f"{kind}.*"](*fixture(kind))


@pytest.mark.parametrize(("kind", "output"), [(kind, name) for kind, names in OUTPUTS.items() for name in names])
def test_a_runner_fails_where_an_output_is_wrong(kind, output):
    tensors, description = fixture(kind)
    with pytest.raises(AssertionError):
        RUNNERS[f"{kind}.*"]({**tensors, output: altered(tensors[output])}, description)


@pytest.mark.parametrize("tag", METRICS)
@pytest.mark.parametrize("name", ["m/mIoU", "m/Accuracy"])
def test_the_runner_of_metrics_fails_where_a_score_is_wrong(tag, name):
    tensors, description = fixture("stego_metrics")
    percent = {one: dict(scores) for one, scores in description["values_percent"].items()}
    percent[tag][name] += 0.001
    with pytest.raises(AssertionError):
        RUNNERS["stego_metrics.*"](tensors, {**description, "values_percent": percent})


@pytest.mark.parametrize("tag", CRFS)
@pytest.mark.parametrize("wrong", ["other labels", "same labels, other shares"])
def test_the_runner_of_the_crf_fails_on_wrong_marginals(tag, wrong):
    tensors, description = fixture("stego_crf")
    right = tensors[f"{tag}.Q"]
    marginals = right.roll(1, dims=0) if wrong == "other labels" else 0.9 * right + 0.1 / len(right)
    with pytest.raises(AssertionError):
        RUNNERS["stego_crf.*"]({**tensors, f"{tag}.Q": marginals}, description)


@pytest.mark.parametrize(
    ("tag", "other"),
    [
        ("same", {"itself": False}),
        ("same", {"normalised": False}),
        ("same", {"weights": (4.0, 3.0)}),
        ("same", {"weights": (3.0, 0.0)}),
        ("same", {"weights": (0.0, 4.0)}),
        ("lowres", {"space": 20.0}),
        ("lowres", {"colour": 5.0}),
    ],
)
def test_the_runner_of_the_crf_fails_on_other_kernels(tag, other):
    tensors, description = fixture("stego_crf")
    with pytest.raises(AssertionError):
        RUNNERS["stego_crf.*"]({**tensors, f"{tag}.Q": mean_field(*scene(tag), **other)}, description)
