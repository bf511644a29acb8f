"""Promotion and rollback on a real registry. Each gate is made to fail alone, and says by how much."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.registered import without_processes
from helpers.working_tree import SOURCE, change
from typer.testing import CliRunner

from lexiseg import cli
from lexiseg.cli import app
from lexiseg.data.adapters import ADAPTERS
from lexiseg.errors import PromotionError, TrackingError
from lexiseg.evaluation.image_counts import ImageCounts
from lexiseg.methods import resolve
from lexiseg.methods.lseg import checkpoint as lseg_checkpoint
from lexiseg.methods.stego import checkpoint as stego_checkpoint
from lexiseg.methods.tcl import checkpoint as tcl_checkpoint
from lexiseg.promotion import gates, promote
from lexiseg.promotion.candidate import Candidate, Scores, read_candidate, recorded_scores
from lexiseg.promotion.measuring import measure_again
from lexiseg.promotion.promote import decide, examine, read_card, read_history, retire, rollback, who_asks
from lexiseg.promotion.story import faults, story_lines
from lexiseg.stages.settings import parse_settings, read_values
from lexiseg.storage import read_json
from lexiseg.tracking import claims
from lexiseg.tracking.publish import publish_run
from lexiseg.tracking.registry import publish_model
from lexiseg.tracking.store import connect
from lexiseg.tracking.sync import gather, sync

ASKED = {"by": "ann", "host": "here", "through": "a test"}
LICENCES = {
    name: resolve(reference).licence
    for name, reference in ADAPTERS.items()
    if name not in ("world", "folder") and isinstance(resolve(reference).licence, str)
} | {f"weights of {module.__name__}": module.LICENCE for module in (lseg_checkpoint, stego_checkpoint, tcl_checkpoint)}
GATES = ["validation", "licences", "signature", "loads", "latency", "memory", "evaluated", "floors", "comparable"]
GATES += ["difference"]


def quiet(_: str) -> None:
    pass


@pytest.fixture
def quick(monkeypatch):
    """No processes: what they would say is known."""
    without_processes(monkeypatch)


def promoted(root, version=None):
    return decide(root, examine(root, "lseg", version=version, say=quiet), asked=ASKED).decision


def test_the_first_a_better_and_a_worse_one(registry, tree, monkeypatch):
    """The first is measured by real processes on real pictures."""
    registry.add(0.6)
    first = examine(tree, "lseg", say=quiet)
    assert [gate.name for gate in first.gates] == GATES
    assert first.passed, first.reason
    assert first.evidence["costs"]["latency"] > 0
    assert first.evidence["costs"]["memory"] > 50
    assert first.evidence["threads"] == 1
    assert first.evidence["data_digest"] == first.candidate.data_digest
    entry = decide(tree, first, asked=ASKED)
    assert (entry.decision.outcome, entry.decision.before, entry.decision.after) == ("promoted", None, "1")
    assert "there was no production model" in entry.decision.reason

    without_processes(monkeypatch)
    registry.add(0.8)
    second = examine(tree, "lseg", say=quiet)
    assert second.passed, second.reason
    measured = second.evidence["difference"]
    assert 0 < measured["low"] < measured["estimate"] < measured["high"]
    assert decide(tree, second, asked=ASKED).decision.after == "2"

    registry.add(0.7)
    worse = promoted(tree)
    assert (worse.outcome, worse.version, worse.after) == ("refused", "3", "2")
    assert re.search(r"difference: -\d+\.\d+ points of mIoU to version 2", worse.reason)
    aliases = connect(tree).client.get_registered_model("lexiseg-lseg").aliases
    assert {name: str(number) for name, number in aliases.items()} == {"challenger": "3", "production": "2"}


def licence(card: dict[str, Any]) -> None:
    card["licences"]["data"] = "CC BY-NC 4.0"


def unknown_licence(card: dict[str, Any]) -> None:
    card["licences"]["backbone"] = None


def invalid(card: dict[str, Any]) -> None:
    card["data"]["validation"] = {"success": False, "expectations": 20, "failed": ["readable"]}


def unsaid(card: dict[str, Any]) -> None:
    del card["data"]["validation"]


def other_data(card: dict[str, Any]) -> None:
    card["data"]["content_digest"] = "e" * 64


def other_protocol(card: dict[str, Any]) -> None:
    card["protocol"] = {"name": "world", "hash": "f" * 64, "card": {**card["protocol"]["card"], "label_set": "seen"}}


@pytest.mark.parametrize(
    ("gate", "settings", "card", "says"),
    [
        ("validation", {}, invalid, "not passed, 20 expectations; failed: readable"),
        ("validation", {}, unsaid, "nothing about the validation"),
        ("licences", {}, licence, "data is 'CC BY-NC 4.0'"),
        ("licences", {}, unknown_licence, "that of backbone is unknown"),
        ("latency", {"latency": 15.5}, None, "40.0 ms per picture, 24.5 too much"),
        ("memory", {"memory": 850.0}, None, "900.0 MB, 50.0 too much"),
        ("signature", {}, {"signature": "inputs are a, not b"}, "inputs are a, not b"),
        ("loads", {}, {"fault": "the answer to 2 picture(s) has 1 row(s)"}, "has 1 row"),
        ("floors", {"floors": {"lseg": {"miou": 0.99}}}, None, r"miou \d\d\.\d is \d+\.\d below 99\.0"),
        ("floors", {"floors": {"lseg": {"boundary_f": 0.1}}}, None, "there is no boundary_f"),
        ("floors", {"class_floors": {"lseg": {"sky": 1.0}}}, None, r"IoU of sky \d\d\.\d is \d+\.\d below 100\.0"),
        ("comparable", {}, other_protocol, "other protocols: label_set seen and all"),
        ("difference", {"margin": 0.5}, None, r"its lower end is \d+\.\d\d short"),
    ],
)
def test_each_gate_refuses_alone(registry, tree, quick, monkeypatch, gate, settings, card, says):
    """`card` changes the version's card, or is what a process would say that loads it."""
    registry.add(0.6)
    assert promoted(tree).outcome == "promoted"
    if isinstance(card, dict):
        said = {"fault": None, "signature": None} | card
        monkeypatch.setattr(promote, "check_loading", lambda candidate: said)
    registry.add(0.8, change=None if isinstance(card, dict) else card)
    change(tree / "params.yaml", {"promotion": settings})
    found = examine(tree, "lseg", say=quiet)
    failed = [one for one in found.gates if not one.passed]
    assert [one.name for one in failed] == [gate]
    assert re.search(says, failed[0].found), failed[0].found
    assert failed[0].fix
    decision = decide(tree, found, asked=ASKED).decision
    assert (decision.outcome, decision.after) == ("refused", "1")
    assert gate in decision.reason


def test_scores_that_were_not_recorded_by_picture(registry, tree, quick):
    """They are measured here and now, where the data is here."""
    change(tree / "params.yaml", {"promotion": {"floors": {"lseg": {"miou": 0.0}}}})
    registry.add(0.6, recorded=False)
    found = examine(tree, "lseg", say=quiet)
    assert found.passed
    assert next(one.found for one in found.gates if one.name == "evaluated").startswith(
        "4 pictures (evaluated again, on"
    )
    (tree / "outputs/prepare/info.json").unlink()
    found = examine(tree, "lseg", say=quiet)
    assert [one.name for one in found.gates if not one.passed] == ["evaluated"]


def test_the_counts_of_another_model_are_not_taken(registry, tree, quick):
    """A run is known by settings, data and code: a training repeated elsewhere has the same run, and other weights."""

    def worse(card):
        card["metrics"]["test"]["miou"] = 0.1

    change(tree / "params.yaml", {"promotion": {"floors": {"lseg": {"miou": 0.0}}}})
    registry.add(0.6)
    promoted(tree)
    registry.add(0.9, change=worse)
    found = examine(tree, "lseg", say=quiet)
    assert "evaluated again" in next(one.found for one in found.gates if one.name == "evaluated")
    assert not found.passed


def test_few_pictures_are_not_enough(registry, tree, quick):
    registry.add(0.6)
    promoted(tree)
    registry.add(0.9)
    change(tree / "params.yaml", {"promotion": {"least_pictures": 61}})
    assert promoted(tree).reason == "comparable: 60 pictures, of at least 61"


def test_an_alias_that_others_removed_does_not_switch_the_comparison_off(registry, tree, quick):
    registry.add(0.8)
    promoted(tree)
    registry.add(0.6)
    connect(tree).client.delete_registered_model_alias("lexiseg-lseg", "production")
    with pytest.raises(PromotionError, match="decision 1 left version 1: the alias was removed by other hands"):
        examine(tree, "lseg", say=quiet)
    assert rollback(tree, "lseg", to="1", asked=ASKED).decision.after == "1"
    assert promoted(tree).outcome == "refused"
    assert faults(read_history(tree, "lseg")) == ["before decision 2, other hands had made no version production"]


def test_a_production_version_that_others_deleted_does_not_either(registry, tree, quick):
    registry.add(0.8)
    promoted(tree)
    connect(tree).client.delete_model_version("lexiseg-lseg", "1")
    registry.add(0.6)
    with pytest.raises(PromotionError, match="decision 1 left version 1: it was deleted by other hands"):
        examine(tree, "lseg", say=quiet)
    gone = retire(tree, "lseg", asked=ASKED, reason="it was deleted")
    assert (gone.decision.version, gone.decision.after, gone.carried_out) == ("1", None, "yes")
    assert promoted(tree).outcome == "promoted"
    assert read_history(tree, "lseg").production == "2"


def test_what_is_not_the_same_is_not_compared():
    """Data, classes, and labels of the same pictures."""
    counts = ImageCounts(("a", "b"), ("sky", "grass"), np.ones((2, 2), int), np.ones((2, 2), int), np.ones((2, 2), int))
    ours = Scores({"hash": "f", "card": {}}, "d" * 64, counts, {}, "recorded")

    def said(**changed: Any) -> list[str]:
        return gates.differences(ours, replace(ours, **changed), same_inference=True)

    assert said() == []
    assert said(data_digest="e" * 64) == [f"other data: {'d' * 12} and {'e' * 12}"]
    assert said(counts=replace(counts, classes=("sky", "water", "brick"))) == ["other classes: 2 and 3"]
    assert said(counts=replace(counts, true=counts.true + 1)) == ["other labels of the same pictures"]


def test_what_cannot_be_compared_is_retired(registry, tree, quick):
    with pytest.raises(PromotionError, match="no production model"):
        retire(tree, "lseg", asked=ASKED, reason="none")
    registry.add(0.8)
    promoted(tree)
    registry.add(0.6, change=other_protocol)
    assert promoted(tree).outcome == "refused"
    gone = retire(tree, "lseg", asked=ASKED, reason="other clusters")
    assert (gone.decision.after, gone.carried_out, gone.decision.version) == (None, "yes", "1")
    assert promoted(tree).outcome == "promoted"
    found = read_history(tree, "lseg")
    assert (found.production, faults(found)) == ("2", [])
    assert "retired version 1, nothing is production" in "\n".join(story_lines(found))
    assert rollback(tree, "lseg", asked=ASKED).decision.after == "1"


def test_a_version_that_is_deleted_while_it_is_examined(registry, tree, quick):
    registry.add(0.5)
    registry.add(0.8)
    found = examine(tree, "lseg", say=quiet)
    connect(tree).client.delete_model_version("lexiseg-lseg", "2")
    decision = decide(tree, found, asked=ASKED).decision
    assert (decision.outcome, decision.reason) == ("refused", "version 2 was deleted after it was examined")


def test_a_damaged_production_model_is_told_of(registry, tree, quick):
    version = registry.add(0.5)
    promoted(tree)
    next(registry.files(version).glob("artifacts/*/card.json")).unlink()
    registry.add(0.8)
    assert "production, version 1, is damaged: " in promoted(tree).reason


def test_two_decide_at_once_on_what_was_measured_before(registry, tree, quick):
    registry.add(0.5)
    promoted(tree)
    found = {}
    for skill in (0.8, 0.9):
        version = registry.add(skill)
        found[version] = examine(tree, "lseg", version=version, say=quiet)
    done: dict[str, Any] = {}

    def ask(version: str) -> None:
        done[version] = decide(tree, found[version], asked=ASKED).decision

    threads = [threading.Thread(target=ask, args=(version,)) for version in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    (winner,) = [one for one in done.values() if one.outcome == "promoted"]
    (loser,) = [one for one in done.values() if one.outcome == "refused"]
    assert read_history(tree, "lseg").production == winner.version
    assert f"production became version {winner.version} by decision {winner.number} while" in loser.reason


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("Apache-2.0 (rendered by lexiseg)", True),
        ("MIT", True),
        ("CC0; whether now known or unknown", True),
        ("Academic Free License 3.0", True),
        ("trained here on the captions of the data set; the licence of those captions applies", True),
        *((text, False) for text in sorted({*LICENCES.values()})),
        *((text, False) for text in ("CC_BY_NC_4.0", "research-only", "for research purposes only", "n/a", "", None)),
        *((text, False) for text in ("non–commercial", "not for commercial use", "evaluation only", "Unknown")),
    ],
)
def test_licences_that_occur(tmp_path, text, passes):
    assert licences_of(tmp_path, {"licences": {"data": text, "code": "Apache-2.0"}}).passed is passes


def test_the_licence_of_imported_weights_counts(tmp_path):
    card = {"licences": {"code": "Apache-2.0"}, "imported": {"file": "x", "licence": "CC BY-NC 4.0"}}
    assert licences_of(tmp_path, card).found == "imported weights is 'CC BY-NC 4.0'"


def licences_of(folder: Path, card: dict[str, Any]) -> gates.Gate:
    candidate = Candidate(method="lseg", version="1", run_id="1", tags={}, folder=folder, pyfunc=folder, card=card)
    return gates.licences(candidate, parse_settings(read_values(SOURCE)).promotion)


def test_a_damaged_version_and_one_of_another_signature(registry, tree):
    """Real processes look at real files."""
    version = registry.add(0.6)
    weights = next(registry.files(version).glob("artifacts/*/model.safetensors"))
    whole = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(whole[: len(whole) // 2])
    found = examine(tree, "lseg", say=quiet)
    failed = {one.name: one.found for one in found.gates if not one.passed}
    assert "ModelError" in failed.pop("loads")
    # A model that cannot be loaded has no latency either.
    assert set(failed) == {"latency", "memory"}
    assert all("not measured" in text for text in failed.values())

    weights.write_bytes(whole)
    described = registry.files(version) / "MLmodel"
    text = described.read_text()
    described.write_text(text.replace('"name": "segments"', '"name": "regions"'))
    assert described.read_text() != text
    found = examine(tree, "lseg", say=quiet)
    (failed_gate,) = [one for one in found.gates if not one.passed]
    assert failed_gate.name == "signature"
    assert "regions" in failed_gate.found


def test_research_may_use_what_is_not_for_sale(registry, tree, quick):
    registry.add(0.6, change=licence)
    change(tree / "params.yaml", {"promotion": {"use": "research"}})
    assert promoted(tree).outcome == "promoted"


def test_how_a_model_predicts_may_be_its_own(registry, tree, quick):
    def flips(card):
        card["protocol"] = {"name": "world", "hash": "f" * 64, "card": {**card["protocol"]["card"], "flips": True}}

    registry.add(0.6)
    promoted(tree)
    registry.add(0.8, change=flips)
    assert "other protocols: flips True and False" in promoted(tree).reason
    change(tree / "params.yaml", {"promotion": {"same_inference": False}})
    assert promoted(tree).outcome == "promoted"


def test_a_model_that_is_surely_not_worse_may_be_let_in(registry, tree, quick):
    registry.add(0.7)
    promoted(tree)
    registry.add(0.7)
    assert promoted(tree).outcome == "refused"
    change(tree / "params.yaml", {"promotion": {"margin": -0.05}})
    assert promoted(tree).outcome == "promoted"


@pytest.mark.parametrize("what", ["pictures", "labels"])
def test_other_pictures_or_labels_are_not_compared(registry, tree, quick, what):
    registry.add(0.6)
    promoted(tree)
    counts = registry.counts(0.8)
    if what == "pictures":
        counts = counts.ordered(counts.ids[:50])
    else:
        counts = ImageCounts(counts.ids, counts.classes, counts.intersection, counts.true + 1, counts.predicted)
    registry.add(0.8, counts=counts)
    decision = promoted(tree)
    # Production is evaluated on what this checkout holds, which is neither.
    assert "comparable: other pictures: " in decision.reason
    assert decision.outcome == "refused"


@pytest.mark.parametrize("method", ["lseg", "tcl", "stego"])
def test_measured_again_is_what_was_recorded(tree, method):
    sync(tree)
    candidate = read_candidate(tree, method, "@challenger")
    recorded, again = recorded_scores(connect(tree), candidate, "test"), measure_again(tree, candidate, "test")
    assert recorded is not None
    assert again.protocol == recorded.protocol
    assert again.data_digest == recorded.data_digest
    assert again.metrics == pytest.approx(recorded.metrics, rel=1e-5)  # other numbers of threads, other last bits
    assert (again.counts.ids, again.counts.classes) == (recorded.counts.ids, recorded.counts.classes)
    for name in ("intersection", "true", "predicted"):
        assert (getattr(again.counts, name) == getattr(recorded.counts, name)).all()


def test_production_of_other_data_is_evaluated_again(registry, tree, quick):
    """Its weights are those of the challenger, so it scores the same, whatever was recorded of it."""
    change(tree / "params.yaml", {"promotion": {"floors": {"lseg": {"miou": 0.0}}}})
    change(tree / "params.yaml", {"promotion": {"least_pictures": 4}})
    registry.add(0.9, change=other_data)
    promoted(tree)
    (record,) = [record for record in gather(tree) if record.method == "lseg"]
    store = connect(tree)
    publish_model(store, record, publish_run(store, record)[0])
    found = examine(tree, "lseg", say=quiet)
    assert "production was evaluated again" in next(one.found for one in found.gates if one.name == "comparable")
    measured = found.evidence["difference"]
    assert (measured["low"], measured["estimate"], measured["high"]) == (0.0, 0.0, 0.0)
    assert found.evidence["production_measured"] == "again"
    # Without the prepared data there is nothing to measure on.
    (tree / "outputs/prepare/info.json").unlink()
    found = examine(tree, "lseg", say=quiet)
    (failed,) = [one for one in found.gates if not one.passed]
    assert failed.name == "comparable"
    assert "could not be evaluated" in failed.found


def test_rolls_back_and_tells_the_story(registry, tree, quick):
    for skill in (0.5, 0.65, 0.8):
        registry.add(skill)
        assert promoted(tree).outcome == "promoted"
    registry.add(0.4)
    assert promoted(tree).outcome == "refused"
    back = rollback(tree, "lseg", asked=ASKED, reason="loses the signs").decision
    assert (back.outcome, back.before, back.after, back.reason) == ("rolled back", "3", "2", "loses the signs")
    # What was rolled back from is not gone back to.
    assert rollback(tree, "lseg", asked=ASKED).decision.after == "1"
    with pytest.raises(PromotionError, match=r"no way back from version 1\n.*before: 2, 3"):
        rollback(tree, "lseg", asked=ASKED)
    assert rollback(tree, "lseg", to="3", asked=ASKED).decision.after == "3"
    with pytest.raises(PromotionError, match="to version 4"):
        rollback(tree, "lseg", to="4", asked=ASKED)
    found = read_history(tree, "lseg")
    assert found.production == "3"
    assert faults(found) == []
    text = "\n".join(story_lines(found))
    for said in (
        "1  20",
        "promoted version 1 (before: nothing), asked by ann (a test)",
        "refused version 4 (production stayed version 3)",
        "rolled back to version 2 (before: version 3)",
        "loses the signs",
        "lseg: version 3 is production",
    ):
        assert said in text, text


def test_history_tells_of_what_was_altered_removed_and_moved(registry, tree, quick):
    for skill in (0.5, 0.65, 0.8):
        registry.add(skill)
        promoted(tree)
    store = connect(tree)
    first, second, third = read_history(tree, "lseg").entries
    altered = replace(second.decision, asked={"by": "nobody"})
    store.client.set_tag(second.run_id, "lexiseg.decision", altered.to_text())
    store.client.set_tag(third.run_id, "lexiseg.decision", "{")
    store.client.set_registered_model_alias("lexiseg-lseg", "production", "1")
    found = faults(read_history(tree, "lseg"))
    assert found[:2] == ["the record of decision 2 was altered", "the record of decision 3 was altered"]
    # What is deleted on MLflow's pages is still read.
    store.client.set_tag(second.run_id, "lexiseg.decision", second.decision.to_text())
    store.client.set_tag(third.run_id, "lexiseg.decision", third.decision.to_text())
    store.client.delete_run(first.run_id)
    experiment = store.client.get_experiment_by_name("lexiseg-promotions")
    assert experiment is not None
    store.client.delete_experiment(experiment.experiment_id)
    found = read_history(tree, "lseg")
    assert [entry.decision.number for entry in found.entries] == [1, 2, 3]
    assert faults(found) == [
        "version 1 is production, and the last decision left version 3: the alias was moved by other hands"
    ]


def test_an_alias_that_others_moved_meanwhile(registry, tree, quick):
    registry.add(0.5)
    promoted(tree)
    registry.add(0.8)
    found = examine(tree, "lseg", say=quiet)
    registry.add(0.6)
    connect(tree).client.set_registered_model_alias("lexiseg-lseg", "production", "3")
    decision = decide(tree, found, asked=ASKED).decision
    assert (decision.outcome, decision.after) == ("refused", "3")
    assert "production became version 3 while this version was measured against version 1" in decision.reason


def test_a_refusal_by_a_human_is_kept(registry, tree, quick):
    registry.add(0.5)
    found = examine(tree, "lseg", say=quiet)
    decision = decide(tree, found, asked=ASKED, approval="not approved by bob: holidays").decision
    assert (decision.outcome, decision.reason) == ("refused", "not approved by bob: holidays")
    assert "refused version 1 (still nothing is production)" in story_lines(read_history(tree, "lseg"))[0]


def test_looks_at_the_same_labels_are_counted(registry, tree, quick):
    for skill in (0.5, 0.4, 0.4):
        registry.add(skill)
        promoted(tree)
    entries = read_history(tree, "lseg").entries
    assert [entry.decision.evidence["earlier_looks"] for entry in entries] == [0, 1, 2]


def test_what_cannot_be_asked(registry, tree, quick):
    with pytest.raises(PromotionError, match="no method 'unet'"):
        examine(tree, "unet", say=quiet)
    with pytest.raises(TrackingError, match="no registered model"):
        examine(tree, "lseg", say=quiet)
    with pytest.raises(PromotionError, match="no way back from no version"):
        rollback(tree, "lseg", asked=ASKED)
    registry.add(0.5)
    with pytest.raises(TrackingError, match="has no version 7"):
        examine(tree, "lseg", version="7", say=quiet)
    promoted(tree)
    with pytest.raises(PromotionError, match="version 1 of lseg is production already"):
        examine(tree, "lseg", say=quiet)
    assert story_lines(read_history(tree, "tcl")) == ["tcl: nothing was decided yet, no version is production"]


def test_the_card_of_a_version(registry, tree):
    params = {"seed": "0", "steps": "3"}

    def stressed(card: dict[str, Any]) -> None:
        card["metrics"] = {"test": {"miou": 0.6}, "stress": {"miou": 0.25}}

    registry.add(0.6, params=params, change=stressed)
    registry.add(0.7, params=params | {"seed": "1"})
    registry.add(0.7, params=params | {"seed": "2", "steps": "4"})
    text = read_card(tree, "lseg", version="1")
    assert text.startswith("# lexiseg-lseg, version 1\n")
    for said in (
        "- validation: passed (",
        "- labelled in training: sky, grass",
        "- never labelled in training: water",
        "| test | this version | mean and deviation over 2 seed(s) |",
        "## Limits",
        "- on pictures that look unlike those of training (split stress) mIoU is 25.0 instead of 60.0",
        "- worst classes on test (IoU): ",
        "- data: Apache-2.0 (rendered by lexiseg)",
        "lexiseg serve models:/lexiseg-lseg/1",
    ):
        assert said in text, text
    described = connect(tree).client.get_model_version("lexiseg-lseg", "3").description
    assert described is not None
    assert described.startswith("# lexiseg-lseg, version 3\n")
    assert "over 1 seed(s)" in described

    def wordy(card: dict[str, Any]) -> None:
        card["licences"] |= {f"part {number}": "word " * 50 for number in range(30)}

    registry.add(0.7, change=wordy)
    described = connect(tree).client.get_model_version("lexiseg-lseg", "4").description
    assert described is not None
    assert len(described) == 5000
    assert described.endswith("\n… all of it: `lexiseg card lseg --version 4`")


def test_a_record_too_long_for_mlflow_is_shortened(registry, tree, quick):
    floors = {f"class number {number} with a long name": 0.9 for number in range(200)}
    change(tree / "params.yaml", {"promotion": {"class_floors": {"lseg": floors}}})
    registry.add(0.5)
    decision = promoted(tree)
    assert decision.outcome == "refused"
    assert len(decision.to_text()) <= 8000
    assert faults(read_history(tree, "lseg")) == []


def test_who_asks_is_the_user_that_mlflow_knows(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    assert who_asks("lexiseg promote")["by"] == "ann"


def test_the_numbers_of_a_decision_can_be_compared(registry, tree, quick):
    registry.add(0.5)
    promoted(tree)
    registry.add(0.8)
    promoted(tree)
    store = connect(tree)
    entry = read_history(tree, "lseg").entries[-1]
    run = store.client.get_run(entry.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["difference/estimate"] == entry.decision.evidence["difference"]["estimate"]
    assert run.data.metrics["costs/latency"] == 40.0
    assert "| difference | passed |" in run.data.tags["mlflow.note.content"]


def test_register_notes_the_validation(tree):
    card = read_json(tree / "outputs/lseg/register/card.json")
    said = read_json(tree / "outputs/validate/validation.json")
    assert card["data"]["validation"]["success"] is True
    assert card["data"]["validation"]["expectations"] == len(said["expectations"])


@pytest.mark.parametrize("arguments", [["promote", "lseg"], ["promote", "lseg", "--to", "staging"]])
def test_there_are_gates_for_production_alone(arguments):
    found = CliRunner().invoke(app, arguments).exception
    assert isinstance(found, PromotionError)
    assert found.allowed == "--to production"


def test_the_commands_say_what_they_decide(registry, tree, quick, monkeypatch):
    monkeypatch.setattr(cli, "_use_working_tree", lambda root: None)  # it would start this process anew

    def lexiseg(*arguments: str) -> tuple[int, str]:
        found = CliRunner().invoke(app, arguments)
        return found.exit_code, found.output

    registry.add(0.5)
    assert lexiseg("promote", "lseg", "--to", "production", "--check")[0] == 0
    assert lexiseg("history", "lseg")[1] == "lseg: nothing was decided yet, no version is production\n"
    code, said = lexiseg("promote", "lseg", "--to", "production")
    assert code == 0
    assert "passed  floors: miou " in said
    assert "promoted version 1: passed all 10 gates" in said
    registry.add(0.3)
    code, said = lexiseg("promote", "lseg", "--to", "production")
    assert code == 1
    assert "FAILED  difference: -" in said
    assert "allowed: a lower end above 0 points of mIoU" in said
    told = json.loads(lexiseg("history", "lseg", "--json")[1])
    assert [one["outcome"] for one in told["decisions"]] == ["promoted", "refused"]
    assert "# lexiseg-lseg, version 2" in lexiseg("card", "lseg")[1]
    said = lexiseg("retire", "lseg", "--reason", "a test")
    assert said == (0, "retired version 1; no version of lseg is production\n")
    registry.add(0.5)
    assert lexiseg("promote", "lseg", "--to", "production")[0] == 0
    monkeypatch.setattr(claims, "carry_out", lambda *_: "no: the alias was moved")
    code, said = lexiseg("retire", "lseg", "--reason", "a test")
    assert code == 1
    assert "version 3 was not retired: no: the alias was moved" in said
