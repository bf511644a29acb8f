"""Promotion and rollback: measure, then decide within a turn (`lexiseg.tracking.claims`)."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lexiseg.errors import ModelError, PromotionError
from lexiseg.methods import METHODS
from lexiseg.promotion import gates
from lexiseg.promotion.bootstrap import Difference, paired_difference
from lexiseg.promotion.candidate import TABLES, Candidate, Scores, read_candidate, recorded_scores
from lexiseg.promotion.gates import Gate
from lexiseg.promotion.measuring import check_loading, measure_again, measure_costs
from lexiseg.promotion.story import History, earlier_production
from lexiseg.provenance import hardware
from lexiseg.stages.settings import parse_settings, read_values
from lexiseg.tracking.card import PER_CLASS, model_card
from lexiseg.tracking.claims import seals, take_turn, user_name
from lexiseg.tracking.decisions import Decision, Entry, production_of, read_entries
from lexiseg.tracking.registry import CHALLENGER, model_name
from lexiseg.tracking.settings import PromotionSettings
from lexiseg.tracking.store import Store, connect, tracking_errors

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Examination:
    """What was measured of a version, before anything is decided.

    Attributes:
        candidate: the version.
        production: the version in production at that time; None: there was none.
        gates: all of them, in the order they were looked at.
        evidence: numbers and fingerprints, as they go into the decision.
    """

    candidate: Candidate
    production: str | None
    gates: tuple[Gate, ...]
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether all gates were passed."""
        return all(gate.passed for gate in self.gates)

    @property
    def reason(self) -> str:
        """Why the version is promoted or refused, in words."""
        failed = [f"{gate.name}: {gate.found}" for gate in self.gates if not gate.passed]
        if failed:
            return "; ".join(failed)
        first = " (there was no production model)" if self.production is None else ""
        return f"passed all {len(self.gates)} gates{first}"


def examine(root: Path, method: str, *, version: str | None = None, say: Say = print) -> Examination:
    """Measure a version against every gate of `promotion` in params.yaml. Nothing is decided or written.

    Args:
        root: the working tree.
        method: such as "lseg".
        version: its number; None: the alias challenger.
        say: is told of each gate as soon as it is known.

    Raises:
        PromotionError: the version is production already, production was emptied or its version deleted by other hands,
            or no such method.
        TrackingError: MLflow is out of reach, or there is no such version.
        ModelError: the version is no model of lexiseg, or damaged beyond reading.
    """
    check_method(method)
    values = parse_settings(read_values(root))
    split = values.promotion.split or values.evaluate.splits[0]
    settings: PromotionSettings = values.promotion.model_copy(update={"split": split})
    candidate = read_candidate(root, method, f"/{version}" if version else f"@{CHALLENGER}")
    store = connect(root)
    with tracking_errors(store.uri):
        before, entries = production_of(store, method), read_entries(store, method)
    if before == candidate.version:
        raise PromotionError(
            found=f"version {before} of {method} is production already",
            allowed="another version",
            fix=f"`lexiseg history {method}` shows how it came; `dvc repro` and `lexiseg sync` make a new challenger",
        )
    if before is None:
        _refuse_if_emptied(store, method, entries)
    production = _read_production(root, method, before)
    done: list[Gate] = []

    def add(gate: Gate) -> None:
        done.append(gate)
        say(f"{'passed' if gate.passed else 'FAILED'}  {gate.name}: {gate.found}")

    add(gates.validation(candidate))
    add(gates.licences(candidate, settings))
    loading = check_loading(candidate)
    add(gates.signature(loading))
    add(gates.loads(loading))
    costs = measure_costs(root, candidate, split)
    add(gates.latency(costs, settings))
    add(gates.memory(costs, settings))
    ours = _scores(root, store, candidate, split)
    add(gates.evaluated(ours, settings))
    theirs, measured = None, None
    if isinstance(ours, Scores):
        add(gates.floors(method, ours, settings))
        if isinstance(production, Candidate):
            theirs = _production_scores(root, store, production, ours, settings, split)
        else:
            theirs = production
        add(gates.comparable(ours, theirs, settings, method=method, version=before))
        if isinstance(theirs, Scores) and done[-1].passed:
            measured = paired_difference(
                ours.counts,
                theirs.counts.ordered(ours.counts.ids),
                absent_class=ours.absent_class,
                confidence=settings.confidence,
                resamples=settings.resamples,
            )
        if done[-1].passed:
            add(gates.difference(measured, settings, version=before))
    digest = ours.data_digest if isinstance(ours, Scores) else candidate.data_digest
    evidence = _evidence(candidate, production, ours, theirs, measured, costs, settings) | {
        "threads": values.threads,
        "data_digest": digest,
        "earlier_looks": sum(_looked_at(entry, digest, split) for entry in entries),
    }
    return Examination(candidate=candidate, production=before, gates=tuple(done), evidence=evidence)


def decide(root: Path, examination: Examination, *, asked: Mapping[str, str], approval: str | None = None) -> Entry:
    """Write what follows from an examination, and set the alias where it does.

    Production is read again within the turn: where it has changed since the examination, the version is refused, since
    it was compared with another one.

    Args:
        root: the working tree.
        examination: what was measured.
        asked: who or what asks, see `who_asks`.
        approval: why a human did not approve, in words; None: nobody had to, or they did.

    Raises:
        PromotionError: another decision is under way and does not end.
        TrackingError: MLflow is out of reach.
    """
    method, version = examination.candidate.method, examination.candidate.version
    store = connect(root)
    with tracking_errors(store.uri), take_turn(store, method) as turn:
        passed, reason = examination.passed, examination.reason
        if approval is not None and passed:
            passed, reason = False, approval
        if passed and version not in _versions(store, method):
            passed, reason = False, f"version {version} was deleted after it was examined"
        if turn.production != examination.production:
            by = _maker(turn.entries, turn.production)
            passed = False
            reason = (
                f"production became {_named(turn.production)}{f' by decision {by}' if by else ''} while this version "
                f"was measured against {_named(examination.production)}; examine it again"
            )
        return turn.make(
            "promoted" if passed else "refused",
            version=version,
            after=version if passed else turn.production,
            reason=reason,
            asked=dict(asked),
            gates=[asdict(gate) for gate in examination.gates],
            evidence=dict(examination.evidence),
        )


def rollback(root: Path, method: str, *, to: str | None = None, asked: Mapping[str, str], reason: str = "") -> Entry:
    """Make a version production again that was production before.

    Only whether it can be loaded is looked at: it passed the gates when it was promoted, and haste may be needed.

    Args:
        root: the working tree.
        method: such as "lseg".
        to: its number; None: the one that was production before this one.
        asked: who or what asks.
        reason: in words.

    Raises:
        PromotionError: nothing to go back to, a version that was never production, or one that cannot be loaded.
        TrackingError: MLflow is out of reach.
    """
    check_method(method)
    store = connect(root)
    with tracking_errors(store.uri):
        production, entries = production_of(store, method), read_entries(store, method)
    earlier = earlier_production(entries, production)
    target = to or (earlier[-1] if earlier else None)
    changes = [entry.decision for entry in entries if _changed(entry)]
    served = [version for one in changes for version in (one.before, one.after)]
    if target is None or target not in served or target == production:
        known = list(dict.fromkeys(version for version in served if version not in (None, production)))
        raise PromotionError(
            found=f"no way back from {_named(production)}" + (f" to version {to}" if to else ""),
            allowed=f"a version that was production before: {', '.join(map(str, known)) or 'there is none'}",
            fix=f"`lexiseg history {method}` shows them; others go through `lexiseg promote {method} --version V`",
        )
    candidate = read_candidate(root, method, f"/{target}")
    fault = check_loading(candidate)["fault"]
    if fault is not None:
        raise PromotionError(
            found=f"version {target} cannot be used: {fault}",
            allowed="a version that answers its own input example",
            fix=f"`lexiseg rollback {method} --to V` with another one",
        )
    with tracking_errors(store.uri), take_turn(store, method) as turn:
        same = turn.production == production
        said = reason or "no reason was given"
        if not same:
            said = f"production became {_named(turn.production)} meanwhile; look at it, then repeat"
        return turn.make(
            "rolled back" if same else "refused",
            version=target,
            after=target if same else turn.production,
            reason=said,
            asked=dict(asked),
            evidence={"challenger": candidate.identity()},
        )


def retire(root: Path, method: str, *, asked: Mapping[str, str], reason: str) -> Entry:
    """Leave a method without a production model, so that the next version is judged as the first was.

    For models that cannot be compared with what comes, such as STEGO's with another number of clusters.

    Args:
        root: the working tree.
        method: such as "lseg".
        asked: who or what asks.
        reason: in words.

    Raises:
        PromotionError: there is no production model, or no such method.
        TrackingError: MLflow is out of reach.
    """
    check_method(method)
    store = connect(root)
    with tracking_errors(store.uri):
        production, left = production_of(store, method), _left(read_entries(store, method))
        if production is None and left is None:
            raise PromotionError(
                found=f"no production model of {method}",
                allowed="a method that has one",
                fix=f"`lexiseg history {method}` tells what was",
            )
        with take_turn(store, method) as turn:
            gone = turn.production or (left.after if left else None)  # other hands may have removed its alias
            return turn.make("retired", version=gone, after=None, reason=reason, asked=dict(asked))


def read_history(root: Path, method: str) -> History:
    """Everything that was decided on a method, and the version that is production now.

    Raises:
        PromotionError: no such method.
        TrackingError: MLflow is out of reach.
    """
    check_method(method)
    store = connect(root)
    with tracking_errors(store.uri):
        return History(
            method=method,
            entries=tuple(read_entries(store, method)),
            production=production_of(store, method),
            seals=seals(store, method),
        )


def read_card(root: Path, method: str, *, version: str | None = None) -> str:
    """The model card of a version, see `lexiseg.tracking.card`.

    Raises:
        PromotionError: no such method.
        TrackingError: MLflow is out of reach, or there is no such version.
    """
    check_method(method)
    candidate, store = read_candidate(root, method, f"/{version}" if version else f"@{CHALLENGER}"), connect(root)
    with tracking_errors(store.uri), tempfile.TemporaryDirectory() as scratch:
        tables = {
            Path(info.path).name.removesuffix(PER_CLASS): Path(
                store.client.download_artifacts(candidate.run_id, info.path, scratch)
            )
            for info in store.client.list_artifacts(candidate.run_id, TABLES)
            if info.path.endswith(PER_CLASS)
        }
        return model_card(
            store,
            method=method,
            name=model_name(method),
            version=candidate.version,
            run_id=candidate.run_id,
            folder=candidate.folder,
            per_class=tables,
        )


def who_asks(through: str, **more: str) -> dict[str, str]:
    """Who or what asks for a decision: the user, the machine, and the way."""
    return {"by": user_name(), "host": platform.node(), "through": through, **more}


def check_method(method: str) -> None:
    """Refuse what is no method.

    Raises:
        PromotionError: it is none.
    """
    if method not in METHODS:
        raise PromotionError(found=f"no method {method!r}", allowed=", ".join(METHODS), fix="name one of these")


def _scores(root: Path, store: Store, candidate: Candidate, split: str) -> Scores | str:
    """What a version scored: as its run recorded it, or measured again on what is here; or why not."""
    recorded = recorded_scores(store, candidate, split)
    if recorded is not None:
        return recorded
    try:
        return measure_again(root, candidate, split)
    except PromotionError as error:
        return f"no scores of this model by picture on {split} were recorded, and {error.found}"


def _read_production(root: Path, method: str, version: str | None) -> Candidate | str | None:
    """The production model; why it cannot be read; None: there is none."""
    if version is None:
        return None
    try:
        return read_candidate(root, method, f"/{version}")
    except ModelError as error:
        return f"production, version {version}, is damaged: {error.found}"


def _refuse_if_emptied(store: Store, method: str, entries: Sequence[Entry]) -> None:
    """An alias or a version that was removed by hand must not switch the comparison off."""
    last = _left(entries)
    if last is None:
        return
    there = last.after in _versions(store, method)
    back = f"`lexiseg rollback {method} --to {last.after if there else 'V'}`"
    raise PromotionError(
        found=f"no version of {method} is production, though decision {last.number} left version {last.after}: "
        f"{'the alias was removed' if there else 'it was deleted'} by other hands",
        allowed="production as it was decided",
        fix=f"{back} {'puts it back' if there else 'goes to an earlier one'}; where there is to be none, "
        f"`lexiseg retire {method}` says so",
    )


def _left(entries: Sequence[Entry]) -> Decision | None:
    """The decision that left a version in production; None: the last one that changed it left none."""
    changes = (one for one in reversed(entries) if _changed(one) or one.decision.outcome == "retired")
    last = next((one.decision for one in changes if one.carried_out == "yes"), None)
    return last if last is not None and last.after is not None else None


def _versions(store: Store, method: str) -> set[str]:
    return {str(one.version) for one in store.client.search_model_versions(f"name = '{model_name(method)}'")}


def _production_scores(
    root: Path, store: Store, production: Candidate, ours: Scores, settings: PromotionSettings, split: str
) -> Scores | str:
    """What production scored on what the challenger was evaluated on: recorded, or measured again; or why not."""
    recorded = recorded_scores(store, production, split)
    if recorded is not None:
        fields = gates.different_fields(ours, recorded)
        # Where it predicts in a way that is its own, it would do so again.
        own = settings.same_inference and bool(fields) and set(fields) <= gates.INFERENCE
        if own or not gates.differences(ours, recorded, same_inference=settings.same_inference):
            return recorded
    try:
        return measure_again(root, production, split)
    except PromotionError as error:
        why = "was not evaluated by picture" if recorded is None else "was evaluated on something else"
        return f"production {why}, and {error.found}"


def _evidence(
    candidate: Candidate,
    production: Candidate | str | None,
    ours: Scores | str,
    theirs: Scores | str | None,
    measured: Difference | None,
    costs: Mapping[str, float] | str,
    settings: PromotionSettings,
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "split": settings.split,
        "challenger": candidate.identity(),
        "production": production.identity() if isinstance(production, Candidate) else None,
        "costs": costs,
        "hardware": hardware(),
    }
    if isinstance(ours, Scores):
        found |= {"protocol": ours.protocol["hash"], "miou": {"challenger": ours.metrics.get("miou")}}
        found["challenger_measured"] = ours.measured
        if isinstance(theirs, Scores):
            found["miou"]["production"] = theirs.metrics.get("miou")
            found["production_measured"] = theirs.measured
    if measured is not None:
        found["difference"] = asdict(measured)
    return found


def _looked_at(entry: Entry, digest: str, split: str) -> bool:
    """Whether an earlier decision looked at the same labels: every look makes them a little less unseen."""
    evidence = entry.decision.evidence
    # Decisions that were made before it was noted: what their version was evaluated on.
    before = evidence.get("data_digest") or (evidence.get("challenger") or {}).get("data_digest")
    return evidence.get("split") == split and before == digest


def _changed(entry: Entry) -> bool:
    return entry.decision.after != entry.decision.before and entry.carried_out == "yes"


def _maker(entries: Sequence[Entry], production: str | None) -> int | None:
    """The decision that made a version production; None: other hands did."""
    last = next((entry.decision for entry in reversed(entries) if _changed(entry)), None)
    return last.number if last is not None and last.after == production else None


def _named(version: str | None) -> str:
    return "no version" if version is None else f"version {version}"
