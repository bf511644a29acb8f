from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from helpers.working_tree import SOURCE

from lexiseg.errors import SettingsError
from lexiseg.profiles import (
    BASE,
    differences,
    profile_names,
    render_profile,
    save_profile,
    unsaved_edits,
    use_profile,
)
from lexiseg.settings import override, read_yaml
from lexiseg.storage import write_text

TEXT = """\
# Settings.
profile: embedded   # which one
seed: 0             # of everything

data:
  name: world       # a folder
  splits: [a, b]    # of it
words: {}           # word -> other word
"""
OTHER = """\
profile: photos
data:
  name: photos
  splits: [c]
words:
  St. Pole: traffic light
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write_text(tmp_path / "params.yaml", TEXT)
    write_text(tmp_path / "profiles/embedded.yaml", TEXT)
    write_text(tmp_path / "profiles/photos.yaml", OTHER)
    return tmp_path


def edit(tree: Path, old: str, new: str) -> None:
    text = (tree / "params.yaml").read_text()
    assert old in text
    write_text(tree / "params.yaml", text.replace(old, new))


def test_the_default_comes_first(tree):
    write_text(tree / "profiles/a.yaml", "profile: a\n")
    assert profile_names(tree) == ["embedded", "a", "photos"]


def test_a_profile_is_the_default_and_what_it_changes(tree):
    use_profile(tree, "photos")
    assert read_yaml(tree / "params.yaml") == {
        "profile": "photos",
        "seed": 0,
        "data": {"name": "photos", "splits": ["c"]},
        "words": {"St. Pole": "traffic light"},
    }


def test_the_comments_of_the_default_stay(tree):
    use_profile(tree, "photos")
    text = (tree / "params.yaml").read_text()
    for comment in ("# Settings.", "# which one", "# of everything", "# a folder"):
        assert comment in text


def test_there_and_back_gives_the_text_of_the_default(tree):
    assert use_profile(tree, "photos") == "embedded"
    assert use_profile(tree, "embedded") == "photos"
    assert (tree / "params.yaml").read_text() == TEXT


def test_an_unknown_profile(tree):
    with pytest.raises(SettingsError) as caught:
        use_profile(tree, "../params")
    assert caught.value.found == "no profile `../params`"
    assert caught.value.allowed == "embedded, photos"
    assert "lexiseg profile list" in caught.value.fix
    assert (tree / "params.yaml").read_text() == TEXT


def test_unsaved_edits_are_not_overwritten(tree):
    edit(tree, "\nseed: 0 ", "\nseed: 7 ")
    edit(tree, "name: world", "name: mine")
    before = (tree / "params.yaml").read_text()
    with pytest.raises(SettingsError) as caught:
        use_profile(tree, "photos")
    assert caught.value.found == "params.yaml differs from its profile `embedded` in data.name, seed"
    assert "without unsaved edits" in caught.value.allowed
    assert "lexiseg profile save NAME" in caught.value.fix
    assert "--force drops them" in caught.value.fix
    assert (tree / "params.yaml").read_text() == before
    use_profile(tree, "photos", force=True)
    assert not unsaved_edits(tree)


def test_values_of_a_profile_that_nobody_has_are_unsaved(tree):
    edit(tree, "profile: embedded", "profile: lost")
    assert unsaved_edits(tree) == ["profile"]


def test_edits_of_comments_are_no_edits(tree):
    edit(tree, "# of everything", "# my remark")
    assert not unsaved_edits(tree)


def test_saved_edits_come_back(tree):
    use_profile(tree, "photos")
    edit(tree, "\nseed: 0 ", "\nseed: 7 ")
    wanted = {**read_yaml(tree / "params.yaml"), "profile": "mine"}
    assert save_profile(tree, "mine") == ["data.name", "data.splits", "profile", "seed", "words.St. Pole"]
    assert read_yaml(tree / "params.yaml") == wanted
    assert not unsaved_edits(tree)
    use_profile(tree, "embedded")
    use_profile(tree, "mine")
    assert read_yaml(tree / "params.yaml") == wanted
    saved = read_yaml(tree / "profiles/mine.yaml")
    assert saved == {**read_yaml(tree / "profiles/photos.yaml"), "profile": "mine", "seed": 7}


def test_more_changes_can_be_saved_with_it(tree):
    edit(tree, "\nseed: 0 ", "\nseed: 7 ")
    save_profile(tree, "mine", changes={"data": {"name": "street"}, "words": {}})
    wanted = {"profile": "mine", "seed": 7, "data": {"name": "street", "splits": ["a", "b"]}, "words": {}}
    assert read_yaml(tree / "params.yaml") == wanted
    assert not unsaved_edits(tree)


@pytest.mark.parametrize("name", ["photos", "embedded"])
def test_a_profile_is_not_overwritten(tree, name):
    edit(tree, "\nseed: 0 ", "\nseed: 7 ")
    before = (tree / f"profiles/{name}.yaml").read_text()
    with pytest.raises(SettingsError) as caught:
        save_profile(tree, name)
    assert caught.value.found == f"a profile `{name}` exists already"
    assert "choose another name" in caught.value.fix
    assert (tree / f"profiles/{name}.yaml").read_text() == before


@pytest.mark.parametrize("name", ["../outside", "a/b", "", "Mine", ".hidden"])
def test_a_profile_stays_in_its_folder(tree, name):
    with pytest.raises(SettingsError) as caught:
        save_profile(tree, name)
    assert f"the profile name `{name}`" in caught.value.found
    assert "small letters" in caught.value.allowed
    assert profile_names(tree) == ["embedded", "photos"]


def test_differences_are_named_by_dotted_keys():
    old = {"a": 1, "b": {"c": 1, "d": 2}, "gone": 3}
    new = {"a": 1, "b": {"c": 1, "d": 5}, "new": {"x": 1}}
    assert differences(old, new) == {"b.d": 5, "gone": None, "new": {"x": 1}}
    assert differences(old, old) == {}


@pytest.mark.parametrize("name", profile_names(SOURCE))
def test_the_profiles_of_the_repository_render_as_they_say(name):
    rendered = render_profile(SOURCE, name)
    base, changes = (read_yaml(SOURCE / "profiles" / f"{each}.yaml") for each in (BASE, name))
    (expected := override(base, changes))["profile"] = name
    path = SOURCE / "profiles" / f"{name}.yaml"
    assert changes["profile"] == name, f"{path} calls itself {changes['profile']}"
    assert not differences(expected, _read(rendered))


@pytest.mark.parametrize("name", profile_names(SOURCE))
def test_no_comment_of_the_default_is_lost(name):
    def comments(text: str) -> set[str]:
        return {line.strip() for line in re.findall(r"#.*", text)}

    default = (SOURCE / "profiles/embedded.yaml").read_text()
    lost = comments(default) - comments(render_profile(SOURCE, name))
    # Where a profile gives a list or block another form, what stood beside it goes with it.
    assert len(lost) <= 3, lost


def test_the_repository_can_go_through_all_its_profiles(tmp_path):
    shutil.copytree(SOURCE / "profiles", tmp_path / "profiles")
    shutil.copy(SOURCE / "profiles/embedded.yaml", tmp_path / "params.yaml")
    for name in [*profile_names(tmp_path), BASE]:
        use_profile(tmp_path, name)
        assert not unsaved_edits(tmp_path)
    assert (tmp_path / "params.yaml").read_bytes() == (SOURCE / "profiles/embedded.yaml").read_bytes()


def _read(text: str) -> dict:
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load(text)
