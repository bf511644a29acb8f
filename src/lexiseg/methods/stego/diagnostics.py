"""What can be seen of STEGO without a label: similarities by kind of pair, shifts that fit them, use of the clusters.

Letters: B pairs of pictures, P sampled points of a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lexiseg.errors import DataError, ModelError
from lexiseg.evaluation.cluster_scores import cluster_names
from lexiseg.methods.stego.build import load_head
from lexiseg.methods.stego.features import FeatureStore
from lexiseg.methods.stego.loss import (
    Centring,
    centred,
    correspondences,
    random_points,
    sample_points,
    super_permutation,
    unit_rows,
)
from lexiseg.methods.stego.neighbours import read_neighbours
from lexiseg.methods.stego.settings import LossSettings
from lexiseg.methods.stego.shifts import Shifts, suggest_shifts
from lexiseg.pictures import write_png
from lexiseg.pictures.charts import bars, histograms
from lexiseg.storage import read_json

KINDS: tuple[str, ...] = ("self", "neighbours", "random")
_PAIRS, _TOGETHER = 256, 32  # pairs of each kind, and how many of them are computed at a time
_COSINES = 1 << 25  # of a kind of pair, at most; with many points fewer pairs are looked at


@dataclass(frozen=True, eq=False)
class Similarities:
    """Cosines of points of pairs of pictures, by kind of pair: a picture with itself, a neighbour, any other one.

    Attributes:
        features: kind -> float32 (B, P, P), of the frozen features.
        centred: the same after spatial centring, what the loss compares with its shifts.
        codes: the same of the codes; empty without a head.
    """

    features: Mapping[str, np.ndarray]
    centred: Mapping[str, np.ndarray]
    codes: Mapping[str, np.ndarray] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """Mean cosine of the codes, named as in the training curve."""
        names = {"self": "self_code", "neighbours": "knn_code", "random": "random_code"}
        return {names[kind]: float(values.mean()) for kind, values in self.codes.items()}


@torch.no_grad()
def similarities(
    store: FeatureStore,
    neighbours: Tensor,
    *,
    centring: Centring,
    points: int,
    seed: int,
    head: nn.Module | None = None,
) -> Similarities:
    """Sample pairs of pictures, and points of them as the loss does.

    Args:
        store: features.
        neighbours: int64 (N, k).
        centring: see `lexiseg.methods.stego.loss.Centring`.
        points: side of the square of points, P is its square.
        seed: of the sample.
        head: features -> codes, or None.

    Raises:
        DataError: fewer than two pictures.
    """
    if len(store) < 2:
        raise DataError(
            found="one picture to compare",
            allowed="at least two: random pairs are of different pictures",
            fix="add pictures, or set `stego.features.five_crop: true`, which makes five of each",
        )
    generator = torch.Generator().manual_seed(seed)
    pairs = max(2, min(_PAIRS, _COSINES // points**4))
    chosen = torch.randperm(len(store), generator=generator)[:pairs]
    ranks = torch.randint(neighbours.shape[1], (len(chosen),), generator=generator)
    others = super_permutation(torch.randperm(len(chosen), generator=generator))
    partners = {"self": chosen, "neighbours": neighbours[chosen, ranks], "random": chosen[others]}
    found: dict[str, dict[str, list[Tensor]]] = {
        name: {kind: [] for kind in KINDS} for name in ("raw", "flat", "codes")
    }
    for part in range(0, len(chosen), _TOGETHER):
        rows = slice(part, part + _TOGETHER)
        maps = store.maps(chosen[rows])
        here, there = (random_points(len(maps), points**2, generator=generator) for _ in range(2))
        for kind in KINDS:
            other = maps if kind == "self" else store.maps(partners[kind][rows])
            places = here if kind == "self" else there
            raw = _cosines(maps, other, here, places)
            found["raw"][kind].append(raw)
            found["flat"][kind].append(centred(raw, centring))
            if head is not None:
                found["codes"][kind].append(_cosines(head(maps), head(other), here, places))
    raw, flat, codes = (
        {kind: torch.cat(values).numpy() for kind, values in found[name].items() if values}
        for name in ("raw", "flat", "codes")
    )
    return Similarities(features=raw, centred=flat, codes=codes)


def _cosines(maps: Tensor, others: Tensor, here: Tensor, there: Tensor) -> Tensor:
    return correspondences(unit_rows(sample_points(maps, here)), unit_rows(sample_points(others, there)))


def chosen_shifts(found: Similarities, settings: LossSettings) -> Shifts:
    """The shifts that the settings mean: fixed ones, or those of their rule."""
    if settings.shifts == "fixed":
        assert settings.self_shift is not None
        assert settings.knn_shift is not None
        assert settings.random_shift is not None
        given = (settings.self_shift, settings.knn_shift, settings.random_shift)
        why = "set in params.yaml"
        return Shifts(*given, reason=(why, why, why))
    samples = [torch.from_numpy(found.centred[kind]) for kind in KINDS]
    return suggest_shifts(samples[0], samples[1], samples[2], rule=settings.shifts)


def similarity_picture(found: Similarities, shifts: Shifts) -> np.ndarray:
    """Histograms of the features' cosines, of the centred ones with the shifts, and of the codes' (H, W, 3) uint8."""
    marks = dict(zip(KINDS, (shifts.self_, shifts.knn, shifts.random), strict=True))
    panels: dict[str, Any] = {"features": found.features, "features, centred, with shifts b": found.centred}
    if found.codes:
        panels["codes"] = found.codes
    return histograms(panels, marks={"features, centred, with shifts b": marks})


def similarity_table(found: Similarities, shifts: Shifts, *, limit: float) -> dict[str, Any]:
    """The same in numbers: quantiles by kind, shifts with their reasons, and what is wrong with the codes."""
    kinds = {"features": found.features, "centred": found.centred, "codes": found.codes}
    return {
        "quantiles": {
            name: {kind: _quantiles(values) for kind, values in samples.items()}
            for name, samples in kinds.items()
            if samples
        },
        "shifts": {
            kind: {"b": round(value, 6), "reason": reason}
            for kind, value, reason in zip(KINDS, (shifts.self_, shifts.knn, shifts.random), shifts.reason, strict=True)
        },
        "code_means": {name: round(value, 6) for name, value in found.means().items()},
        "collapsed": collapsed(found.means(), limit=limit) if found.codes else None,
    }


def collapsed(row: Mapping[str, float], *, limit: float) -> str | None:
    """What is wrong with a row of the training curve, or None.

    Args:
        row: with `self_code` and `random_code`, mean cosines of the codes within a picture and between pictures.
        limit: the highest mean cosine that is fine.
    """
    within, between = row["self_code"], row["random_code"]
    if between > limit:
        kind, value = "codes of different pictures", between
    elif within > limit:
        kind, value = "codes within a picture", within
    else:
        return None
    return (
        f"{kind} have a mean cosine of {value:.2f} (more than {limit:g}): they collapse. Raise `stego.loss.random` or "
        "the shifts of self and neighbour pairs; `lexiseg stego diagnose` shows the histograms"
    )


def _quantiles(values: np.ndarray) -> dict[str, float]:
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    return {
        f"{share:g}": round(float(value), 4) for share, value in zip(shares, np.quantile(values, shares), strict=True)
    }


def diagnose(folder: Path, stego: Any, *, seed: int, out: Path) -> tuple[dict[str, Any], list[str]]:
    """Look at the outputs of STEGO's stages, as far as there are any, and draw what they say.

    Args:
        folder: outputs/stego.
        stego: the block `stego`.
        seed: of the sampled pairs.
        out: folder for similarities.png and usage.png.

    Returns:
        `similarity_table` with `clusters` (use and mean cosine, or None), and the same as lines.

    Raises:
        DataError: there are no features or neighbours.
        ModelError: there is a head, and it is for other features.
    """
    store, near = FeatureStore(folder / "features"), read_neighbours(folder / "neighbours")
    head = None
    if (folder / "train" / "model.json").is_file():
        head, config = load_head(folder / "train")
        if config["features"] != store.channels:
            raise ModelError(
                found=f"features of {store.channels} channels and a head for {config['features']} in {folder}",
                allowed="a head that was trained on these features",
                fix="run `dvc repro stego-train`: the features are of another trunk than the head",
            )
    how: dict[str, Any] = {"centring": stego.loss.centring, "points": stego.loss.points, "seed": seed}
    found = similarities(store, near, **how, head=head)
    shifts = chosen_shifts(found, stego.loss)
    table = similarity_table(found, shifts, limit=stego.train.alarm)
    write_png(out / "similarities.png", similarity_picture(found, shifts))
    lines = table_lines(table)
    if stego.loss.shifts == "fixed":
        samples = [torch.from_numpy(found.centred[kind]) for kind in KINDS]
        rule = suggest_shifts(samples[0], samples[1], samples[2])
        table["suggested"] = dict(zip(KINDS, (rule.self_, rule.knn, rule.random), strict=True))
        lines += [f"suggested for {kind} pairs: {b:.3f}" for kind, b in table["suggested"].items()]
    path = folder / "probe" / "clusters.json"
    table["clusters"] = read_json(path) if path.is_file() else None
    if table["clusters"]:
        usage = table["clusters"]["usage"]
        write_png(out / "usage.png", usage_picture(usage))
        lines.append(
            f"clusters: {sum(share >= 0.001 for share in usage)} of {len(usage)} win 0.1 % of the cells or more; "
            f"largest {100 * max(usage):.1f} %; mean cosine with their centre {table['clusters']['mean_cosine']:.2f}"
        )
    return table, lines


def usage_picture(usage: Sequence[float]) -> np.ndarray:
    """Bars of the share of cells that each cluster wins, (H, W, 3) uint8."""
    title = "use of the clusters"
    return bars([100 * share for share in usage], cluster_names(len(usage)), title=title, unit="% of the cells")


def table_lines(table: Mapping[str, Any]) -> list[str]:
    """`similarity_table` as lines of text."""
    lines = [f"{'cosines':<22}" + "".join(f"{share:>8}" for share in ("5 %", "25 %", "50 %", "75 %", "95 %"))]
    for name, kinds in table["quantiles"].items():
        lines += [f"{name + ', ' + kind:<22}" + "".join(f"{v:>8.2f}" for v in q.values()) for kind, q in kinds.items()]
    lines.append("")
    lines += [f"shift b of {kind} pairs: {row['b']:.3f} ({row['reason']})" for kind, row in table["shifts"].items()]
    if table["code_means"]:
        lines.append("mean cosine of codes: " + ", ".join(f"{k} {v:.2f}" for k, v in table["code_means"].items()))
        lines.append(f"warning: {table['collapsed']}" if table["collapsed"] else "no sign of a collapse")
    return lines
