import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import encode_settings, encoded
from pydantic import ValidationError

from lexiseg.encoders.cache import EmbeddingCache
from lexiseg.encoders.settings import TextSettings
from lexiseg.encoders.text import ClipText, SentenceText, TableText, copy_text, load_text, save_text
from lexiseg.errors import LabelError, ModelError
from lexiseg.storage import hash_tree, read_json, sha256_of_file
from lexiseg.vocabulary import Vocabulary

ROWS = ["grass", "traffic light", "Sky_Other", "sea"]
WORDS = Vocabulary(
    names=("Grass", "sky", "Pole"),
    synonyms={"sky": ("heaven", "sky other"), "Grass": ("lawn",), "Pole": ("pole", "post")},
)
NO_CACHE = EmbeddingCache(None)


def table(folder, *, rows=ROWS, vectors=None):
    vectors = np.random.default_rng(0).normal(size=(len(rows), 6)).astype(np.float16) if vectors is None else vectors
    np.save(folder / "table.npy", vectors)
    (folder / "table.names.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return vectors


def digest(folder):
    files = [folder / "table.npy", folder / "table.names.txt"]
    return sha256_of_file(*files) if all(file.is_file() for file in files) else "0" * 64


def table_settings(folder, **changes):
    values = {
        "source": "table",
        "path": str(folder / "table.npy"),
        "sha256": digest(folder),
        "licence": "MIT",
        "templates": "vocabulary",
        "stand_ins": {"Pole": "traffic light"},
    }
    return TextSettings(**{**values, **changes})


@pytest.fixture
def text(tmp_path):
    vectors = table(tmp_path)
    save_text(tmp_path / "encode", table_settings(tmp_path), WORDS)
    return load_text(tmp_path / "encode"), F.normalize(torch.from_numpy(vectors).float(), dim=-1)


# ---- a table -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "row"),
    [
        ("grass", 0),
        ("GRASS ", 0),
        ("lawn", 0),  # a synonym of a class whose name has a row
        ("sky", 2),  # a class whose second synonym has a row
        ("heaven", 2),
        ("sky_other", 2),
        ("sea", 3),  # a row that belongs to no class
        ("Pole", 1),  # by its stand-in
        ("post", 1),
    ],
)
def test_a_label_finds_its_row(text, label, row):
    encoder, vectors = text
    assert torch.equal(encoder.embed([label])[0], vectors[row])


def test_many_labels_in_their_order(text):
    encoder, vectors = text
    assert isinstance(encoder, TableText)
    assert torch.equal(encoder.embed(["sea", "Pole", "grass"]), vectors[[3, 1, 0]])
    assert encoder.embed(["sea"]).norm() == pytest.approx(1, abs=1e-6)
    assert (encoder.dim, encoder.licence) == (6, "MIT")
    assert encoder.unknown_words("xyzzy") == []


def test_what_is_given_may_be_changed(text):
    encoder, vectors = text
    encoder.embed(["sea"]).zero_()
    assert torch.equal(encoder.embed(["sea"])[0], vectors[3])


def test_stand_ins_are_stated(text):
    encoder = text[0]
    assert [encoder.stand_in(name) for name in (*WORDS.names, "pole", "post")] == [None, None, *["traffic light"] * 3]


@pytest.mark.parametrize(
    ("label", "near"), [("gras", "grass"), ("trafic-light", "traffic light"), ("heavens", "heaven")]
)
def test_another_word_is_refused_with_the_nearest(text, label, near):
    with pytest.raises(LabelError) as caught:
        text[0].embed(["grass", label])
    assert f"`{label}`" in caught.value.found
    assert f"the nearest: {near}" in caught.value.allowed
    assert "synonym" in caught.value.fix


def test_a_word_near_nothing_is_refused_too(text):
    with pytest.raises(LabelError) as caught:
        text[0].embed(["草地"])
    assert caught.value.allowed == "9 words, such as grass, heaven, lawn, pole, post"


@pytest.mark.parametrize(
    ("stand_ins", "found"),
    [
        ({}, "for Pole"),
        ({"Pole": "trafic light"}, "Pole nor for its stand-in `trafic light` (nearest: traffic light"),
        ({"pole": "traffic light"}, "for Pole"),
    ],
)
def test_a_class_without_a_row_needs_a_stand_in(tmp_path, stand_ins, found):
    table(tmp_path)
    with pytest.raises(LabelError) as caught:
        save_text(tmp_path / "encode", table_settings(tmp_path, stand_ins=stand_ins), WORDS)
    assert found in caught.value.found
    assert "4 names (grass, traffic light" in caught.value.allowed
    assert "`encode.text.stand_ins`" in caught.value.fix
    assert not (tmp_path / "encode/text/text.json").exists()


def test_every_class_without_a_row_is_named_with_what_is_near(tmp_path):
    table(tmp_path)
    words = Vocabulary(names=("gras", "zzz"))
    with pytest.raises(LabelError) as caught:
        save_text(tmp_path / "encode", table_settings(tmp_path, stand_ins={}), words)
    assert "gras (nearest: grass), zzz" in caught.value.found


def test_stand_ins_of_classes_with_a_row_are_not_used(tmp_path):
    vectors = table(tmp_path)
    save_text(tmp_path / "e", table_settings(tmp_path, stand_ins={"Pole": "sea", "Grass": "sea"}), WORDS)
    encoder = load_text(tmp_path / "e")
    assert torch.equal(encoder.embed(["Grass"])[0], F.normalize(torch.from_numpy(vectors[0]).float(), dim=-1))
    assert encoder.stand_in("Grass") is None


def test_the_same_table_gives_the_same_folder(tmp_path):
    table(tmp_path)
    for name in "ab":
        save_text(tmp_path / name, table_settings(tmp_path), WORDS)
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b")
    assert sorted(hash_tree(tmp_path / "a")) == ["text/text.json", "text/vectors.safetensors"]
    assert str(tmp_path) not in (tmp_path / "a/text/text.json").read_text()


def test_the_hash_of_matrix_and_names_is_checked(tmp_path):
    table(tmp_path)
    stated = digest(tmp_path)
    save_text(tmp_path / "good", table_settings(tmp_path, sha256=stated), WORDS)
    (tmp_path / "table.names.txt").write_text("\n".join(reversed(ROWS)) + "\n")
    with pytest.raises(ModelError) as caught:
        save_text(tmp_path / "bad", table_settings(tmp_path, sha256=stated), WORDS)
    assert digest(tmp_path) in caught.value.found
    assert stated in caught.value.allowed
    assert "params.yaml" in caught.value.fix
    assert not (tmp_path / "bad/text/text.json").exists()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _truncated(folder):
    content = (folder / "table.npy").read_bytes()
    (folder / "table.npy").write_bytes(content[: len(content) - 10])


def _empty(folder):
    (folder / "table.npy").write_bytes(b"")


def _pickled(folder):
    np.save(folder / "table.npy", np.array([Evil(folder / "hacked")], dtype=object), allow_pickle=True)


def _no_names(folder):
    (folder / "table.names.txt").unlink()


def _latin(folder):
    (folder / "table.names.txt").write_bytes("grass\ntraffic light\nM\u00fcll\nsea\n".encode("latin-1"))


def _fewer_names(folder):
    (folder / "table.names.txt").write_text("grass\nsea\n")


def _flat(folder):
    np.save(folder / "table.npy", np.zeros(4, np.float32))


@pytest.mark.parametrize(
    ("damage", "found", "allowed"),
    [
        (_truncated, "cannot be read", "a .npy matrix"),
        (_empty, "cannot be read", "a .npy matrix"),
        (_pickled, "cannot be read", "a .npy matrix"),
        (_latin, "cannot be read", "UTF-8"),
        (_no_names, "table.names.txt beside it", "line i names row i"),
        (_fewer_names, "2 lines", "one row per name"),
        (_flat, "shape (4,)", "one row per name"),
    ],
)
def test_a_table_that_cannot_be_used(tmp_path, damage, found, allowed):
    table(tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelError) as caught:
        save_text(tmp_path / "encode", table_settings(tmp_path), WORDS)
    assert found in caught.value.found
    assert allowed in caught.value.allowed
    assert caught.value.fix
    assert not (tmp_path / "hacked").exists()


def test_no_text_side(tmp_path):
    with pytest.raises(ModelError) as caught:
        load_text(tmp_path)
    assert "text/text.json" in caught.value.found
    assert "encode or register" in caught.value.allowed
    assert "another `encode.text.source` than none" in caught.value.allowed
    assert "dvc repro" in caught.value.fix


def test_none_is_written_where_none_is_wanted(tmp_path):
    save_text(tmp_path, encode_settings({"encode.text.source": "none"}).text, WORDS)
    assert not hash_tree(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"path": None}, "source table needs `path` and `licence`"), ({"sha256": None}, "a table needs its `sha256`")],
)
def test_settings_say_what_a_source_needs(tmp_path, changes, message):
    with pytest.raises(ValidationError, match=message):
        table_settings(tmp_path, **changes)


# ---- a CLIP ------------------------------------------------------------------------------------------------------


def clip_text(folder, *, templates, cache=NO_CACHE):
    words = Vocabulary(names=("grass", "ring"), templates=("{}", "a {} on grass", "a small {}"))
    encode = encoded(folder, changes={"encode.text.templates": templates}, vocabulary=words)
    text = load_text(encode, cache=cache)
    assert isinstance(text, ClipText)
    return text


def test_the_mean_over_the_templates(tmp_path):
    text = clip_text(tmp_path, templates="vocabulary")
    prompts = ["ring", "a ring on grass", "a small ring"]
    expected = F.normalize(text._clip.embed_texts(prompts).mean(dim=0), dim=-1)
    assert torch.equal(text.embed(["ring"])[0], expected)


def test_the_bare_label_of_the_paper(tmp_path):
    text = clip_text(tmp_path, templates="bare")
    assert torch.allclose(text.embed(["red ring"])[0], text._clip.embed_texts(["red ring"])[0], atol=1e-6)


def test_a_label_has_one_vector_alone_and_among_others(tmp_path):
    text = clip_text(tmp_path / "e", templates="vocabulary")
    many = [f"{colour} {thing}" for colour in ("red", "green", "small") for thing in ("ring", "sky", "grass", "sea")]
    together = text.embed(many)
    for position, label in enumerate(many):
        assert torch.equal(text.embed([label])[0], together[position])
    assert torch.equal(text.embed(many[::-1]), together.flip(0))


def test_the_cache_changes_nothing(tmp_path):
    plain = clip_text(tmp_path / "e", templates="vocabulary")
    kept = clip_text(tmp_path / "e", templates="vocabulary", cache=EmbeddingCache(tmp_path / "cache"))
    kept.embed(["grass"])
    assert torch.equal(kept.embed(["ring", "grass"]), plain.embed(["ring", "grass"]))


def test_braces_in_a_label_are_text(tmp_path):
    text = clip_text(tmp_path, templates="vocabulary")
    assert text.embed(["{0} {x}", "ring"]).shape == (2, 24)


def test_words_never_seen(tmp_path):
    text = clip_text(tmp_path, templates="bare")
    assert text.unknown_words("a purple ring") == ["purple"]
    assert text.stand_in("purple") is None
    assert text.dim == 24


def test_training_can_use_the_vectors(tmp_path):
    vectors = clip_text(tmp_path, templates="bare").embed(["ring"])
    weight = torch.ones(24, 1, requires_grad=True)
    (vectors @ weight).sum().backward()  # inference tensors would refuse
    assert weight.grad is not None
    assert torch.equal(weight.grad[:, 0], vectors[0])


def test_the_identity_covers_the_circumstances(tmp_path, monkeypatch):
    seen = set()

    class Spy(EmbeddingCache):
        def fetch(self, encoder, texts, compute):
            seen.add(encoder)
            return super().fetch(encoder, texts, compute)

    for _ in range(2):
        clip_text(tmp_path / "e", templates="bare", cache=Spy(None)).embed(["ring"])
    assert len(seen) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    clip_text(tmp_path / "e", templates="bare", cache=Spy(None)).embed(["ring"])
    assert len(seen) == 2


@pytest.mark.parametrize("source", ["clip", "table"])
def test_copied_with_all_it_needs(tmp_path, source):
    if source == "clip":
        encode = encoded(tmp_path / "encode")
    else:
        encode = tmp_path / "encode"
        table(tmp_path)
        save_text(encode, table_settings(tmp_path), WORDS)
    copy_text(encode, tmp_path / "copy")
    assert ((tmp_path / "copy/clip").is_dir(), (tmp_path / "copy/text").is_dir()) == (source == "clip", True)
    one, other = load_text(encode, cache=NO_CACHE), load_text(tmp_path / "copy", cache=NO_CACHE)
    assert torch.equal(one.embed(["grass"]), other.embed(["grass"]))


# ---- sentence-transformers ---------------------------------------------------------------------------------------


def sentence_settings(path):
    return encode_settings(
        {
            "encode.text.source": "sentence_transformers",
            "encode.text.path": str(path),
            "encode.text.licence": "none",
        }
    ).text


def test_a_sentence_model_of_a_folder(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs the extra sentence-transformers")
    transformers = pytest.importorskip("transformers")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "ring"]))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    transformers.BertTokenizer(str(tmp_path / "bert/vocab.txt")).save_pretrained(tmp_path / "bert")
    sentence_transformers.SentenceTransformer(str(tmp_path / "bert"), device="cpu").save(str(tmp_path / "model"))
    for name in "ab":
        save_text(tmp_path / name, sentence_settings(tmp_path / "model"), WORDS)
    assert hash_tree(tmp_path / "a") == hash_tree(tmp_path / "b")
    assert read_json(tmp_path / "a/text/text.json")["licence"] == "none"
    text = load_text(tmp_path / "a", cache=NO_CACHE)
    assert isinstance(text, SentenceText)
    vectors = text.embed(["a ring", "a a a a a ring", "ring"])
    assert vectors.shape == (3, text.dim) == (3, 16)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.equal(text.embed(["ring"])[0], vectors[2])
    assert (text.unknown_words("xyzzy"), text.stand_in("ring")) == ([], None)


def test_no_sentence_model(tmp_path):
    pytest.importorskip("sentence_transformers", reason="needs the extra sentence-transformers")
    with pytest.raises(ModelError) as caught:
        save_text(tmp_path / "e", sentence_settings(tmp_path / "nowhere"), WORDS)
    assert "nowhere" in caught.value.found
    assert "local folder" in caught.value.allowed
    assert "`encode.text.path`" in caught.value.fix


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(ModelError) as caught:
        save_text(tmp_path / "e", sentence_settings(tmp_path / "model"), WORDS)
    assert "not installed" in caught.value.found
    assert "the extra" in caught.value.allowed
    assert "[sentence-transformers]" in caught.value.fix
