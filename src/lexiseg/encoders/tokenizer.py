"""A word tokenizer for encoders whose captions use few words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace

from lexiseg.errors import ModelError

PADDING, UNKNOWN, START, END = "<pad>", "<unk>", "<start>", "<end>"


class WordTokenizer:
    """Lower-cased words -> ids, with start and end marks.

    The end mark has the largest id: CLIP text towers find the end of a text by argmax over the ids.

    Args:
        tokenizer: a `tokenizers.Tokenizer` of kind WordLevel.
        context_length: largest number of tokens with both marks; longer texts are cut.
    """

    def __init__(self, tokenizer: Tokenizer, *, context_length: int) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length
        self.vocab_size = tokenizer.get_vocab_size()
        ids = tokenizer.get_vocab()
        self._padding, self._start, self._end = ids[PADDING], ids[START], ids[END]

    @classmethod
    def from_captions(cls, captions: Iterable[str], *, context_length: int) -> WordTokenizer:
        """Every word of the captions becomes a token (sorted, so the ids depend on the set of words alone)."""
        words = sorted({word for caption in captions for word in _words(caption)})
        ids = {token: index for index, token in enumerate([PADDING, UNKNOWN, START, *words, END])}
        tokenizer = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
        tokenizer.normalizer = Lowercase()  # type: ignore[assignment]
        tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
        return cls(tokenizer, context_length=context_length)

    @classmethod
    def load(cls, path: Path, *, context_length: int) -> WordTokenizer:
        """Read `tokenizer.json`."""
        if not path.is_file():
            raise ModelError(
                found=f"no tokenizer at {path}", allowed="a folder with tokenizer.json", fix="run `dvc repro encode`"
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise ModelError(
                found=f"{path} is damaged ({error})",
                allowed="a tokenizer.json as lexiseg wrote it",
                fix="copy the whole folder again, or run `dvc repro encode`",
            ) from error
        return cls(tokenizer, context_length=context_length)

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        return self.tokenizer.to_str(pretty=True)

    def __call__(self, texts: list[str], *, trim: bool = False) -> torch.Tensor:
        """Token ids, int64 (N, context_length); with `trim`, cut to the longest text."""
        rows = [
            [self._start, *encoding.ids[: self.context_length - 2], self._end]
            for encoding in self.tokenizer.encode_batch(texts)
        ]
        length = max(map(len, rows)) if trim else self.context_length
        result = torch.full((len(rows), length), self._padding, dtype=torch.int64)
        for row, ids in enumerate(rows):
            result[row, : len(ids)] = torch.tensor(ids)
        return result

    def unknown_words(self, text: str) -> list[str]:
        """Words of `text` that no caption had."""
        return [word for word in _words(text) if self.tokenizer.token_to_id(word) is None]


def _words(text: str) -> list[str]:
    # The same split as the Whitespace pre-tokenizer after lower-casing.
    return re.findall(r"\w+|[^\w\s]+", text.lower())
