"""One decision on a method's production model at a time, in a store whose aliases have no compare-and-set.

Who decides first creates the experiment `promotion-<method>-<n>`: MLflow refuses a name that there is, so of two only
one gets it. Then production is read again, the decision is written and carried out, and the experiment is marked as
ended and deleted, which hides it; its name stays taken. A claim whose owner is gone is settled by the next: what was
decided is carried out, what was not is void.

Measuring comes before the claim, so it is held for seconds.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException

from lexiseg.errors import PromotionError
from lexiseg.tracking.decisions import (
    Decision,
    Entry,
    Outcome,
    carry_out,
    production_of,
    read_entries,
    shortened,
    write_decision,
)
from lexiseg.tracking.store import Store

OWNER, SEAL = "lexiseg.owner", "lexiseg.decision_hash"
# A claim on another machine whose process cannot be looked at. It takes seconds; clocks may differ by a minute.
LEASE_SECONDS = 180.0
PATIENCE_SECONDS = 240.0
_POLL_SECONDS = 0.5
# Claims of this process: one with its number that is not here was left over.
_held: set[str] = set()


@dataclass(frozen=True)
class Turn:
    """The right to make one decision.

    Attributes:
        store: MLflow.
        method: about which.
        number: of the decision.
        production: the version that is production, read within the turn.
        entries: the decisions before.
    """

    store: Store
    method: str
    number: int
    production: str | None
    entries: tuple[Entry, ...]

    def make(self, outcome: Outcome, **said: Any) -> Entry:
        """Write a decision and carry it out.

        Args:
            outcome: what it is.
            said: the other parts of `Decision` that the turn does not know.

        Raises:
            PromotionError: the claim is not ours any more: this process stood still for longer than a claim lasts.
            MlflowException: MLflow refuses or is out of reach.
        """
        claim = _claim_named(self.store, self.method, self.number)
        if claim is None or not _is_open(claim):
            raise _lost(self.method, self.number)
        decision = shortened(
            Decision(
                method=self.method,
                number=self.number,
                outcome=outcome,
                before=self.production,
                time=_now(),
                previous=_hash_of_last(self.entries),
                **said,
            )
        )
        write_decision(self.store, decision)
        mine = next(one for one in read_entries(self.store, self.method) if one.decision.number == self.number)
        # By what it says: a request whose answer was lost is repeated, and then there are two runs of one decision.
        if mine.decision.hash != decision.hash:
            raise _lost(self.method, self.number)
        return Entry(mine.decision, mine.run_id, carry_out(self.store, mine))


@contextmanager
def take_turn(store: Store, method: str) -> Iterator[Turn]:
    """Wait until nobody else decides about the method, and keep others waiting.

    Raises:
        PromotionError: another decision is under way and does not end, or this user may not see who decides.
        MlflowException: MLflow refuses or is out of reach.
    """
    claim = _claim(store, method)
    number = _number(claim.name)
    try:
        yield Turn(
            store=store,
            method=method,
            number=number,
            production=production_of(store, method),
            entries=tuple(read_entries(store, method)),
        )
    finally:
        # Also after an error: what was written is carried out, and what was not is void.
        try:
            _settle(store, method, claim)
        except MlflowException as error:
            if error.get_http_status_code() == 403:
                # Who may not write decisions may end their own claim: nobody waits for it, its number is left out.
                store.client.delete_experiment(claim.experiment_id)
                raise
            # Of two who settle it at once, the other may have ended it.
            if _is_open(store.client.get_experiment(claim.experiment_id)):
                raise
        finally:
            _held.discard(json.loads(claim.tags[OWNER])["nonce"])


def seals(store: Store, method: str) -> dict[int, str]:
    """Number -> hash of each decision, as its claim kept it when it ended."""
    return {_number(claim.name): claim.tags[SEAL] for claim in _experiments(store, method) if SEAL in claim.tags}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _claim(store: Store, method: str) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        # In this order: of every decision that is seen here, the claim is in the list that is read after it. The other
        # way round, the number after one that is just being decided would be free.
        numbers = [entry.decision.number for entry in read_entries(store, method)]
        names = _experiments(store, method)
        numbers += [_number(one.name) for one in names]
        claims = [one for one in names if _is_open(one)]
        busy = [claim for claim in claims if _is_alive(claim)]
        left = [claim for claim in claims if claim not in busy]
        if left and _settled(store, method, left, last=time.monotonic() > deadline):
            continue  # others may have claimed meanwhile
        if not busy and not left:
            made = _try_to_claim(store, method, max(numbers, default=0) + 1)
            if made is not None:
                return made
        if time.monotonic() > deadline:
            if not busy:
                raise PromotionError(
                    found=f"promotion-{method}-{max(numbers, default=0) + 1} cannot be created and is not to be seen",
                    allowed="an experiment of MLflow that this user may read",
                    fix="have the server's administrator let you read all experiments, then repeat it",
                )
            owner = json.loads(busy[0].tags[OWNER])
            raise PromotionError(
                found=f"{busy[0].name} has been under way for {PATIENCE_SECONDS:.0f} s, by process {owner['pid']} on "
                f"{owner['host']}",
                allowed="one decision on a method at a time; it takes seconds",
                fix="look at that process, end it if it hangs, and repeat: what it left is settled then",
            )
        time.sleep(_POLL_SECONDS)


def _settled(store: Store, method: str, claims: Sequence[Any], *, last: bool) -> bool:
    """Settle what was left over; False where others do the same at this moment: two then get in each other's way."""
    try:
        for claim in claims:
            _settle(store, method, claim)
    except MlflowException as error:
        if last or error.get_http_status_code() == 403:
            raise
        return False
    return True


def _try_to_claim(store: Store, method: str, number: int) -> Any:
    """The claim of this number, or None where somebody else was quicker."""
    name, owner = f"promotion-{method}-{number}", _owner()
    _held.add(owner["nonce"])
    try:
        # The owner comes with the name, in one request: a claim without one would belong to nobody.
        store.client.create_experiment(name, tags={OWNER: json.dumps(owner)})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            _held.discard(owner["nonce"])
            raise
    claim = store.client.get_experiment_by_name(name)
    # Also where it was there already: the request may have been repeated because its answer was lost.
    if claim is not None and OWNER in claim.tags and json.loads(claim.tags[OWNER]).get("nonce") == owner["nonce"]:
        return claim
    _held.discard(owner["nonce"])
    return None


def _settle(store: Store, method: str, claim: Any) -> None:
    """End a claim: what was decided under it is carried out, what was not is void."""
    number = _number(claim.name)
    entries = read_entries(store, method)
    entry = next((one for one in entries if one.decision.number == number), None)
    if entry is None:
        owner, production = json.loads(claim.tags[OWNER]), production_of(store, method)
        void = Decision(
            method=method,
            number=number,
            outcome="void",
            version=None,
            before=production,
            after=production,
            reason=f"process {owner['pid']} on {owner['host']} ended before it had decided; nothing was changed",
            asked={"by": owner["user"], "host": owner["host"], "through": "lexiseg"},
            # Of the claim, so that two who settle it write the same.
            time=datetime.fromtimestamp(claim.creation_time / 1000, UTC).isoformat(timespec="seconds"),
            previous=_hash_of_last(entries),
        )
        entry = Entry(void, write_decision(store, void), None)
    carry_out(store, entry)
    if _is_open(store.client.get_experiment(claim.experiment_id)):
        store.client.set_experiment_tag(claim.experiment_id, SEAL, entry.decision.hash)
        try:
            store.client.delete_experiment(claim.experiment_id)
        except MlflowException as error:
            # Where MLflow asks for passwords, an experiment belongs to who made it: this one stays to be seen.
            if error.get_http_status_code() != 403:
                raise


def _hash_of_last(entries: Sequence[Entry]) -> str | None:
    return entries[-1].decision.hash if entries else None


def _experiments(store: Store, method: str) -> list[Any]:
    """All claims that there ever were, open and ended, and whatever else has such a name."""
    found, token = [], None
    while True:
        page = store.client.search_experiments(
            view_type=ViewType.ALL, filter_string=f"name LIKE 'promotion-{method}-%'", page_token=token
        )
        found += [one for one in page if re.fullmatch(rf"promotion-{re.escape(method)}-\d+", one.name)]
        token = page.token
        if not token:
            return found


def _claim_named(store: Store, method: str, number: int) -> Any:
    return store.client.get_experiment_by_name(f"promotion-{method}-{number}")


def _number(name: str) -> int:
    return int(name.rpartition("-")[2])


def _owner() -> dict[str, Any]:
    process = psutil.Process()
    return {
        "user": user_name(),
        "host": platform.node(),
        "machine": _machine(),
        "pid": process.pid,
        "started": process.create_time(),
        "nonce": uuid.uuid4().hex,
    }


def user_name() -> str:
    """Who asks: the user that MLflow knows, or the one of this machine."""
    return os.environ.get("MLFLOW_TRACKING_USERNAME") or psutil.Process().username()


def _machine() -> str:
    """What makes a number of a process mean the same process: machine, boot, and its namespace."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [platform.node()]
    parts += [boot.read_text(encoding="ascii").strip()] if boot.is_file() else []
    parts += [os.readlink(namespace)] if namespace.is_symlink() else []
    return " ".join(parts)


def _is_open(claim: Any) -> bool:
    # An experiment without an owner is no claim, whatever it is called: its number is left out.
    return claim.lifecycle_stage == "active" and OWNER in claim.tags and SEAL not in claim.tags


def _is_alive(claim: Any) -> bool:
    owner = json.loads(claim.tags[OWNER])
    if owner["machine"] != _machine():
        return time.time() - claim.creation_time / 1000 < LEASE_SECONDS
    if owner["pid"] == os.getpid():
        return owner["nonce"] in _held
    try:
        process = psutil.Process(owner["pid"])
        same = abs(process.create_time() - owner["started"]) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _lost(method: str, number: int) -> PromotionError:
    return PromotionError(
        found=f"promotion-{method}-{number} was ended by another process while this one stood still",
        allowed=f"a decision within {LEASE_SECONDS:.0f} s of its claim",
        fix=f"`lexiseg history {method}` says what is decided; then repeat it",
    )
