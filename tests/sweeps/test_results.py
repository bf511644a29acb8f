from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from lexiseg.errors import SettingsError
from lexiseg.sweeps.pictures import _round_values, write_pictures
from lexiseg.sweeps.publish import trials_csv
from lexiseg.sweeps.results import (
    best_trials,
    chosen_trial,
    gain_line,
    settings_of,
    study_json,
    study_lines,
    trial_line,
)
from lexiseg.sweeps.study import add_slots, claim, create_study, open_storage

DEFINITION: dict[str, Any] = {
    "method": "tcl",
    "space": "custom",
    "knobs": ["tcl.loss.area=0.1..1,log", "tcl.loss.image=0.01..1,log"],
    "fixed": {"tcl.train.steps": 7},
    "split": "val",
    "objectives": ["miou:max"],
    "constraints": [],
    "pruner": "none",
    "seed": 0,
    "settings": {},
    "inputs": {},
}
AREA, IMAGE = "tcl.loss.area", "tcl.loss.image"


def study_of(folder: Path, *, directions: tuple[str, ...] = ("maximize",), **changes: Any) -> optuna.Study:
    storage = open_storage(f"sqlite:///{folder / 'sweeps.db'}")
    return create_study(storage, "s", DEFINITION | changes, directions=list(directions))[0]


def end(study: optuna.Study, *values: float, state: TrialState = TrialState.COMPLETE, **attributes: Any) -> None:
    """The next trial of a study, ended."""
    trial = claim(study)
    assert trial is not None
    settings = {AREA: trial.suggest_float(AREA, 0.1, 1, log=True), IMAGE: trial.suggest_float(IMAGE, 0.01, 1, log=True)}
    for key, value in {"settings": settings, "seconds": 61.0, **attributes}.items():
        trial.set_user_attr(key, value)
    if state == TrialState.PRUNED:
        trial.report(values[0], 20)
        study.tell(trial, state=state)
    else:
        study.tell(trial, list(values) or None, state=state)


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    study = study_of(tmp_path)
    add_slots(study, 5, first={AREA: 0.4, IMAGE: 0.1})
    end(study, 0.5, metrics={"miou": 0.5})
    end(study, 0.625)
    end(study, 0.25, state=TrialState.PRUNED)
    end(study, state=TrialState.FAIL, error="`miou` is nan")
    return study


def test_the_best_trial(study):
    assert [trial.user_attrs["slot"] for trial in best_trials(study)] == [1]
    assert chosen_trial(study).values == [0.625]
    assert chosen_trial(study, 0).values == [0.5]
    assert settings_of(chosen_trial(study, 0), DEFINITION) == {"tcl.train.steps": 7, AREA: 0.4, IMAGE: 0.1}
    assert gain_line(study) == "miou on val: 0.6250, with the settings as they were 0.5000 (+0.1250)"


@pytest.mark.parametrize("slot", [2, 3, 4, 9])
def test_a_trial_that_is_not_complete_cannot_be_chosen(study, slot):
    with pytest.raises(SettingsError) as error:
        chosen_trial(study, slot)
    assert error.value.allowed == "0, 1"


def test_a_study_without_a_result(tmp_path):
    study = study_of(tmp_path)
    assert "no trial yet" in study_lines(study)
    assert gain_line(study) is None
    assert write_pictures(study, tmp_path / "pictures") == []
    with pytest.raises(SettingsError, match="no complete trial that keeps to its constraints"):
        chosen_trial(study)


def test_lines_about_trials(study):
    complete, best, pruned, failed = (study.trials[number] for number in (0, 1, 2, 3))
    assert trial_line(study, complete) == "trial 0: miou 0.5000 in 1 m 1 s; best 0.6250, trial 1"
    assert trial_line(study, best) == "trial 1: miou 0.6250 in 1 m 1 s; the best so far"
    assert trial_line(study, pruned) == "trial 2: miou 0.2500 at 20 % of its training, pruned after 1 m 1 s"
    assert trial_line(study, failed) == "trial 3: failed after 1 m 1 s: `miou` is nan"


def test_a_study_as_a_table(study):
    lines = study_lines(study)
    assert lines[0] == "study s: tcl on val, space custom, miou as high as possible"
    assert lines[1] == "2 complete, 1 pruned, 1 failed, 1 waiting"
    assert lines[3].split() == ["trial", "state", "miou", "area", "image", "time"]
    assert lines[4].split() == ["0", "complete", "0.5000", "0.4", "0.1", "1", "m", "1", "s"]
    assert lines[5].startswith("1      complete *")
    assert lines[6].startswith("2      pruned at 20 %  0.2500")
    assert "trial 3 failed: `miou` is nan" in lines


def test_a_study_as_plain_values(study):
    found = study_json(study)
    assert [trial["state"] for trial in found["trials"]] == ["complete", "complete", "pruned", "failed", "waiting"]
    assert found["trials"][0]["metrics"] == {"miou": 0.5}
    assert found["trials"][2]["looked_at"] == {"20": 0.25}
    rows = trials_csv(study).splitlines()
    assert rows[0] == "trial,state,miou,tcl.loss.area,tcl.loss.image,seconds"
    assert rows[1] == "0,complete,0.5,0.4,0.1,61.0"
    assert len(rows) == 5  # what waits is not told of


def test_the_settings_as_they_were_count_where_all_of_them_are_in_the_space(tmp_path):
    study = study_of(tmp_path)
    add_slots(study, 2, first={AREA: 0.4})
    end(study, 0.5)
    end(study, 0.6)
    assert gain_line(study) is None


def test_several_goals_have_no_single_best(tmp_path):
    study = study_of(tmp_path, directions=("maximize", "minimize"), objectives=["miou:max", "latency:min"])
    add_slots(study, 5, first=None)
    for values in ((0.5, 10.0), (0.6, 20.0), (0.4, 15.0), (0.65, 40.0), (0.3, 5.0)):
        end(study, *values)
    assert {trial.user_attrs["slot"] for trial in best_trials(study)} == {0, 1, 3, 4}
    assert "* the best compromises" in study_lines(study)
    with pytest.raises(SettingsError, match="4 best compromises of 2 goals"):
        chosen_trial(study)
    assert chosen_trial(study, 2).values == [0.4, 15.0]
    made = {path.stem for path in write_pictures(study, tmp_path / "pictures")}
    assert {"front", "history_miou", "history_latency", "importance_latency", "contour_miou"} <= made


def test_pictures_of_a_study(study, tmp_path):
    made = write_pictures(study, tmp_path / "pictures")
    # Four complete trials are the least that importance can be told from.
    assert [path.stem for path in made] == ["history", "slice", "parallel_coordinate", "contour", "pruning"]
    add_slots(study, 7, first=None)
    for value in (0.3, 0.7, 0.4):
        end(study, value)
    assert "importance" in [path.stem for path in write_pictures(study, tmp_path / "pictures")]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)


@pytest.mark.parametrize(
    ("low", "high", "values"),
    [(0.008, 1.3, [0.01, 0.1, 1.0]), (0.1, 1.0, [0.1, 0.3, 1.0]), (0.29, 0.51, [0.3, 0.4, 0.5])],
)
def test_axes_have_a_few_round_values(low, high, values):
    assert _round_values(low, high) == pytest.approx(values)
