"""Ablations and controls: variants of a method over several seeds, in one table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lexiseg.errors import SettingsError
from lexiseg.methods import METHODS, resolve
from lexiseg.pipeline import upstream_of
from lexiseg.stage import value_at
from lexiseg.storage import read_json
from lexiseg.trials import Trials

HEADLINE = ("miou", "fb_iou", "miou_seen", "miou_unseen", "miou_stuff", "miou_things", "boundary_f")
# Of methods whose classes are clusters: nothing is seen or unseen to them.
OF_CLUSTERS = ("miou", "pixel_accuracy", "miou_stuff", "miou_things", "boundary_f", "linear_miou", "usage_entropy")


def ablate(
    root: Path,
    method: str,
    *,
    seeds: Sequence[int],
    table: str | None = None,
    variants: Sequence[str] = (),
    splits: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the variants of one table of a method, and its baselines, for every seed.

    The seed is the one of all trainings, the encoders' included.

    Args:
        root: the working tree.
        method: name in the registry.
        seeds: seeds of the trials.
        table: name of the table; None: the method's first.
        variants: names to run; none means all.
        splits: splits to evaluate on; none means those of params.yaml.

    Returns:
        method, table, profile, data, protocol (name and hash), seeds; `rows`: per variant of the method, per baseline
        and for the encoders (`variant` None for both), and per split: `protocol_hash`,
        `seeds` with the metrics of each, `mean`, `std`.

    Raises:
        SettingsError: no such method, table or variant; or settings refuse one of them, before the first is run.
    """
    if method not in METHODS or METHODS[method].ablations is None:
        raise SettingsError(
            found=f"no ablations for `{method}`",
            allowed=", ".join(name for name, entry in METHODS.items() if entry.ablations),
            fix="name one of these",
        )
    tables: Mapping[str, Mapping[str, Mapping[str, Any]]] = resolve(str(METHODS[method].ablations))  # type: ignore[assignment]
    table = table or next(iter(tables))
    if table not in tables:
        raise SettingsError(found=f"no table `{table}` of {method}", allowed=", ".join(tables), fix="name one of these")
    changes = tables[table]
    wrong = [name for name in variants if name not in changes]
    if wrong:
        raise SettingsError(
            found=f"no variant {', '.join(wrong)} in the table {table}",
            allowed=", ".join(changes),
            fix="name one or more of these, or another --table",
        )
    trials = Trials(root)
    splits = list(splits or trials.values["evaluate"]["splits"])
    common: dict[str, Any] = {"evaluate.splits": splits}
    if trials.values.get(method, {}).get("run") is False:
        common[f"{method}.run"] = True
    measured: dict[tuple[str, str | None], dict[int, Any]] = {}
    # All of them means all that differ: under some profiles the paper's network is what is set.
    same = [name for name, values in changes.items() if not _differs(trials.values, values)]
    chosen = list(variants) or [name for name in changes if name not in same[1:]]
    # The CLIP is measured beside methods that use one.
    encoders = ["encode-evaluate"] if "encode" in upstream_of(trials.graph, f"{method}-evaluate") else []
    trials.settings_under(common)
    _refuse(trials, table, {name: {**common, **changes[name]} for name in chosen})
    for seed in seeds:
        for variant in chosen:
            print(f"== {method}, variant {variant}, seed {seed}", flush=True)
            done = trials.run({**common, "seed": seed, **changes[variant]}, [f"{method}-evaluate"])
            metrics = read_json(done[f"{method}-evaluate"] / "metrics.json")
            measured.setdefault((method, variant), {})[seed] = metrics
        others = [name for name in trials.graph if name.startswith(f"{METHODS[method].baselines}-evaluate@")]
        done = trials.run({**common, "seed": seed}, [*others, *encoders])
        for name in others:
            metrics = read_json(done[name] / "metrics.json")
            measured.setdefault((metrics["method"].removeprefix("baselines/"), None), {})[seed] = metrics
        for name in encoders:
            found = read_json(done[name] / "metrics.json")["retrieval"] or {}
            measured.setdefault(("encoders", None), {})[seed] = {"splits": found}
    rows = [
        {"method": who, "variant": variant, "split": split}
        | _protocol_of(by_seed[seeds[0]])
        | _over_seeds({seed: found["splits"][split] for seed, found in by_seed.items()})
        for split in splits
        for (who, variant), by_seed in measured.items()
        if all(found["splits"].get(split) for found in by_seed.values())
    ]
    protocol = measured[method, chosen[0]][seeds[0]]["protocol"]
    return {
        "method": method,
        "table": table,
        "profile": trials.values["profile"],
        "data": trials.values["data"]["name"],
        "protocol": {"name": protocol["name"], "hash": protocol["hash"]},
        "seeds": list(seeds),
        "rows": rows,
    }


def _refuse(trials: Trials, table: str, variants: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a table of which a variant could not run, rather than stop in the middle of it."""
    fit: list[str] = []
    refused: dict[str, list[str]] = {}  # what would be allowed -> the variants, which mostly share a fault
    for name, changes in variants.items():
        try:
            trials.settings_under(changes)
            fit.append(name)
        except SettingsError as error:
            refused.setdefault(error.allowed, []).append(name)
    if refused:
        raise SettingsError(
            found=f"{len(variants) - len(fit)} of {len(variants)} variants of the table {table} that settings refuse:"
            + "".join(f"\n  - {_quoted(names)}" for names in refused.values()),
            allowed="".join(refused),
            fix=(f"name each that is to run by --variant: {_quoted(fit)}" if fit else "name other variants or --table")
            + "; or use a profile that fits all of them",
        )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def table_lines(result: Mapping[str, Any]) -> list[str]:
    """The result as a Markdown table: mean and standard deviation over the seeds, in percent."""
    rows = [row for row in result["rows"] if row["method"] != "encoders"]
    headline = OF_CLUSTERS if any("usage_entropy" in row["mean"] for row in rows) else HEADLINE
    names = [name for name in headline if any(name in row["mean"] for row in rows)]
    titles = [name.replace("miou", "mIoU").replace("fb_iou", "FB-IoU").replace("_", " ") for name in names]
    lines = ["| " + " | ".join([f"{result['data']}, split", "what", *titles]) + " |", "|---" * (2 + len(names)) + "|"]
    usual = result.get("protocol", {}).get("hash")
    for row in rows:
        what = row["method"] + (f", {row['variant']}" if row["variant"] else "")
        if row.get("protocol_hash", usual) != usual:
            what += " *"
        cells = [_cell(row["mean"].get(name), row["std"].get(name)) for name in names]
        lines.append("| " + " | ".join([row["split"], what, *cells]) + " |")
    if any(" * |" in line for line in lines):
        lines += ["", "\\* measured under another protocol than the first row"]
    return lines


def retrieval_lines(result: Mapping[str, Any]) -> list[str]:
    """Recall at 1 of the frozen encoders, a sentence per split; none where no image-text pair was measured."""
    return [
        f"Frozen CLIP, {row['split']}: R@1 image to text {_cell(row['mean'][one], row['std'][one])}, "
        f"text to image {_cell(row['mean'][other], row['std'][other])}."
        for row in result["rows"]
        if row["method"] == "encoders"
        for one, other in [("image_to_text_r1", "text_to_image_r1")]
    ]


def _protocol_of(metrics: Mapping[str, Any]) -> dict[str, str]:
    return {"protocol_hash": metrics["protocol"]["hash"]} if "protocol" in metrics else {}


def _differs(values: Mapping[str, Any], changes: Mapping[str, Any]) -> bool:
    return any(value_at(values, key) != value for key, value in changes.items())


def _over_seeds(by_seed: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    first = next(iter(by_seed.values()))
    names = [name for name in first if all(isinstance(metrics.get(name), float) for metrics in by_seed.values())]
    values = {name: [metrics[name] for metrics in by_seed.values()] for name in names}
    return {
        "seeds": {str(seed): {name: metrics[name] for name in names} for seed, metrics in by_seed.items()},
        "mean": {name: round(statistics.mean(found), 6) for name, found in values.items()},
        "std": {name: round(statistics.stdev(found), 6) if len(found) > 1 else None for name, found in values.items()},
    }


def _cell(mean: float | None, std: float | None) -> str:
    if mean is None:
        return "–"
    return f"{100 * mean:.1f}" if std is None else f"{100 * mean:.1f} ± {100 * std:.1f}"
