"""Runners for the fixtures of STEGO: official tensors in, ours compared with the official ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lexiseg.data.label_maps import cityscapes27, cocostuff27, potsdam3
from lexiseg.encoders.vit_trunk import VitTrunk
from lexiseg.evaluation.cluster_scores import ALPHA
from lexiseg.evaluation.matching import ClusterCounts, class_ious, class_scores
from lexiseg.layers.crf import dense_crf
from lexiseg.methods.stego.head import SegmentationHead
from lexiseg.methods.stego.loss import (
    Terms,
    centred,
    contrastive_crf_loss,
    correspondence_terms,
    correspondences,
    pair_losses,
    sample_points,
    super_permutation,
    unit_rows,
)
from lexiseg.methods.stego.neighbours import nearest_neighbours, pool
from lexiseg.methods.stego.probes import ClusterProbe, cluster_cosines, linear_loss
from parity.fixtures import close, part


def run_losses(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """stego_corr_loss: terms, sampled values and gradients of every variant, and the helper by itself."""
    tolerance, config = description["tolerance"], description["config"]
    shifts = tuple(config["shifts"][name] for name in ("pos_intra", "pos_inter", "neg_inter"))
    weights = tuple(config["weights"][name] for name in ("intra", "inter", "neg"))
    for tag, options in config["variants"].items():
        how = {
            "centring": "code" if options["pointwise"] else "none",
            "clamp": options["zero_clamp"],
            "stabilise": options["stabalize"],
        }
        codes, near = (tensors[name].clone().requires_grad_() for name in ("code", "code_pos"))
        places = tensors[f"{tag}.coords1"], tensors[f"{tag}.coords2"]
        partners = tensors[f"{tag}.neg_perms"]
        terms = correspondence_terms(
            tensors["feats"],
            codes,
            tensors["feats_pos"],
            near,
            points=_points(places[0]),
            partner_points=_points(places[1]),
            partners=partners,
            shifts=shifts,
            **how,
        )
        total = sum(weight * term for weight, term in zip(weights, (terms.self_, terms.knn, terms.random), strict=True))
        total.backward()  # type: ignore[union-attr]
        close(terms.self_.detach(), tensors[f"{tag}.intra_loss"], tolerance)
        close(terms.knn.detach(), tensors[f"{tag}.inter_loss"], tolerance)
        close(terms.random.detach(), tensors[f"{tag}.neg_loss_mean"], tolerance)
        close(total.detach(), tensors[f"{tag}.total"], tolerance)  # type: ignore[union-attr]
        close(codes.grad, tensors[f"{tag}.grad_code"], tolerance)  # type: ignore[arg-type]
        close(near.grad, tensors[f"{tag}.grad_code_pos"], tolerance)  # type: ignore[arg-type]
        with torch.no_grad():
            _compare_pairs(tensors, tag, places, partners, how, shifts[2], tolerance)
    first, second, f, g = (tensors[f"helper.{name}"] for name in ("c1", "c2", "f1", "f2"))
    raw, close_ = correspondences(_rows(f), _rows(g)), correspondences(_rows(first), _rows(second))
    losses = pair_losses(raw, close_, shift=config["helper.shift"])
    for name, value in (("fd_raw", raw), ("fd_centered", centred(raw, "code")), ("cd", close_), ("loss", losses)):
        close(value.reshape(tensors[f"helper.{name}"].shape), tensors[f"helper.{name}"], tolerance)


def _points(coords: Tensor) -> Tensor:
    """Official coordinates (B, S, S, 2) -> (B, S S, 2), in the order in which the official sampler reads them."""
    return coords.transpose(1, 2).flatten(1, 2)


def _rows(maps: Tensor) -> Tensor:
    return unit_rows(maps.flatten(2).transpose(1, 2))


def _compare_pairs(
    tensors: Mapping[str, Tensor],
    tag: str,
    places: tuple[Tensor, Tensor],
    partners: Tensor,
    how: Mapping[str, Any],
    shift: float,
    tolerance: Mapping[str, float],
) -> None:
    """What the terms are made of, where the fixture has it."""
    size = places[0].shape[1]
    here, there = (_points(one) for one in places)
    mine = {name: sample_points(tensors[name], here) for name in ("feats", "code")}
    for name, official in (("feats", "sampled_feats"), ("code", "sampled_code")):
        if f"{tag}.{official}" in tensors:
            expected = tensors[f"{tag}.{official}"].flatten(2).transpose(1, 2)
            close(mine[name], expected, tolerance)
    f, s = (unit_rows(mine[name]) for name in ("feats", "code"))
    own = correspondences(s, s)
    near = correspondences(s, unit_rows(sample_points(tensors["code_pos"], there)))
    random = [
        (
            correspondences(f, unit_rows(sample_points(tensors["feats"], there, pictures=row))),
            correspondences(s, unit_rows(sample_points(tensors["code"], there, pictures=row))),
        )
        for row in partners
    ]
    found = {
        "intra_cd": own,
        "inter_cd": near,
        "intra_cd_sample0": own[0],
        "inter_cd_sample0": near[0],
        "neg_cd": torch.cat([codes for _, codes in random]),
        "neg_loss": torch.cat([pair_losses(features, codes, shift=shift, **how) for features, codes in random]),
    }
    # Every negative's first picture.
    found["neg_loss_sub"] = found["neg_loss"][:: len(f)]
    for name, value in found.items():
        expected = tensors.get(f"{tag}.{name}")
        if expected is not None:
            close(value.reshape(-1, size, size, size, size), expected.reshape(-1, size, size, size, size), tolerance)


def trunk_of(state: Mapping[str, Tensor], sizes: Mapping[str, Any], *, facet: Any = "features") -> VitTrunk:
    """Our trunk with the tensors of an official DINO ViT."""
    vit = VisionTransformer(
        img_size=sizes["img_size"],
        patch_size=sizes["patch"],
        embed_dim=sizes["embed"],
        depth=sizes["depth"],
        num_heads=sizes["heads"],
        num_classes=0,
        dynamic_img_size=True,
    )
    vit.load_state_dict(dict(state))
    return VitTrunk(vit, facet=facet, positions="dino", mean=(0.0,) * 3, std=(1.0,) * 3)


def head_of(state: Mapping[str, Tensor], *, kind: Any = "nonlinear") -> SegmentationHead:
    """Our head with the tensors of an official one."""
    dim, width = state["cluster1.0.weight"].shape[:2]
    head = SegmentationHead(width, dim=dim, kind=kind)
    names = {"cluster1.0.": "linear.", "cluster2.": "nonlinear."}
    ours = {
        own + name.removeprefix(official): value
        for name, value in state.items()
        for official, own in names.items()
        if name.startswith(official) and (kind == "nonlinear" or own == "linear.")
    }
    head.load_state_dict(ours)
    return head.eval()


@torch.no_grad()
def run_backbone(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """stego_backbone_head: features, keys and codes on square and other pictures; the head with its dropout."""
    tolerance, sizes = description["tolerance"], description["config"]["vit"]
    state = part(tensors, "state.")
    head = head_of(state)
    for facet, end in (("features", ""), ("keys", "_KK")):
        trunk = trunk_of(part(state, "model."), sizes, facet=facet)
        for tag in ("square", "rect"):
            if f"{tag}.image" not in tensors:
                continue
            features = trunk.dense(tensors[f"{tag}.image"])
            close(features, tensors[f"{tag}.feat{end}"], tolerance)
            close(head(features), tensors[f"{tag}.code{end}"], tolerance)
            if facet == "features":
                tokens = trunk.tokens(tensors[f"{tag}.image"])
                close(tokens[:, 0], tensors[f"{tag}.cls"].flatten(1), tolerance)
    features = tensors["square.feat"]
    close(head_of(state, kind="linear")(features), tensors["square.code_linear_only"], tolerance)
    if "train.keep_masks" in tensors:
        with _dropout(tensors["train.keep_masks"], description["config"]["dropout_p"]):
            head.train()
            close(head(features), tensors["train.code"], tolerance)
            close(head.drop(features), tensors["train.feat"], tolerance)


def _dropout(masks: Tensor, chance: float) -> Any:
    """Dropout of channels with the masks (n, B, C), one after the other, that the official code drew."""
    waiting = iter(masks)

    def dropped(features: Tensor, p: float, training: bool) -> Tensor:
        return features * next(waiting)[:, :, None, None].to(features.dtype) / (1 - chance)

    return patch("lexiseg.methods.stego.head.F.dropout2d", dropped)


def probe_of(centres: Tensor) -> ClusterProbe:
    """Our cluster probe with official centres."""
    probe = ClusterProbe(centres.shape[1], len(centres))
    probe.load_state_dict({"centres": centres})
    return probe


def run_clusters(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """stego_cluster_lookup: hard and soft assignment with gradients, and Adam's steps on the centres."""
    tolerance, config, x = description["tolerance"], description["config"], tensors["x"]
    tags = [name.removesuffix(".loss") for name in tensors if name.startswith("alpha_") and name.endswith(".loss")]
    for tag in tags:
        value = tag.removeprefix("alpha_")
        alpha = None if value == "none" else float(value)
        probe = probe_of(tensors["clusters"])
        loss = probe.loss(x, alpha=alpha)
        loss.backward()
        close(loss.detach(), tensors[f"{tag}.loss"], tolerance)
        close(probe.centres.grad, tensors[f"{tag}.grad_clusters"], tolerance)  # type: ignore[arg-type]
        cosines = probe.cosines(x).detach()
        if alpha is None:
            hard = F.one_hot(cosines.argmax(dim=1), len(probe.centres)).movedim(-1, 1).float()
            close(hard, tensors[f"{tag}.probs"], tolerance)
        else:
            close((alpha * cosines).softmax(dim=1), tensors[f"{tag}.probs"], tolerance)
            close((alpha * cosines).log_softmax(dim=1), tensors[f"{tag}.log_probs"], tolerance)
    probe = probe_of(tensors["clusters"])
    optimiser, losses = torch.optim.Adam(probe.parameters(), lr=config["adam_lr"]), []
    for _ in range(config["adam_steps"]):
        optimiser.zero_grad()
        loss = probe.loss(x)
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    close(torch.stack(losses), tensors["adam10.losses"], tolerance)
    close(probe.centres.detach(), tensors["adam10.clusters"], tolerance)


@torch.no_grad()
def run_epsilons(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """stego_epsilons: normalisation of small values, a ViT of small activations, tiny centres."""
    tolerance = description["tolerance"]
    for name in ("norm_tiny", "norm_small"):
        rows = unit_rows(tensors[f"{name}.in"].movedim(1, -1)).movedim(-1, 1)
        close(rows, tensors[f"{name}.out"], tolerance)
    trunk = trunk_of(part(tensors, "state."), description["config"]["vit"])
    close(trunk.tokens(tensors["image"]), tensors["tokens"], tolerance)
    probe, x = probe_of(tensors["cluster_tiny.clusters"]), tensors["cluster_tiny.x"]
    close(probe.loss(x, alpha=2.0), tensors["cluster_tiny.loss_alpha2"], tolerance)
    close((2.0 * probe.cosines(x)).softmax(dim=1), tensors["cluster_tiny.probs_alpha2"], tolerance)


def run_permutations(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """stego_super_perm: negatives from permutations, exactly."""
    for name in tensors:
        if name.endswith(".randperm"):
            expected = tensors[name.replace("randperm", "super_perm")]
            for order, partners in zip(tensors[name], expected, strict=True):
                assert torch.equal(super_permutation(order), partners)


def run_metrics(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """stego_metrics: counts, assignment and scores."""
    for tag, (classes, extra) in description["config"]["n_classes/extra"].items():
        predicted, truth = (tensors[f"{tag}.{name}"].numpy() for name in ("preds", "labels"))
        counts = ClusterCounts(classes + extra, classes)
        # The official metric leaves out pixels of clusters beyond the number of classes. Ours counts them as wrong.
        kept = np.where(predicted < classes, truth, -1)
        for one, other in zip(np.array_split(predicted, 3), np.array_split(kept, 3), strict=True):
            counts.update(clusters=one, truth=other)
        assert np.array_equal(counts.counts, tensors[f"{tag}.stats"].numpy())
        assignment = np.arange(classes) if tag.startswith("linear") else counts.match()
        if f"{tag}.assign_cols" in tensors:
            rows, columns = (tensors[f"{tag}.{name}"].numpy() for name in ("assign_rows", "assign_cols"))
            occurring = counts.counts[rows].sum(axis=1) > 0
            assert np.array_equal(assignment[rows][occurring], columns[occurring])
        if f"{tag}.mapped_preds" in tensors:
            assert np.array_equal(assignment[predicted], tensors[f"{tag}.mapped_preds"].numpy())
        table, histogram = counts.matched(assignment), tensors[f"{tag}.histogram"].numpy()
        # With clusters to spare the official table has a row for them, as ours, and an empty column for their class.
        assert np.array_equal(table[: len(histogram)], histogram[:, :classes])
        assert not histogram[:, classes:].any()
        expected_iou = tensors[f"{tag}.iou"].numpy()
        np.testing.assert_allclose(class_ious(table), expected_iou[:classes], atol=1e-6, rtol=0)
        assert np.isnan(expected_iou[classes:]).all()
        scores = class_scores(table)
        expected = description["values_percent"][tag]
        for name, official in (("miou", "m/mIoU"), ("accuracy", "m/Accuracy")):
            assert abs(scores[name] - expected[official] / 100) < 1e-6  # type: ignore[operator]


def run_label_maps(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """stego_label_maps: fine labels to coarse ones, exactly."""
    fine = tensors["coco_fine_to_coarse"].numpy()
    assert np.array_equal(cocostuff27(np.arange(len(fine))), fine)
    fine = tensors["potsdam_fine_to_coarse"].numpy()
    assert np.array_equal(potsdam3(np.arange(len(fine))), fine)
    assert np.array_equal(cityscapes27(np.arange(-1, 34)), [-100] * 8 + list(range(27)))


def run_neighbours(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """stego_knn: pooled features, neighbours in order, similarities."""
    tolerance, count = description["tolerance"], description["config"]["topk"] - 1
    pooled = pool(tensors["feats"])
    close(pooled, tensors["pooled"], tolerance)
    numbers, cosines = nearest_neighbours(pooled, count=count)
    close(cosines, tensors["topk_sims"], tolerance)
    # Neighbours that are as similar to the last digits may change places.
    same = numbers == tensors["nns"]
    order = cosines.diff(dim=1).abs()
    near = torch.zeros_like(same)
    near[:, 1:] |= order < 1e-5
    near[:, :-1] |= order < 1e-5
    assert bool((same | near).all())


def run_crf(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """stego_crf: marginals of the reference library, as close as another approximation can be."""
    limits = description["tolerance"]["other_algorithm_or_exact_inference"]
    for tag, share in limits["argmax_agreement_min"].items():
        image = tensors[f"{tag}.rgb_uint8"].flip(-1).permute(2, 0, 1)[None]
        logits = tensors[f"{tag}.logits"][None]
        if logits.shape[-2:] != image.shape[-2:]:
            logits = F.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=False)
        found = dense_crf(image, logits.softmax(dim=1))[0]
        expected = tensors[f"{tag}.Q"]
        assert float((found.argmax(dim=0) == expected.argmax(dim=0)).float().mean()) >= share
        assert float((found - expected).abs().mean()) <= limits["mean_abs_dQ_max"][tag]


def run_contrastive(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """stego_contrastive_crf: the loss of every pair of pixels."""
    config = {name: description["config"][name] for name in ("alpha", "beta", "gamma", "w1", "w2", "shift")}
    loss = contrastive_crf_loss(tensors["guidance"], tensors["code"], tensors["coords"], **config)
    close(loss, tensors["loss"], description["tolerance"])
    close(loss.mean(), tensors["loss_mean"], description["tolerance"])


def run_steps(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """stego_training_steps: losses, parameters after each step of the head and of both probes, and an evaluation."""
    config, limits = description["config"], description["tolerance"]
    state = part(tensors, "init.")
    trunk = trunk_of(part(state, "net.model."), config["vit"])
    head = head_of(part(state, "net.")).train()
    clusters = probe_of(state["cluster_probe.clusters"])
    linear = torch.nn.Conv2d(config["dim"], config["n_classes"], 1)
    linear.load_state_dict(part(state, "linear_probe."))
    rates = (config["net_lr"], config["probe_lr"], config["probe_lr"])
    optimisers = [
        torch.optim.Adam(m.parameters(), lr=lr) for m, lr in zip((head, clusters, linear), rates, strict=True)
    ]
    step = 0
    while f"step{step}.img" in tensors:
        given = part(tensors, f"step{step}.")
        with _dropout(given["keep_masks"], 0.1):
            features = trunk.dense(given["img"])
            codes = head(features)
            dropped = head.drop(features)
            near = trunk.dense(given["img_pos"])
            near_codes = head(near)
            near_dropped = head.drop(near)
        terms = correspondence_terms(
            dropped,
            codes,
            near_dropped,
            near_codes,
            points=_points(given["coords1"]),
            partner_points=_points(given["coords2"]),
            partners=given["neg_perms"],
            shifts=tuple(config["shifts"][name] for name in ("self_", "knn", "neg")),
            centring="code" if config["pointwise"] else "none",
            clamp=config["zero_clamp"],
        )
        weights = (config["weights"][name] for name in ("self_", "knn", "neg"))
        total = sum(w * term for w, term in zip(weights, (terms.self_, terms.knn, terms.random), strict=True))
        by_label = linear_loss(linear, codes.detach(), given["label"], classes=config["n_classes"])
        by_cluster = clusters.loss(codes.detach())
        for optimiser in optimisers:
            optimiser.zero_grad()
        whole = total + by_label + by_cluster
        whole.backward()  # type: ignore[union-attr]
        for optimiser in optimisers:
            optimiser.step()
        _compare_log(part(given, "log."), terms, by_label, by_cluster, whole, limits["losses"])  # type: ignore[arg-type]
        after = part(given, "after.")
        expected = {**head_of(part(after, "net.")).state_dict()}
        for name, value in head.state_dict().items():
            _close_after(value, expected[name], limits["params_after"], reach=2 * (step + 1) * rates[0])
        reach = 2 * (step + 1) * rates[1]
        centres = clusters.centres.detach()
        _close_after(centres, after["cluster_probe.clusters"], limits["params_after"], reach=reach)
        for name, value in linear.state_dict().items():
            _close_after(value, after[f"linear_probe.{name}"], limits["params_after"], reach=reach)
        # What ours leaves out, since nothing trains it.
        for name in ("train_cluster_probe.clusters", "decoder.weight", "decoder.bias"):
            assert torch.equal(after[name], state[name])
        step += 1
    assert step
    # The evaluation alone: on the official parameters.
    head.load_state_dict(head_of(part(after, "net.")).state_dict())
    clusters.load_state_dict({"centres": after["cluster_probe.clusters"]})
    linear.load_state_dict(part(after, "linear_probe."))
    _compare_evaluation(tensors, trunk, head.eval(), clusters, linear, limits["losses"])


def _close_after(actual: Tensor, expected: Tensor, tolerance: Mapping[str, float], *, reach: float) -> None:
    """Within the tolerance, but for one parameter in 200, which may be as far off as Adam's steps reach.

    Adam takes a whole step along a gradient that is next to nothing, whichever its sign.
    """
    beyond = (actual - expected).abs() > tolerance["atol"] + tolerance["rtol"] * expected.abs()
    assert float(beyond.float().mean()) <= 1 / 200
    close(actual, expected, {"atol": reach})


def _compare_log(
    log: Mapping[str, Tensor],
    terms: Terms,
    by_label: Tensor,
    by_cluster: Tensor,
    whole: Tensor,
    tolerance: Mapping[str, float],
) -> None:
    found = {
        "loss.pos_intra": terms.self_,
        "loss.pos_inter": terms.knn,
        "loss.neg_inter": terms.random,
        "cd.pos_intra": terms.self_code,
        "cd.pos_inter": terms.knn_code,
        "cd.neg_inter": terms.random_code,
        "loss.linear": by_label,
        "loss.cluster": by_cluster,
        "loss.total": whole,
    }
    for name, value in found.items():
        close(value.detach(), log[name], tolerance)


@torch.no_grad()
def _compare_evaluation(
    tensors: Mapping[str, Tensor],
    trunk: VitTrunk,
    head: SegmentationHead,
    clusters: ClusterProbe,
    linear: torch.nn.Conv2d,
    tolerance: Mapping[str, float],
) -> None:
    image = tensors["eval.img"]
    codes = (head(trunk.dense(image)) + head(trunk.dense(image.flip(3))).flip(3)) / 2
    codes = F.interpolate(codes, size=image.shape[-2:], mode="bilinear", align_corners=False)
    found = {
        "cluster": (ALPHA * cluster_cosines(codes, clusters.centres)).log_softmax(dim=1),
        "linear": linear(codes).log_softmax(dim=1),
    }
    for name, shares in found.items():
        close(shares[..., ::2, ::2], tensors[f"eval.{name}_logprob"], tolerance)
        same = shares.argmax(dim=1) == tensors[f"eval.{name}_pred"].long()
        assert float(same.float().mean()) > 0.995


RUNNERS = {
    "stego_corr_loss.*": run_losses,
    "stego_backbone_head.*": run_backbone,
    "stego_cluster_lookup.*": run_clusters,
    "stego_epsilons.*": run_epsilons,
    "stego_super_perm.*": run_permutations,
    "stego_metrics.*": run_metrics,
    "stego_label_maps.*": run_label_maps,
    "stego_knn.*": run_neighbours,
    "stego_crf.*": run_crf,
    "stego_contrastive_crf.*": run_contrastive,
    "stego_training_steps.*": run_steps,
}
