"""What was decided about a method's production model: an MLflow run per decision, written once, never changed.

All runs are in the experiment `lexiseg-promotions`. The tag `lexiseg.decision` holds the whole record, and in it the
hash of the record before, so a record that was altered or removed shows. Metrics and text are copies, to look at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from mlflow.entities import RunStatus, ViewType
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from lexiseg.storage import sha256_of_json
from lexiseg.tracking.registry import model_name, registered_model
from lexiseg.tracking.store import Store

EXPERIMENT, PRODUCTION = "lexiseg-promotions", "production"
RECORD, METHOD, NUMBER, CARRIED_OUT = (
    "lexiseg.decision",
    "lexiseg.method",
    "lexiseg.decision_number",
    "lexiseg.carried_out",
)
MAX_RECORD = 8000  # characters of a tag
_TEXTS = 400  # characters of a part of a gate, where a record would get too long
_PAGE = 1000

Outcome = Literal["promoted", "refused", "rolled back", "retired", "void"]


@dataclass(frozen=True)
class Decision:
    """One decision.

    Attributes:
        method: such as "lseg".
        number: counted from 1 for each method; a number may be left out, and is never used twice.
        outcome: what was decided; retired: there is no production any more; void: who began it ended before deciding.
        version: that was asked about; None for a void one.
        before, after: the version in production; None: there was none.
        reason: in words.
        asked: who or what asked: "by", "host", "through", and "approved_by" where somebody was asked.
        time: UTC, ISO 8601, to the second.
        gates: of each its name, whether it passed, and what was found, allowed and is to do.
        evidence: what was measured, and the fingerprints of what it was measured on.
        previous: hash of the record of the decision before; None for the first.
    """

    method: str
    number: int
    outcome: Outcome
    version: str | None
    before: str | None
    after: str | None
    reason: str
    asked: Mapping[str, str]
    time: str
    gates: Sequence[Mapping[str, Any]] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)
    previous: str | None = None

    @property
    def hash(self) -> str:
        """Hash of the record."""
        return sha256_of_json(asdict(self))

    def to_text(self) -> str:
        """The record as it is kept."""
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)


@dataclass(frozen=True)
class Entry:
    """A decision as MLflow has it.

    Attributes:
        decision: the decision.
        run_id: of its run.
        carried_out: what became of it: "yes"; why not; or None while it is under way.
    """

    decision: Decision
    run_id: str
    carried_out: str | None


def shortened(decision: Decision) -> Decision:
    """The decision, with texts cut where its record would be too long for a tag."""
    if len(decision.to_text()) <= MAX_RECORD:
        return decision
    gates = [
        {key: value[:_TEXTS] if isinstance(value, str) else value for key, value in one.items()}
        for one in decision.gates
    ]
    asked = {key: value[:_TEXTS] for key, value in decision.asked.items()}
    cut = replace(decision, gates=gates, asked=asked, reason=decision.reason[: 2 * _TEXTS])
    if len(cut.to_text()) <= MAX_RECORD:
        return cut
    return replace(cut, gates=[{"name": one["name"], "passed": one["passed"]} for one in gates])


def read_entries(store: Store, method: str) -> list[Entry]:
    """The decisions on a method, oldest first, those too whose runs or experiment somebody deleted on MLflow's pages.

    Of two with one number, the one that was written first counts.
    """
    experiment = store.client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    found: dict[int, tuple[tuple[int, str], Entry]] = {}
    token = None
    while True:
        page = store.client.search_runs(
            [experiment.experiment_id],
            filter_string=f"tags.`{METHOD}` = '{method}'",
            run_view_type=ViewType.ALL,
            max_results=_PAGE,
            page_token=token,
        )
        for run in page:
            decision = _decision_of(run, method)
            entry = Entry(decision, run.info.run_id, run.data.tags.get(CARRIED_OUT))
            first = ((run.info.start_time, run.info.run_id), entry)
            known = found.get(decision.number)
            found[decision.number] = first if known is None else min(known, first, key=lambda pair: pair[0])
        token = page.token
        if not token:
            return [found[number][1] for number in sorted(found)]


def _decision_of(run: Any, method: str) -> Decision:
    try:
        return Decision(**json.loads(run.data.tags[RECORD]))
    except (KeyError, TypeError, ValueError) as error:
        # It stands for itself in the history, whose checks will not fit it.
        number = run.data.tags.get(NUMBER, "0")
        return Decision(
            method=method,
            number=int(number) if number.isdigit() else 0,
            outcome="void",
            version=None,
            before=None,
            after=None,
            reason=f"the record of this decision cannot be read ({type(error).__name__}); its run is {run.info.run_id}",
            asked={"by": "unknown", "through": "unknown"},
            time=datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="seconds"),
        )


def write_decision(store: Store, decision: Decision) -> str:
    """Write a decision in one piece; returns the id of its run. It is not carried out yet.

    Raises:
        MlflowException: MLflow refuses or is out of reach; `tracking_errors` puts it into words.
    """
    experiment = store.experiment(EXPERIMENT)
    tags = {RECORD: decision.to_text(), METHOD: decision.method, NUMBER: str(decision.number)}
    name = f"{decision.method}-{decision.number}-{decision.outcome.replace(' ', '-')}"
    return store.client.create_run(experiment, tags=tags, run_name=name).info.run_id


def carry_out(store: Store, entry: Entry) -> str:
    """Set the alias as the decision says, note that, and close its run; what was done already is not done again.

    Returns:
        "yes", or why it was not carried out.

    Raises:
        MlflowException: MLflow refuses or is out of reach; what was done stays, and whoever comes next does the rest.
    """
    client, decision = store.client, entry.decision
    for key, value in _numbers(decision.evidence).items():
        client.log_metric(entry.run_id, key, value)
    client.set_tag(entry.run_id, MLFLOW_RUN_NOTE, _note(decision))
    # Read anew: two may settle one decision at the same time, and a third decide after the quicker of them.
    carried_out = client.get_run(entry.run_id).data.tags.get(CARRIED_OUT)
    if carried_out is None:
        # Noted at once: whoever settles this after a crash must not set again what others have changed since.
        carried_out = _set_alias(store, decision)
        client.set_tag(entry.run_id, CARRIED_OUT, carried_out)
    client.set_terminated(entry.run_id, status=RunStatus.to_string(RunStatus.FINISHED))
    return carried_out


def _set_alias(store: Store, decision: Decision) -> str:
    name, before, after = model_name(decision.method), decision.before, decision.after
    if after == before:
        return "yes"
    now = production_of(store, decision.method)
    if now not in (before, after):
        return f"no: production had become {f'version {now}' if now else 'empty'} by other hands"
    try:
        if after is None:
            store.client.delete_registered_model_alias(name, PRODUCTION)
        else:
            store.client.set_registered_model_alias(name, PRODUCTION, after)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return f"no: version {after} is gone"
    return "yes"


def production_of(store: Store, method: str) -> str | None:
    """The version that is production now, read anew; None: none is, or nothing was registered."""
    model = registered_model(store, model_name(method))
    found = model and model.aliases.get(PRODUCTION)
    return None if found is None else str(found)


def _numbers(evidence: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in evidence.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = float(value)
    return found


def _note(decision: Decision) -> str:
    said = [(one["name"], "passed" if one["passed"] else "FAILED", one.get("found", "")) for one in decision.gates]
    rows = [f"| {' | '.join(row)} |" for row in said]
    table = ["", "| gate | | found |", "|---|---|---|", *rows] if rows else []
    return "\n".join([f"**{decision.outcome}**: {decision.reason}", *table])
