import pytest
import torch
from tokenizers import Tokenizer

from lexiseg.encoders.tokenizer import END, PADDING, START, UNKNOWN, WordTokenizer
from lexiseg.errors import ModelError

CAPTIONS = ["A ring on grass", "sky, over the grass!", "zebra"]


@pytest.fixture
def words():
    return WordTokenizer.from_captions(CAPTIONS, context_length=8)


def test_the_end_has_the_largest_id(words):
    # CLIP's text towers find the end of a text by argmax over the ids.
    ids = words.tokenizer.get_vocab()
    assert ids[END] == max(ids.values()) == words.vocab_size - 1
    assert [ids[PADDING], ids[UNKNOWN], ids[START]] == [0, 1, 2]
    for text in ["ring", "zebra zebra", "a ring on grass, over the zebra sky, a ring", "", "unheard"]:
        row = words([text])[0]
        assert int(row.argmax()) == int((row == ids[END]).nonzero()[0])


def test_start_words_end_padding(words):
    ids = words.tokenizer.get_vocab()
    row = words(["A ring"])[0]
    assert row.tolist() == [ids[START], ids["a"], ids["ring"], ids[END], 0, 0, 0, 0]
    assert row.dtype == torch.int64


def test_long_texts_are_cut_and_keep_their_end(words):
    ids = words.tokenizer.get_vocab()
    row = words(["ring " * 30])[0]
    assert row.tolist() == [ids[START], *[ids["ring"]] * 6, ids[END]]


def test_trimming_cuts_padding_alone(words):
    texts = ["grass", "a ring on grass"]
    trimmed = words(texts, trim=True)
    assert trimmed.shape == (2, 6)
    assert torch.equal(trimmed, words(texts)[:, :6])


def test_case_and_punctuation(words):
    assert torch.equal(words(["GRASS , over"]), words(["grass, over"]))
    assert not torch.equal(words(["grass over"]), words(["grass, over"]))


def test_unknown_words(words):
    assert words.unknown_words("a purple Ring, ünseen") == ["purple", "ünseen"]
    assert words.unknown_words("over the GRASS!") == []
    assert words(["purple"])[0, 1] == words.tokenizer.token_to_id(UNKNOWN)


def test_the_ids_depend_on_the_set_of_words_alone(words):
    again = WordTokenizer.from_captions([*reversed(CAPTIONS), "grass grass"], context_length=8)
    assert again.to_json() == words.to_json()


def test_to_a_file_and_back(words, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(words.to_json(), encoding="utf-8")
    again = WordTokenizer.load(path, context_length=8)
    texts = [*CAPTIONS, "unheard of", ""]
    assert torch.equal(again(texts), words(texts))
    assert again.to_json() == words.to_json()
    assert Tokenizer.from_file(str(path)).get_vocab_size() == words.vocab_size


def test_no_file(tmp_path):
    with pytest.raises(ModelError) as caught:
        WordTokenizer.load(tmp_path / "tokenizer.json", context_length=8)
    assert "tokenizer.json" in caught.value.found
    assert "tokenizer.json" in caught.value.allowed
    assert "dvc repro encode" in caught.value.fix
