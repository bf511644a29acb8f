"""Turns: one decision at a time, and nothing left undecided by who is killed at any point."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import pytest
from helpers.working_tree import SOURCE, environment
from mlflow.exceptions import MlflowException

from lexiseg.errors import PromotionError
from lexiseg.tracking import claims
from lexiseg.tracking.claims import OWNER, take_turn
from lexiseg.tracking.decisions import Decision, production_of, read_entries, write_decision
from lexiseg.tracking.store import connect

SAID = {"reason": "passed", "asked": {"by": "ann", "host": "here", "through": "a test"}}

# Takes a turn in a process of its own, which is killed at one point of it.
KILLED = """
import os, sys
from pathlib import Path
from lexiseg.tracking import claims, decisions
from lexiseg.tracking.store import connect

def die(*_, **__):
    os._exit(9)

after, root = sys.argv[1], Path(sys.argv[2])
store = connect(root)
if after == "the claim":
    claims.read_entries = lambda *_: die() if claims._experiments(store, "lseg") else []
elif after == "the record":
    claims.carry_out = die
elif after == "the alias":
    real = store.client.set_registered_model_alias
    store.client.set_registered_model_alias = lambda *a: (real(*a), die())
elif after == "carrying out":
    claims._settle = die
with claims.take_turn(store, "lseg") as turn:
    turn.make("promoted", version="2", after="2", reason="passed", asked={"by": "bob", "host": "h", "through": "t"})
"""


@pytest.fixture
def store(tree):
    """MLflow with two versions of a model, the first of them in production."""
    found = connect(tree.root)
    found.client.create_registered_model("lexiseg-lseg")
    for _ in range(2):
        found.client.create_model_version("lexiseg-lseg", source=str(tree.root / "outputs"))
    found.client.set_registered_model_alias("lexiseg-lseg", "production", "1")
    return found


def open_claims(store):
    return [one.name for one in claims._experiments(store, "lseg") if claims._is_open(one)]


def decisions(store):
    return [(entry.decision.number, entry.decision.outcome, entry.carried_out) for entry in read_entries(store, "lseg")]


def test_a_turn_decides_and_ends(store):
    with take_turn(store, "lseg") as turn:
        assert (turn.number, turn.production) == (1, "1")
        assert open_claims(store) == ["promotion-lseg-1"]
        entry = turn.make("promoted", version="2", after="2", **SAID)
    assert entry.carried_out == "yes"
    assert (production_of(store, "lseg"), open_claims(store)) == ("2", [])
    with take_turn(store, "lseg") as turn:
        assert turn.number == 2
        turn.make("refused", version="1", after="2", **SAID)
    first, second = read_entries(store, "lseg")
    assert second.decision.previous == first.decision.hash
    assert first.decision.hash == entry.decision.hash


@pytest.mark.parametrize(
    ("after", "expected", "production"),
    [
        ("the claim", (1, "void", "yes"), "1"),
        ("the record", (1, "promoted", "yes"), "2"),
        ("the alias", (1, "promoted", "yes"), "2"),
        ("carrying out", (1, "promoted", "yes"), "2"),
    ],
)
def test_who_is_killed_leaves_nothing_undecided(store, tree, after, expected, production):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, after, str(tree.root)],
        env=environment(tree.root) | {"PYTHONPATH": str(SOURCE / "src")},
        timeout=120,
    )
    assert done.returncode == 9
    assert open_claims(store) == ["promotion-lseg-1"]
    with take_turn(store, "lseg") as turn:
        assert (turn.number, turn.production) == (2, production)
        turn.make("refused", version="1", after=production, **SAID)
    assert decisions(store) == [expected, (2, "refused", "yes")]
    assert open_claims(store) == []
    assert all(store.client.get_run(entry.run_id).info.status == "FINISHED" for entry in read_entries(store, "lseg"))


def test_an_error_within_a_turn_leaves_it_void(store):
    with pytest.raises(ZeroDivisionError), take_turn(store, "lseg"):
        _ = 1 / 0
    assert decisions(store) == [(1, "void", "yes")]
    assert open_claims(store) == []
    assert production_of(store, "lseg") == "1"


def test_of_many_at_once_each_has_its_turn(store, tree):
    seen, faults = [], []

    def ask() -> None:
        try:
            own = connect(tree.root)
            with take_turn(own, "lseg") as turn:
                seen.append((turn.number, turn.production))
                better = turn.production == "1"
                turn.make("promoted" if better else "refused", version="2", after="2", **SAID)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not faults
    assert sorted(seen) == [(1, "1"), (2, "2"), (3, "2"), (4, "2")]
    assert [outcome for _, outcome, _ in decisions(store)] == ["promoted", "refused", "refused", "refused"]
    entries = read_entries(store, "lseg")
    assert [entry.decision.previous for entry in entries[1:]] == [entry.decision.hash for entry in entries[:-1]]


def test_the_number_after_a_decision_that_is_just_being_made_is_not_free(store, monkeypatch):
    """Somebody claims and writes while another one reads."""
    other, read = take_turn(store, "lseg"), claims.read_entries

    def meanwhile(*arguments):
        monkeypatch.setattr(claims, "read_entries", read)
        turn = other.__enter__()
        decision = Decision("lseg", turn.number, "promoted", "2", "1", "2", time=claims._now(), **SAID)
        write_decision(store, decision)
        return read(*arguments)

    monkeypatch.setattr(claims, "read_entries", meanwhile)
    monkeypatch.setattr(claims, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(PromotionError, match="promotion-lseg-1 has been under way"), take_turn(store, "lseg"):
        pass
    assert open_claims(store) == ["promotion-lseg-1"]
    other.__exit__(None, None, None)
    assert decisions(store) == [(1, "promoted", "yes")]
    assert (production_of(store, "lseg"), open_claims(store)) == ("2", [])


# Promotes version 2 where version 1 is production, when it is told to go.
AT_ONCE = """
import sys, time
from pathlib import Path
from lexiseg.tracking.claims import take_turn
from lexiseg.tracking.store import connect

root, name = Path(sys.argv[1]), sys.argv[2]
store = connect(root)
(root / f"ready-{name}").touch()
while not (root / "go").exists():
    time.sleep(0.01)
with take_turn(store, "lseg") as turn:
    outcome = "promoted" if turn.production == "1" else "refused"
    entry = turn.make(outcome, version=name, after=name if outcome == "promoted" else turn.production, reason="r",
                      asked={"by": name, "host": "h", "through": "t"})
print(turn.number, outcome, entry.carried_out)
"""


def test_of_several_processes_at_once_one_wins(store, tree):
    """One that was killed has left its claim."""
    store.client.create_model_version("lexiseg-lseg", source=str(tree.root / "outputs"))
    own = environment(tree.root) | {"PYTHONPATH": str(SOURCE / "src")}
    killed = subprocess.run([sys.executable, "-c", KILLED, "the claim", str(tree.root)], env=own, timeout=120)
    assert killed.returncode == 9
    names = ("2", "3")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", AT_ONCE, str(tree.root), name], env=own, stdout=subprocess.PIPE, text=True
        )
        for name in names
    ]
    deadline = time.monotonic() + 120
    while not all((tree.root / f"ready-{name}").exists() for name in names):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (tree.root / "go").touch()
    said = sorted(one.communicate(timeout=120)[0].strip() for one in running)
    assert said == ["2 promoted yes", "3 refused yes"]
    entries = read_entries(store, "lseg")
    assert [entry.decision.outcome for entry in entries] == ["void", "promoted", "refused"]
    assert production_of(store, "lseg") == entries[1].decision.after
    assert open_claims(store) == []


def test_an_experiment_of_such_a_name_is_no_claim(store):
    store.client.create_experiment("promotion-lseg-1")
    store.client.create_experiment("promotion-lseg-7")
    with take_turn(store, "lseg") as turn:
        assert turn.number == 8
        turn.make("refused", version="2", after="1", **SAID)
    assert decisions(store) == [(8, "refused", "yes")]


def foreign(store, *, machine="another machine"):
    owner = {"user": "bob", "host": "far", "machine": machine, "pid": 1, "started": 0.0}
    return store.client.create_experiment("promotion-lseg-1", tags={OWNER: json.dumps(owner)})


def test_a_claim_of_another_machine_is_waited_for_and_then_settled(store, monkeypatch):
    foreign(store)
    monkeypatch.setattr(claims, "PATIENCE_SECONDS", 0.0)
    with (
        pytest.raises(PromotionError, match=r"promotion-lseg-1 has been under way .* by process 1 on far"),
        take_turn(store, "lseg"),
    ):
        pass
    monkeypatch.setattr(claims, "LEASE_SECONDS", 0.0)
    with take_turn(store, "lseg") as turn:
        turn.make("refused", version="2", after="1", **SAID)
    assert decisions(store) == [(1, "void", "yes"), (2, "refused", "yes")]
    assert "process 1 on far ended before it had decided" in read_entries(store, "lseg")[0].decision.reason


def test_a_claim_that_only_its_owner_may_delete_is_ended_all_the_same(store, monkeypatch):
    class Forbidden(MlflowException):
        def get_http_status_code(self) -> int:
            return 403

    def refuse(_: str) -> None:
        raise Forbidden("Permission denied")

    foreign(store)
    monkeypatch.setattr(claims, "LEASE_SECONDS", 0.0)
    monkeypatch.setattr(store.client, "delete_experiment", refuse)
    with take_turn(store, "lseg") as turn:
        turn.make("refused", version="2", after="1", **SAID)
    assert open_claims(store) == []
    assert [number for number, _, _ in decisions(store)] == [1, 2]


def test_who_stood_still_for_too_long_decides_nothing(store, monkeypatch):
    with take_turn(store, "lseg") as slow:
        monkeypatch.setattr(claims, "_is_alive", lambda claim: False)
        with take_turn(store, "lseg") as quick:
            quick.make("refused", version="2", after="1", **SAID)
        with pytest.raises(PromotionError, match="ended by another process while this one stood still"):
            slow.make("promoted", version="2", after="2", **SAID)
    assert decisions(store) == [(1, "void", "yes"), (2, "refused", "yes")]
    assert production_of(store, "lseg") == "1"


def test_a_decision_that_others_overtook_is_not_carried_out(store, monkeypatch):
    """It was written, then its process died, and somebody set the alias by hand."""
    carry_out = claims.carry_out
    monkeypatch.setattr(claims, "carry_out", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), take_turn(store, "lseg") as turn:
        turn.make("promoted", version="2", after="2", **SAID)
    store.client.create_model_version("lexiseg-lseg", source="elsewhere")
    store.client.set_registered_model_alias("lexiseg-lseg", "production", "3")
    monkeypatch.setattr(claims, "carry_out", carry_out)
    monkeypatch.setattr(claims, "_is_alive", lambda claim: False)
    with take_turn(store, "lseg") as turn:
        turn.make("refused", version="2", after="3", **SAID)
    first = read_entries(store, "lseg")[0]
    assert first.carried_out == "no: production had become version 3 by other hands"
    assert production_of(store, "lseg") == "3"
