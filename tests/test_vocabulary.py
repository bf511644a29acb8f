import pickle

import pytest

from lexiseg.errors import DataError
from lexiseg.vocabulary import Vocabulary

WORDS = Vocabulary(
    names=("sky", "ring", "sea"),
    synonyms={"ring": ("hoop", "circle"), "sky": ()},
    seen=(True, False, True),
    things=(False, True, False),
)


def test_names_are_indexed_and_divided():
    assert len(WORDS) == 3
    assert WORDS.index("sea") == 2
    assert WORDS.seen_names == ("sky", "sea")
    assert WORDS.unseen_names == ("ring",)
    assert WORDS.words("ring") == ("ring", "hoop", "circle")
    assert WORDS.words("sky") == ("sky",)


def test_flags_have_defaults():
    plain = Vocabulary(names=("a", "b"))
    assert plain.seen == (True, True)
    assert plain.things == (False, False)
    assert plain.templates == ("{}",)


def test_a_data_set_without_classes():
    none = Vocabulary(names=())
    assert (len(none), none.seen, none.seen_names, none.unseen_names) == (0, (), (), ())
    assert Vocabulary.from_json(none.to_json()) == none
    assert none.hash not in (WORDS.hash, Vocabulary(names=("a",)).hash)
    with pytest.raises(DataError) as error:
        none.index("dog")
    assert error.value.allowed == "no name: the data set has no classes"
    with pytest.raises(DataError) as error:
        Vocabulary(names=(), seen=(True,))
    assert "1 `seen` flags for 0 names" in error.value.found


def test_what_needs_names_asks_for_them():
    WORDS.require_names(needed_by="LSeg", instead="leave it out")
    with pytest.raises(DataError) as error:
        Vocabulary(names=()).require_names(needed_by="LSeg", instead="leave it out")
    assert error.value.found == "LSeg on a data set without classes"
    assert error.value.allowed == "a data set with class names"
    assert error.value.fix == "list the classes in classes.txt of the raw data (docs/own-data.md), or leave it out"


def test_json_and_pickle_give_it_back():
    assert Vocabulary.from_json(WORDS.to_json()) == WORDS
    assert pickle.loads(pickle.dumps(WORDS)) == WORDS


def test_hash_depends_on_content_alone():
    again = Vocabulary.from_json(WORDS.to_json())
    assert again.hash == WORDS.hash
    assert len(WORDS.hash) == 64
    assert Vocabulary(names=("sky", "ring", "sea")).hash != WORDS.hash


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"names": ("a", "a")}, "repeated names ['a']"),
        ({"names": ("a", " ")}, "empty or padded names [' ']"),
        ({"names": ("a", "b"), "seen": (True,)}, "1 `seen` flags for 2 names"),
        ({"names": ("a", "b"), "things": (True,) * 3}, "3 `things` flags for 2 names"),
        ({"names": ("a",), "synonyms": {"b": ("c",)}}, "synonyms for unknown names ['b']"),
        ({"names": ("a", "b"), "synonyms": {"a": ("b",)}}, "the synonym `b` for both `b` and `a`"),
        ({"names": ("a", "b"), "synonyms": {"a": ("c",), "b": ("c",)}}, "the synonym `c` for both `a` and `b`"),
        ({"names": ("a",), "synonyms": {"a": ("",)}}, "an empty or padded synonym of `a`"),
        ({"names": ("a",), "templates": ("a photo",)}, "templates ['a photo']"),
    ],
)
def test_faults_are_named(arguments, found):
    with pytest.raises(DataError) as error:
        Vocabulary(**arguments)
    assert found in error.value.found
    assert "unique, non-empty names" in error.value.allowed
    assert "list of classes" in error.value.fix


def test_unknown_name():
    with pytest.raises(DataError) as error:
        WORDS.index("dog")
    assert error.value.found == "the class name `dog`"
    assert error.value.allowed == "one of sky, ring, sea"
    assert error.value.fix


@pytest.mark.parametrize("value", [{}, [], {"names": ["a"]}, None])
def test_json_of_something_else(value):
    with pytest.raises(DataError) as error:
        Vocabulary.from_json(value)
    assert "cannot be read" in error.value.found
    assert "dvc repro prepare" in error.value.fix
