"""The model card of a version, as Markdown: what it was made of, what it scored, where it fails, how to call it.

Of a version's own folder and run, and of runs that differ from it in the seed alone. `lexiseg sync` puts it on the
version's page in MLflow, `lexiseg card` prints it.
"""

from __future__ import annotations

import csv
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lexiseg.storage import read_json
from lexiseg.tracking.store import Store

_NAMES = 40  # of a vocabulary; larger ones are cut
_WORST = 5
STRESS, PER_CLASS = "stress", "_per_class.csv"
HEADLINES = ("miou", "miou_seen", "miou_unseen", "fb_iou", "linear_miou", "pixel_accuracy", "boundary_f")


def model_card(
    store: Store, *, method: str, name: str, version: str, run_id: str, folder: Path, per_class: Mapping[str, Path]
) -> str:
    """Write the card.

    Args:
        store: MLflow.
        method: such as "lseg".
        name: of the registered model.
        version: its number.
        run_id: of the run that it came from.
        folder: the model folder.
        per_class: split -> table of the stage evaluate with a row per class.

    Returns:
        Markdown.

    Raises:
        MlflowException: MLflow has no such run, or is out of reach.
    """
    card, vocabulary = read_json(folder / "card.json"), read_json(folder / "vocabulary.json")
    run = store.client.get_run(run_id)
    lines = [
        f"# {name}, version {version}",
        f"{method}, commit {run.data.tags.get('lexiseg.commit', 'unknown')[:12]}, {card['package']}, "
        f"fingerprint {run.data.tags.get('lexiseg.fingerprint', 'unknown')[:12]}",
        *_data(card, run),
        *_vocabulary(vocabulary, clusters="named_by" in read_json(folder / "model.json")),
        *_scores(card, _seeds(store, run)),
        *_limits(card, per_class),
        *_licences(card),
        *_use(name, version, vocabulary),
    ]
    return "\n".join(lines)


def _data(card: Mapping[str, Any], run: Any) -> list[str]:
    data, said = card["data"], card["data"].get("validation")
    validation = "not recorded"
    if said:
        failed = f"; warnings: {', '.join(said['failed'])}" if said["failed"] else ""
        validation = f"{'passed' if said['success'] else 'FAILED'} ({said['expectations']} expectations{failed})"
    return [
        "",
        "## Data",
        f"- {data['name']}, version {run.data.tags.get('lexiseg.data_version', 'unknown')[:12]}, "
        f"content {data['content_digest'][:12]}",
        f"- validation: {validation}",
    ]


def _vocabulary(vocabulary: Mapping[str, Any], *, clusters: bool) -> list[str]:
    names = vocabulary["names"]
    lines = ["", "## Vocabulary"]
    if clusters:
        return [*lines, f"- clusters, named after training: {_listed(names)}", "- no class was labelled in training"]
    for title, seen in (("labelled in training", True), ("never labelled in training", False)):
        these = [one for one, flag in zip(names, vocabulary["seen"], strict=True) if flag is seen]
        lines.append(f"- {title}: {_listed(these)}")
    return [*lines, "- other words may be asked for; answers name words that the text encoder has never seen"]


def _scores(card: Mapping[str, Any], seeds: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    protocol = card["protocol"]
    lines = [
        "",
        "## Scores",
        f"Protocol {protocol['name']} ({protocol['hash'][:12]}), in percent; every seed is a run.",
    ]
    for split, metrics in card["metrics"].items():
        if metrics is None:
            continue
        runs = seeds.get(split, ())
        lines += ["", f"| {split} | this version | mean and deviation over {len(runs)} seed(s) |", "|---|---|---|"]
        for name in (one for one in HEADLINES if metrics.get(one) is not None):
            values = [run[name] for run in runs if name in run]
            spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
            mean = f"{100 * statistics.mean(values):.1f}{spread}" if values else "–"
            lines.append(f"| {name} | {100 * metrics[name]:.1f} | {mean} |")
    return lines


def _limits(card: Mapping[str, Any], per_class: Mapping[str, Path]) -> list[str]:
    lines = ["", "## Limits"]
    usual = next((split for split in card["metrics"] if split != STRESS), None)
    hard = (card["metrics"].get(STRESS) or {}).get("miou")
    easy = (card["metrics"].get(usual) or {}).get("miou") if usual else None
    if hard is not None and easy is not None:
        lines.append(
            f"- on pictures that look unlike those of training (split {STRESS}) mIoU is {100 * hard:.1f} instead of "
            f"{100 * easy:.1f}"
        )
    else:
        lines.append("- what becomes of it on pictures unlike those of training was not measured: no stress split")
    for split, table in per_class.items():
        with table.open(newline="", encoding="utf-8") as stream:
            rows = [(float(row["iou"]), row["class"]) for row in csv.DictReader(stream) if row["iou"]]
        worst = ", ".join(f"{name} {100 * value:.0f}" for value, name in sorted(rows)[:_WORST])
        lines.append(f"- worst classes on {split} (IoU): {worst}")
    return lines


def _licences(card: Mapping[str, Any]) -> list[str]:
    rows = [f"- {part}: {textwrap.shorten(text or 'not stated', 300)}" for part, text in card["licences"].items()]
    return ["", "## Licences of its ingredients", *rows]


def _use(name: str, version: str, vocabulary: Mapping[str, Any]) -> list[str]:
    labels = ", ".join(vocabulary["names"][:3])
    return [
        "",
        "## Use",
        "```sh",
        f'lexiseg predict photo.jpg --labels "{labels}" --model models:/{name}/{version} --out predictions',
        f"lexiseg serve models:/{name}/{version}",
        "```",
        "```python",
        "import lexiseg",
        f'result = lexiseg.load("models:/{name}/{version}").segment("photo.jpg", {vocabulary["names"][:3]!r})',
        "```",
    ]


def _seeds(store: Store, run: Any) -> dict[str, list[dict[str, float]]]:
    """Split -> the metrics of all runs that differ from this one in the seed alone, itself among them."""
    kept = ("lexiseg.method", "lexiseg.protocol_hash", "lexiseg.data_version")
    wanted = {key: value for key, value in run.data.params.items() if key != "seed"}
    same = " and ".join(f"tags.`{key}` = '{run.data.tags.get(key, '')}'" for key in kept)
    others = store.client.search_runs([run.info.experiment_id], filter_string=same, max_results=1000)
    # Of equal seeds (the code may differ), this run, then the latest.
    others.sort(key=lambda other: (other.info.run_id != run.info.run_id, -other.info.start_time))
    seeds: dict[str, Mapping[str, float]] = {}
    for other in others:
        if {key: value for key, value in other.data.params.items() if key != "seed"} == wanted:
            seeds.setdefault(other.data.params.get("seed", ""), other.data.metrics)
    found: dict[str, list[dict[str, float]]] = {}
    for metrics in seeds.values():
        splits: dict[str, dict[str, float]] = {}
        for name, value in metrics.items():
            split, _, metric = name.partition("/")
            splits.setdefault(split, {})[metric] = value
        for split, values in splits.items():
            found.setdefault(split, []).append(values)
    return found


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more if names else "none"
