from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError, ProgrammingError

from lexiseg.errors import SettingsError, StorageError
from lexiseg.sweeps import study as module
from lexiseg.sweeps.study import (
    add_slots,
    claim,
    counts,
    create_study,
    give_back,
    heartbeats,
    load_study,
    open_storage,
    patiently,
    put_back,
    slots,
    storage_url,
    study_names,
)

DEFINITION = {"method": "tcl", "settings": {"seed": 0, "tcl.loss.area": 0.4}, "seed": 0}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'sweeps.db'}"


@pytest.fixture
def study(url: str) -> optuna.Study:
    return create_study(open_storage(url), "one", DEFINITION, directions=["maximize"])[0]


@pytest.fixture
def mortal_study(url: str) -> optuna.Study:
    """The same; a trial that is silent for seconds counts as dead, longer than a busy machine takes to look."""
    return create_study(open_storage(url, heartbeat=1, grace=4), "one", DEFINITION, directions=["maximize"])[0]


def in_state(study: optuna.Study, *states: TrialState) -> list[int]:
    return sorted(trial.user_attrs["slot"] for trial in study.get_trials(states=states))


def taken(study: optuna.Study) -> optuna.Trial:
    trial = claim(study)
    assert trial is not None
    return trial


@pytest.mark.parametrize("name", ["../x", "", "a b", ".hidden", "a/b"])
def test_a_name_that_is_none_for_a_folder(url, name):
    with pytest.raises(SettingsError, match="the study name"):
        create_study(open_storage(url), name, DEFINITION, directions=["maximize"])


def test_where_studies_are_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("LEXISEG_HOME", raising=False)
    assert storage_url(tmp_path, None) == f"sqlite:///{tmp_path}/.lexiseg/sweeps.db"
    assert storage_url(tmp_path, "postgresql://host/db") == "postgresql://host/db"
    assert storage_url(tmp_path, "sqlite:///mine.db") == f"sqlite:///{tmp_path}/mine.db"
    assert storage_url(tmp_path, "sqlite:////data/mine.db") == "sqlite:////data/mine.db"


def test_slots_are_queued_once_and_added(study):
    add_slots(study, 3, first={"a": 1.0})
    add_slots(study, 3, first={"a": 1.0})
    assert in_state(study, TrialState.WAITING) == [0, 1, 2]
    assert taken(study).suggest_float("a", 0, 2) == 1.0
    add_slots(study, 5, first={"a": 1.0})
    assert in_state(study, TrialState.WAITING) == [1, 2, 3, 4]
    add_slots(study, 2, first=None)  # fewer are not taken away
    assert in_state(study, TrialState.WAITING) == [1, 2, 3, 4]


def test_the_queue_ends(study):
    add_slots(study, 2, first=None)
    assert [taken(study).user_attrs["slot"] for _ in range(2)] == [0, 1]
    assert claim(study) is None
    assert {state: number for state, number in counts(study).items() if number} == {"running": 2}


def _add_all(url: str) -> None:
    add_slots(load_study(open_storage(url), "one"), 8, first=None)


def test_processes_that_queue_at_the_same_time_queue_once(study, url):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_add_all, args=(url,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert in_state(study, TrialState.WAITING) == list(range(8))


def _claim_all(url: str, found: list[int]) -> None:
    study = load_study(open_storage(url), "one")
    while trial := claim(study):
        found.append(trial.user_attrs["slot"])


def test_no_two_processes_get_the_same_trial(study, url):
    add_slots(study, 12, first=None)
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        found = manager.list()
        processes = [context.Process(target=_claim_all, args=(url, found)) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert sorted(found) == list(range(12))


def test_a_trial_whose_worker_died_is_queued_again_with_its_values(mortal_study):
    study = mortal_study
    add_slots(study, 1, first=None)
    trial = taken(study)
    value = trial.suggest_float("a", 0, 2)
    trial.report(0.5, 20)
    assert claim(study) is None
    time.sleep(5.5)  # its heart has stopped
    second = taken(study)
    assert second.user_attrs["slot"] == 0
    assert second.suggest_float("a", 0, 2) == value
    assert study.trials[second.number].intermediate_values == {20: 0.5}
    study.tell(second, 1.0)
    assert counts(study)["complete"] == 1
    assert len(study.trials) == 2


def test_a_trial_whose_heart_beats_is_left_alone(mortal_study):
    study = mortal_study
    add_slots(study, 1, first=None)
    trial = taken(study)
    with heartbeats(study, trial):
        time.sleep(6)
        assert claim(study) is None
    study.tell(trial, 1.0)


def test_a_trial_that_kills_its_workers_is_given_up(study):
    add_slots(study, 1, first=None)
    for _ in range(module.RETRIES + 1):
        taken(study).set_user_attr("worker", "w")
        assert give_back(study, worker="w") == 1
    assert claim(study) is None
    assert counts(study)["given up"] == 1
    # Somebody who starts the sweep again has more memory, perhaps.
    add_slots(study, 1, first=None)
    assert in_state(study, TrialState.WAITING) == [0]
    assert counts(study)["given up"] == 0


def test_only_what_a_worker_was_running_is_given_back(study):
    add_slots(study, 2, first=None)
    taken(study).set_user_attr("worker", "one")
    taken(study).set_user_attr("worker", "two")
    assert give_back(study, worker="one") == 1
    assert in_state(study, TrialState.WAITING) == [0]
    assert in_state(study, TrialState.RUNNING) == [1]


def test_a_trial_that_failed_by_itself_is_not_queued_again(study):
    add_slots(study, 1, first=None)
    trial = taken(study)
    trial.set_user_attr("error", "`miou` is nan")
    study.tell(trial, state=TrialState.FAIL)
    add_slots(study, 1, first=None)
    assert claim(study) is None
    assert counts(study)["failed"] == 1


def test_one_that_nobody_queued_again_is(study):
    add_slots(study, 1, first=None)
    study.tell(taken(study), state=TrialState.FAIL)  # and then the power went
    add_slots(study, 1, first=None)
    assert in_state(study, TrialState.WAITING) == [0]


def test_a_trial_that_is_not_finished_goes_back(study):
    add_slots(study, 1, first=None)
    trial = taken(study)
    value = trial.suggest_float("a", 0, 2)
    put_back(study, trial)
    put_back(study, trial)  # of what is no longer its own, a worker gives nothing back
    assert in_state(study, TrialState.WAITING) == [0]
    assert taken(study).suggest_float("a", 0, 2) == value


def test_a_slot_has_one_trial_however_often_it_was_queued(study):
    add_slots(study, 2, first=None)
    study.enqueue_trial({}, user_attrs={"slot": 0})
    first, second = taken(study), taken(study)
    assert [first.user_attrs["slot"], second.user_attrs["slot"]] == [0, 1]
    study.enqueue_trial({}, user_attrs={"slot": 1})
    study.tell(second, 2.0)
    assert claim(study) is None
    study.tell(first, 1.0)
    assert {slot: trial.values for slot, trial in slots(study).items()} == {0: [1.0], 1: [2.0]}
    assert counts(study)["complete"] == 2


def test_a_study_of_other_settings_is_another_study(study, url):
    storage = open_storage(url)
    found, new = create_study(storage, "one", DEFINITION, directions=["maximize"])
    assert (found.study_name, new) == ("one", False)
    other = DEFINITION | {"method": "lseg", "settings": {"seed": 1, "tcl.loss.area": 0.4}}
    with pytest.raises(SettingsError) as error:
        create_study(storage, "one", other, directions=["maximize"])
    assert "method: tcl there, lseg here" in error.value.found
    assert "settings: seed 0 -> 1" in error.value.found
    assert "tcl.loss.area" not in error.value.found
    assert "--study" in error.value.fix


def test_a_study_whose_maker_died_is_taken_over_and_one_of_others_is_not(url, monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.01)
    storage = open_storage(url)
    optuna.create_study(storage=storage, study_name="half", directions=["maximize"])
    found, new = create_study(storage, "half", DEFINITION, directions=["maximize"])
    assert (new, found.user_attrs["lexiseg"]) == (True, DEFINITION)
    foreign = optuna.create_study(storage=storage, study_name="foreign", directions=["maximize"])
    foreign.enqueue_trial({})
    with pytest.raises(SettingsError, match="the study `foreign` is another one"):
        create_study(storage, "foreign", DEFINITION, directions=["maximize"])


def test_studies_of_others_are_not_shown(study, url):
    storage = open_storage(url)
    optuna.create_study(storage=storage, study_name="foreign")
    assert study_names(storage) == ["one"]
    for name in ("foreign", "none"):
        with pytest.raises(SettingsError) as error:
            load_study(storage, name)
        assert f"no study `{name}`" in error.value.found
        assert error.value.allowed == "one"


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("postgresql://lexiseg:secret@127.0.0.1:1/lexiseg", "cannot be used"),
        ("nonsense", "nonsense"),
        ("oracle9://host/db", "oracle9"),
        ("sqlite:////proc/none/sweeps.db", "cannot be used"),
    ],
)
def test_a_storage_that_is_not_there(url, found):
    before = time.monotonic()
    with pytest.raises(StorageError) as error:
        open_storage(url)
    assert found in error.value.found
    assert "secret" not in str(error.value)
    assert "--storage" in error.value.fix
    assert time.monotonic() - before < 30


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "sweeps.db").write_text("no database\n" * 100)
    with pytest.raises(StorageError, match="cannot be used"):
        open_storage(f"sqlite:///{tmp_path / 'sweeps.db'}")


def away() -> OperationalError:
    return OperationalError("select", {}, Exception("server closed the connection"))


def test_a_storage_that_comes_back_is_waited_for(monkeypatch, capsys):
    monkeypatch.setattr(module, "PAUSE", 0.01)
    answers: list = [away(), StorageInternalError("wrapped"), 7]
    answers[1].__cause__ = away()

    def ask() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently(ask) == 7
    said = capsys.readouterr().err
    assert said.count("the storage is away (server closed the connection), waiting for it") == 1


def test_and_one_that_does_not_is_told_of(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.01)

    def ask() -> None:
        raise away()

    with pytest.raises(StorageError, match="did not answer for 0 s"):
        patiently(ask, patience=0.05)


def test_faults_of_another_kind_are_not_repeated():
    def ask() -> None:
        raise ProgrammingError("select", {}, Exception("no such column"))

    with pytest.raises(ProgrammingError):
        patiently(ask)
