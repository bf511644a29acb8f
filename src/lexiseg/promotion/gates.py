"""What a version has to pass, one function per gate. Each says what was found, what is allowed and what to do."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lexiseg.promotion.bootstrap import Difference, pooled_iou
from lexiseg.promotion.candidate import Candidate, Scores
from lexiseg.tracking.settings import PromotionSettings

# Parts of a protocol card that say how a model came to its scores, not what was counted.
INFERENCE = frozenset(
    {"sliding_window", "flips", "scales", "refinement", "base_size", "short_side", "window_stride", "max_side"}
)
# Words of licences that forbid commercial use, and such as say nothing of it.
_FORBIDDEN = re.compile(
    r"(?<![A-Za-z])NC(?![A-Za-z])|non[\W_]*commercial|not for commercial|commercial use (is )?(prohibited|forbidden)"
    r"|\bfor (academic )?research\b|research[- ](use )?only|research purposes|for educational|evaluation only"
    r"|academic (use|purposes)|Flickr's terms",
    re.IGNORECASE,
)
_UNKNOWN = re.compile(r"^\s*(unknown|none|n/?a|todo|proprietary)?\s*$|nothing is stated|not stated", re.IGNORECASE)


@dataclass(frozen=True)
class Gate:
    """One gate.

    Attributes:
        name: of the gate.
        passed: whether the version passed.
        found: what was found, in words and numbers.
        allowed: what passes.
        fix: what to do; empty where it passed.
    """

    name: str
    passed: bool
    found: str
    allowed: str
    fix: str = ""


def validation(candidate: Candidate) -> Gate:
    """The data passed validation."""
    said = candidate.card.get("data", {}).get("validation")
    if said is None:
        found = "nothing about the validation of the data"
    else:
        # Of data that passed, what failed are warnings.
        word = "warnings" if said["success"] else "failed"
        failed = f"; {word}: {', '.join(said['failed'])}" if said["failed"] else ""
        found = f"{'passed' if said['success'] else 'not passed'}, {said['expectations']} expectations{failed}"
    return _gate(
        "validation",
        said is not None and said["success"],
        found=found,
        allowed="data that passed the stage validate",
        fix="`dvc repro` validates the data and registers the model anew, `lexiseg sync` makes it a version",
    )


def licences(candidate: Candidate, settings: PromotionSettings) -> Gate:
    """No ingredient forbids what the model is to be used for."""
    stated = dict(candidate.card["licences"])
    if "imported" in candidate.card:  # what the graph went on from
        stated.setdefault("imported weights", candidate.card["imported"].get("licence"))
    used = {part: text for part, text in stated.items() if not _is_absent(candidate, part, text)}
    faults = []
    for part, text in used.items():
        if _UNKNOWN.search(text or ""):
            faults.append(f"that of {part} is unknown")
        elif _FORBIDDEN.search(str(text)):
            faults.append(f"{part} is {text!r}")
    passed = settings.use == "research" or not faults
    listed = "; ".join(f"{part}: {text or 'unknown'}" for part, text in used.items())
    return _gate(
        "licences",
        passed,
        found=listed if passed else "; ".join(faults),
        allowed="ingredients that allow commercial use" if settings.use == "commercial" else "any, for research",
        fix="train with other ingredients, state the licence of what is unknown (`encode.*.licence`, licence.txt of "
        "the data), or set `promotion.use: research` where the model is not sold",
    )


def _is_absent(candidate: Candidate, part: str, text: Any) -> bool:
    """Whether a part without a licence is none of the model: clusters have no text side where no CLIP named them."""
    return part == "text" and text is None and not (candidate.folder / "text").exists()


def signature(said: Mapping[str, str | None]) -> Gate:
    """What the version takes and gives is what requests are written for."""
    return _gate(
        "signature",
        said["signature"] is None,
        found=said["signature"] or "the signature of lexiseg's models",
        allowed="the inputs, outputs and parameters of lexiseg's models",
        fix="register the model with this version of lexiseg: `dvc repro`, `lexiseg sync`",
    )


def loads(said: Mapping[str, str | None]) -> Gate:
    """It can be loaded and asked in a process of its own."""
    return _gate(
        "loads",
        said["fault"] is None,
        found=said["fault"] or "loaded and asked in a clean process",
        allowed="a version that answers its own input example",
        fix="mend the model, then `dvc repro` and `lexiseg sync`; its files in MLflow may be damaged",
    )


def latency(costs: Mapping[str, float] | str, settings: PromotionSettings) -> Gate:
    """Pictures are segmented in time."""
    return _budget("latency", costs, limit=settings.latency, unit="ms per picture")


def memory(costs: Mapping[str, float] | str, settings: PromotionSettings) -> Gate:
    """The process that segments fits."""
    return _budget("memory", costs, limit=settings.memory, unit="MB")


def _budget(name: str, costs: Mapping[str, float] | str, *, limit: float, unit: str) -> Gate:
    value = math.inf if isinstance(costs, str) else costs[name]
    over = f", {value - limit:.1f} too much" if limit < value < math.inf else ""
    return _gate(
        name,
        value <= limit,
        found=f"not measured: {costs}" if isinstance(costs, str) else f"{value:.1f} {unit}{over}",
        allowed=f"at most {limit:g} {unit}",
        fix=f"a smaller model, cheaper settings of prediction, a faster machine, or another `promotion.{name}`",
    )


def evaluated(scores: Scores | str, settings: PromotionSettings) -> Gate:
    """There are scores by picture, on the split that is compared; without them the gates below say nothing.

    Args:
        scores: of the version; in words why there are none.
        settings: the gates.
    """
    if isinstance(scores, str):
        found = scores
    else:
        again = f" (evaluated again, on data {scores.data_digest[:12]})" if scores.measured == "again" else ""
        found = f"{len(scores.counts.ids)} pictures{again}"
    return _gate(
        "evaluated",
        not isinstance(scores, str),
        found=found,
        allowed=f"an evaluation with labels on {settings.split}, recorded by picture by the run of this very model, or "
        "its data in outputs/prepare, on which it is evaluated again",
        fix=f"let `evaluate.splits` hold {settings.split}, or set `promotion.split` to one that it holds and that has "
        "labels; then `dvc repro` and `lexiseg sync`. What has no labels cannot be promoted on evidence",
    )


def floors(method: str, scores: Scores, settings: PromotionSettings) -> Gate:
    """Means and named classes are not below what the user needs, whatever production is."""
    wanted = settings.floors.get(method, {})
    classes = settings.class_floors.get(method, {})
    iou = dict(zip(scores.counts.classes, pooled_iou(scores.counts), strict=True))
    checks = [(name, scores.metrics.get(name), least) for name, least in wanted.items()]
    checks += [(f"IoU of {name}", iou.get(name), least) for name, least in classes.items()]
    faults, fine = [], []
    for name, value, least in checks:
        if value is None or math.isnan(value):
            faults.append(f"there is no {name}")
        elif value < least:
            faults.append(f"{name} {100 * value:.1f} is {100 * (least - value):.1f} below {100 * least:.1f}")
        else:
            fine.append(f"{name} {100 * value:.1f}")
    return _gate(
        "floors",
        not faults,
        found="; ".join(faults or fine) or f"no floors are set for {method}",
        allowed="; ".join(f"{name} at least {100 * least:.1f}" for name, _, least in checks) or "anything",
        fix=f"a better model; the floors are `promotion.floors.{method}` (names of metrics.json) and "
        f"`promotion.class_floors.{method}` (names of classes)",
    )


def comparable(
    challenger: Scores,
    production: Scores | str | None,
    settings: PromotionSettings,
    *,
    method: str,
    version: str | None,
) -> Gate:
    """Both were counted under one protocol, on the same data and the same pictures.

    Args:
        challenger: its scores.
        production: those of the production model; in words why there are none; None: there is no such model.
        settings: the gates.
        method: such as "lseg".
        version: of the production model.
    """
    faults = []
    if isinstance(production, str):
        faults.append(production)
    elif production is not None:
        faults += differences(challenger, production, same_inference=settings.same_inference)
        if len(challenger.counts.ids) < settings.least_pictures:
            faults.append(f"{len(challenger.counts.ids)} pictures, of at least {settings.least_pictures}")
    how = "the same protocol" if settings.same_inference else "the same protocol, apart from how each model predicts"
    if version is None:
        found = "there is no production model to compare with"
    elif not isinstance(production, Scores):
        found = ""
    else:
        protocol, again = challenger.protocol, production.measured == "again"
        found = (
            f"{len(challenger.counts.ids)} pictures under {protocol['name']} {protocol['hash'][:12]}, "
            f"data {challenger.data_digest[:12]}{' (production was evaluated again)' if again else ''}"
        )
    return _gate(
        "comparable",
        not faults,
        found="; ".join(faults) or found,
        allowed=f"{how}, the same data and the same pictures, at least {settings.least_pictures}",
        fix="evaluate both under one protocol on one data set: `dvc repro` with the settings of production, or let "
        "this checkout hold the challenger's data (outputs/prepare), on which production is evaluated again; where "
        "only windows, flips, scales or refinement differ, `promotion.same_inference: false` takes them as the "
        f"model's own. What can never be compared takes production's place after `lexiseg retire {method}`",
    )


def differences(first: Scores, second: Scores, *, same_inference: bool) -> list[str]:
    """In words, what keeps two results from being compared; empty where nothing does."""
    found = []
    fields = different_fields(first, second)
    relevant = fields if same_inference else [name for name in fields if name not in INFERENCE]
    if relevant:
        ours, theirs = first.protocol["card"], second.protocol["card"]
        found.append("other protocols: " + "; ".join(f"{k} {ours.get(k)} and {theirs.get(k)}" for k in relevant))
    if first.data_digest != second.data_digest:
        found.append(f"other data: {first.data_digest[:12]} and {second.data_digest[:12]}")
    elif set(first.counts.ids) != set(second.counts.ids):
        ids, others = set(first.counts.ids), set(second.counts.ids)
        found.append(f"other pictures: {len(ids)} and {len(others)}, of which {len(ids & others)} are the same")
    elif first.counts.classes != second.counts.classes:
        found.append(f"other classes: {len(first.counts.classes)} and {len(second.counts.classes)}")
    elif (first.counts.true != second.counts.ordered(first.counts.ids).true).any():
        found.append("other labels of the same pictures")
    return found


def different_fields(first: Scores, second: Scores) -> list[str]:
    """The fields in which two protocol cards differ."""
    if first.protocol["hash"] == second.protocol["hash"]:
        return []
    ours, theirs = first.protocol["card"], second.protocol["card"]
    return [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)] or ["hash"]


def difference(measured: Difference | None, settings: PromotionSettings, *, version: str | None) -> Gate:
    """Better than production, as far as the pictures can tell.

    Args:
        measured: challenger minus production; None: there is no production model.
        settings: the gates.
        version: of the production model.
    """
    allowed = f"a lower end above {100 * settings.margin:g} points of mIoU"
    if measured is None:
        return _gate("difference", True, found="no production model to be better than", allowed=allowed, fix="")
    short = settings.margin - measured.low
    passed = measured.low > settings.margin
    found = (
        f"{100 * measured.estimate:+.2f} points of mIoU to version {version}, {100 * measured.confidence:g} % interval "
        f"{100 * measured.low:+.2f} to {100 * measured.high:+.2f} ({measured.images} pictures)"
    )
    return _gate(
        "difference",
        passed,
        found=found if passed else f"{found}; its lower end is {100 * short:.2f} short",
        allowed=allowed,
        fix="a better model, or more pictures to tell them apart by; a negative `promotion.margin` accepts one that is "
        "surely not worse by more than that",
    )


def _gate(name: str, passed: bool, *, found: str, allowed: str, fix: str) -> Gate:
    return Gate(name=name, passed=passed, found=found, allowed=allowed, fix="" if passed else fix)
