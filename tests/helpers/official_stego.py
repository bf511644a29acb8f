"""States with STEGO's official names, and a second, plain implementation of its network, losses, probes and metrics.

Written from the equations, without lexiseg's code: what ours makes of the same tensors has to agree with it.

Letters: B pictures, D channels of a feature, K of a code, (h, w) the grid of patches, S x S sampled points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

# The official keys are those of six heads, whatever the network.
VIT: dict[str, Any] = {"embed": 24, "depth": 2, "heads": 6, "patch": 8, "img_size": 32, "eps": 1e-6, "qkv_bias": True}
KEPT = 0.9  # of the channels, by dropout


def vit_state(sizes: Mapping[str, Any] = VIT, *, seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    """A random DINO ViT; `scale` is that of the tokens before the first block."""
    rng = torch.Generator().manual_seed(seed)
    width, patch = sizes["embed"], sizes["patch"]
    state: dict[str, Tensor] = {}

    def put(name: str, *shape: int, spread: float, mean: float = 0.0) -> None:
        state[name] = mean + spread * torch.randn(shape, generator=rng)

    def affine(name: str, out: int, *rest: int) -> None:
        put(f"{name}.weight", out, *rest, spread=float(np.prod(rest)) ** -0.5)
        put(f"{name}.bias", out, spread=0.1)

    def norm(name: str) -> None:
        put(f"{name}.weight", width, spread=0.1, mean=1.0)
        put(f"{name}.bias", width, spread=0.1)

    put("cls_token", 1, 1, width, spread=scale)
    put("pos_embed", 1, 1 + (sizes["img_size"] // patch) ** 2, width, spread=scale)
    put("patch_embed.proj.weight", width, 3, patch, patch, spread=scale * (3 * patch**2) ** -0.5)
    put("patch_embed.proj.bias", width, spread=0.1 * scale)
    for number in range(sizes["depth"]):
        block = f"blocks.{number}"
        norm(f"{block}.norm1")
        affine(f"{block}.attn.qkv", 3 * width, width)
        affine(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2")
        affine(f"{block}.mlp.fc1", 4 * width, width)
        affine(f"{block}.mlp.fc2", width, 4 * width)
    norm("norm")
    return state


def head_state(width: int, dim: int, *, seed: int = 0) -> dict[str, Tensor]:
    """A random segmentation head, D -> K."""
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for name, out in (("cluster1.0", dim), ("cluster2.0", width), ("cluster2.2", dim)):
        state[f"{name}.weight"] = width**-0.5 * torch.randn(out, width, 1, 1, generator=rng)
        state[f"{name}.bias"] = 0.1 * torch.randn(out, generator=rng)
    return state


def vit(state: Mapping[str, Tensor], sizes: Mapping[str, Any], images: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens behind the last norm and keys of the last block, both (B, 1 + h w, D)."""

    def norm(name: str, x: Tensor) -> Tensor:
        apart = x - x.mean(dim=-1, keepdim=True)
        deviation = (apart.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return apart / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    heads, patch = sizes["heads"], sizes["patch"]
    weight, bias = (state[f"patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
    grid = F.conv2d(images, weight, bias, stride=patch)
    batch, width, high, wide = grid.shape
    first, rest = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    side = sizes["img_size"] // patch
    if (high, wide) != (side, side):
        square = rest.transpose(1, 2).reshape(1, width, side, side)
        factors = [(high + 0.1) / side, (wide + 0.1) / side]
        rest = (
            F.interpolate(square, scale_factor=factors, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        )
    start = (state["cls_token"] + first).expand(batch, -1, -1)
    x = torch.cat([start, grid.flatten(2).transpose(1, 2) + rest], dim=1)
    keys = x
    for number in range(sizes["depth"]):
        block = f"blocks.{number}"
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x))
        q, keys, v = qkv[..., :width], qkv[..., width : 2 * width], qkv[..., 2 * width :]
        found = []
        for head in range(heads):
            own = slice(head * width // heads, (head + 1) * width // heads)
            scores = q[..., own] @ keys[..., own].transpose(1, 2) * (width // heads) ** -0.5
            found.append(scores.softmax(dim=-1) @ v[..., own])
        x = x + linear(f"{block}.attn.proj", torch.cat(found, dim=-1))
        inner = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x)))
        x = x + linear(f"{block}.mlp.fc2", inner)
    return norm("norm", x), keys


def as_map(tokens: Tensor, images: Tensor, patch: int) -> Tensor:
    """Patch tokens as (B, D, h, w), without the class token."""
    height, width = (side // patch for side in images.shape[-2:])
    return tokens[:, 1:].transpose(1, 2).reshape(len(images), -1, height, width)


def dropped(features: Tensor, mask: Tensor) -> Tensor:
    """Channels that the mask (B, D) keeps, scaled up."""
    return features * mask[:, :, None, None].float() / KEPT


def head(state: Mapping[str, Tensor], features: Tensor, masks: Tensor | None = None) -> Tensor:
    """Codes (B, K, h, w); in training with masks (2, B, D), of the linear and of the non-linear branch."""

    def conv(name: str, x: Tensor) -> Tensor:
        return (
            torch.einsum("bdhw,kd->bkhw", x, state[f"{name}.weight"][..., 0, 0]) + state[f"{name}.bias"][:, None, None]
        )

    one, other = (features, features) if masks is None else (dropped(features, mask) for mask in masks)
    return conv("cluster1.0", one) + conv("cluster2.2", conv("cluster2.0", other).clamp(min=0))


def sample(maps: Tensor, coords: Tensor) -> Tensor:
    """(B, C, S, S) at coordinates (B, S, S, 2), whose two axes of points are swapped."""
    return F.grid_sample(maps, coords.permute(0, 2, 1, 3), padding_mode="border", align_corners=True)


def unit(maps: Tensor) -> Tensor:
    """Channels of length 1."""
    return maps / maps.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-10)


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """(B, C, h, w) and (B, C, i, j) -> (B, h, w, i, j)."""
    return torch.einsum("bchw,bcij->bhwij", unit(first), unit(second))


def centred(similar: Tensor) -> Tensor:
    """Spatial centring; the mean over everything is put back."""
    apart = similar - similar.mean(dim=(3, 4), keepdim=True)
    return apart - apart.mean() + similar.mean()


def pair_loss(similar: Tensor, codes: Tensor, shift: float, options: Mapping[str, bool]) -> Tensor:
    """The loss of every two points, of the cosines of their features and of their codes."""
    if options["pointwise"]:
        similar = centred(similar)
    low, high = (0.0 if options["zero_clamp"] else -9999.0), (0.8 if options["stabalize"] else None)
    return -codes.clamp(low, high) * (similar - shift)


def correspondence(
    features: Sequence[Tensor],
    codes: Sequence[Tensor],
    coords: Sequence[Tensor],
    negatives: Tensor,
    shifts: Mapping[str, float],
    options: Mapping[str, bool],
) -> dict[str, Tensor]:
    """Losses and cosines of codes, unreduced, of the pairs intra, inter and neg.

    Features and codes are each those of the pictures and of their neighbours, `negatives` (n, B) the numbers of the
    random partners.
    """
    here, there = coords
    f, s = sample(features[0], here), sample(codes[0], here)
    pairs = {
        "intra": [(f, s)],
        "inter": [(sample(features[1], there), sample(codes[1], there))],
        "neg": [(sample(features[0][row], there), sample(codes[0][row], there)) for row in negatives],
    }
    found = {"sampled_feats": f, "sampled_code": s}
    for (kind, partners), shift in zip(pairs.items(), shifts.values(), strict=True):
        losses, close = [], []
        for g, t in partners:
            close.append(cosines(s, t))
            losses.append(pair_loss(cosines(f, g).detach(), close[-1], shift, options))
        found |= {f"{kind}_loss": torch.cat(losses), f"{kind}_cd": torch.cat(close)}
    return found


def super_perm(order: Tensor) -> Tensor:
    """Each fixed point of a permutation moves on to the next number."""
    size = len(order)
    return torch.tensor([(value + 1) % size if value == place else value for place, value in enumerate(order.tolist())])


def lookup(clusters: Tensor, x: Tensor, alpha: float | None) -> tuple[Tensor, Tensor]:
    """Loss and cosines (B, N, h, w) of codes (B, K, h, w) with centres (N, K): the nearest, or all by their shares."""
    lengths = [values.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-12) for values in (clusters, x)]
    found = torch.einsum("bkhw,nk->bnhw", x / lengths[1], clusters / lengths[0])
    if alpha is None:
        return -found.max(dim=1).values.mean(), found
    return -((alpha * found).softmax(dim=1) * found).sum(dim=1).mean(), found


def metrics(predicted: Tensor, truth: Tensor, classes: int, extra: int, *, matched: bool) -> dict[str, Tensor]:
    """Counts, assignment and scores; predictions of clusters beyond the number of classes are left out."""
    stats = torch.zeros(classes + extra, classes, dtype=torch.int64)
    for cluster, label in zip(predicted.flatten().tolist(), truth.flatten().tolist(), strict=True):
        if 0 <= label < classes and cluster < classes:
            stats[cluster, label] += 1
    found, histogram = {"stats": stats}, stats
    if matched:
        rows, columns = (torch.from_numpy(numbers) for numbers in linear_sum_assignment(stats.numpy(), maximize=True))
        class_of = torch.full((classes + extra,), -1)
        class_of[rows] = columns
        histogram = torch.stack([stats[class_of == label][0] for label in range(classes)])
        found |= {"assign_rows": rows, "assign_cols": columns, "mapped_preds": class_of[predicted]}
        if extra:
            rest = stats[class_of == -1].sum(dim=0, keepdim=True)
            histogram = F.pad(torch.cat([histogram, rest]), (0, 1)).float()
    right, counts = histogram.diagonal().double(), histogram.double()
    iou = right / (counts.sum(dim=0) + counts.sum(dim=1) - right)
    percent = {"m/mIoU": 100 * iou.nanmean(), "m/Accuracy": 100 * right.sum() / counts.sum()}
    return found | {"histogram": histogram, "iou": iou} | percent


def neighbours(feats: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled features (N, D), numbers (N, count) of the most similar ones, and cosines."""
    pooled = F.normalize(feats.mean(dim=(2, 3)), dim=1)
    values, numbers = torch.sort(pooled @ pooled.T, dim=1, descending=True)
    return pooled, numbers[:, :count], values[:, :count]


def contrastive_crf(guidance: Tensor, code: Tensor, coords: Tensor, config: Mapping[str, float]) -> Tensor:
    """(B, n, n), pair by pair."""
    places = list(zip(*coords.tolist(), strict=True))
    loss = torch.zeros(len(code), len(places), len(places))
    for i, (y, x) in enumerate(places):
        for j, (v, u) in enumerate(places):
            apart = (y - v) ** 2 + (x - u) ** 2
            colours = (guidance[:, :, y, x] - guidance[:, :, v, u]).square().sum(dim=1)
            kernel = config["w1"] * torch.exp(-apart / (2 * config["alpha"]) - colours / (2 * config["beta"]))
            kernel = kernel + config["w2"] * np.exp(-apart / (2 * config["gamma"])) - config["shift"]
            loss[:, i, j] = -(code[:, :, y, x] * code[:, :, v, u]).sum(dim=1) * kernel
    return loss


def mean_field(
    image: Tensor,
    logits: Tensor,
    *,
    weights: tuple[float, float] = (3.0, 4.0),
    space: float = 67.0,
    colour: float = 3.0,
    itself: bool = True,
    normalised: bool = True,
) -> Tensor:
    """Marginals (C, H, W) of the dense CRF by whole kernel matrices, float64.

    The uint8 picture is (H, W, 3), the logits are (C, h, w). The options make other CRFs than the official one: other
    weights of the Gaussian and of the bilateral kernel, another space or colour of the latter, no pixel in its own sum,
    no normalisation of the kernels.
    """
    height, width = image.shape[:2]
    logits = F.interpolate(logits[None].double(), size=(height, width), mode="bilinear", align_corners=False)[0]
    energy = logits.flatten(1).softmax(dim=0).clamp(1e-5, 1.0).log()
    y, x = (
        axis.flatten().double() for axis in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    )
    apart = (y[:, None] - y).square() + (x[:, None] - x).square()
    colours = torch.cdist(image.reshape(-1, 3).double(), image.reshape(-1, 3).double()).square()
    total = torch.zeros_like(apart)
    exponents = (apart / (2 * 1**2), apart / (2 * space**2) + colours / (2 * colour**2))
    for weight, exponent in zip(weights, exponents, strict=True):
        kernel = torch.exp(-exponent)
        if not itself:
            kernel.fill_diagonal_(0)
        if normalised:
            norm = kernel.sum(dim=1).rsqrt()
            kernel = norm[:, None] * kernel * norm
        total += weight * kernel
    shares = energy.softmax(dim=0)
    for _ in range(10):
        shares = (energy + shares @ total).softmax(dim=0)
    return shares.reshape(-1, height, width).float()


class Training:
    """Official training steps on a state dict, and the evaluation.

    Args:
        state: all tensors, by their official names.
        config: that of the fixture.
    """

    def __init__(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        self.config = config
        self.state = {name: value.clone() for name, value in state.items()}
        self.optimisers = []
        for start, rate in (("net.cluster", "net_lr"), ("cluster_probe", "probe_lr"), ("linear_probe", "probe_lr")):
            trained = [value.requires_grad_() for name, value in self.state.items() if name.startswith(start)]
            self.optimisers.append(torch.optim.Adam(trained, lr=config[rate]))

    def below(self, start: str) -> dict[str, Tensor]:
        return {name.removeprefix(start): value for name, value in self.state.items() if name.startswith(start)}

    def features(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            tokens, _ = vit(self.below("net.model."), self.config["vit"], images)
            return as_map(tokens, images, self.config["vit"]["patch"])

    def linear(self, codes: Tensor) -> Tensor:
        weight, bias = (self.state[f"linear_probe.{kind}"] for kind in ("weight", "bias"))
        return torch.einsum("bkhw,ck->bchw", codes, weight[..., 0, 0]) + bias[:, None, None]

    def step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One step on img, img_pos, label, keep_masks, coords1, coords2 and neg_perms; gives what is logged."""
        config, net, masks = self.config, self.below("net."), batch["keep_masks"]
        features, near = self.features(batch["img"]), self.features(batch["img_pos"])
        codes, near_codes = head(net, features, masks[:2]), head(net, near, masks[3:5])
        found = correspondence(
            (dropped(features, masks[2]), dropped(near, masks[5])),
            (codes, near_codes),
            (batch["coords1"], batch["coords2"]),
            batch["neg_perms"],
            {name: config["shifts"][name] for name in ("self_", "knn", "neg")},
            {"pointwise": config["pointwise"], "zero_clamp": config["zero_clamp"], "stabalize": False},
        )
        log = {}
        for name, kind in (("pos_intra", "intra"), ("pos_inter", "inter"), ("neg_inter", "neg")):
            log |= {f"loss.{name}": found[f"{kind}_loss"].mean(), f"cd.{name}": found[f"{kind}_cd"].mean()}
        label, detached = batch["label"].long(), codes.detach()
        logits = F.interpolate(self.linear(detached), size=label.shape[-2:], mode="bilinear", align_corners=False)
        label = torch.where((label >= 0) & (label < config["n_classes"]), label, -100)
        log["loss.linear"] = F.cross_entropy(logits, label)
        log["loss.cluster"], _ = lookup(self.state["cluster_probe.clusters"], detached, None)
        weights = config["weights"]
        correspondences = (
            weights["self_"] * log["loss.pos_intra"]
            + weights["knn"] * log["loss.pos_inter"]
            + weights["neg"] * log["loss.neg_inter"]
        )
        log["loss.total"] = correspondences + log["loss.linear"] + log["loss.cluster"]
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        log["loss.total"].backward()
        for optimiser in self.optimisers:
            optimiser.step()
        return {name: value.detach() for name, value in log.items()}

    @torch.no_grad()
    def evaluate(self, images: Tensor) -> dict[str, Tensor]:
        """Log-probabilities of every second pixel, and predictions, of both probes."""
        net = self.below("net.")
        mirrored = head(net, self.features(images.flip(-1))).flip(-1)
        codes = (head(net, self.features(images)) + mirrored) / 2
        codes = F.interpolate(codes, size=images.shape[-2:], mode="bilinear", align_corners=False)
        _, near = lookup(self.state["cluster_probe.clusters"], codes, None)
        found = {}
        for name, logits in (("linear", self.linear(codes)), ("cluster", 2 * near)):
            found[f"{name}_logprob"] = logits.log_softmax(dim=1)[:, :, ::2, ::2]
            found[f"{name}_pred"] = logits.argmax(dim=1).to(torch.uint8)
        return found
