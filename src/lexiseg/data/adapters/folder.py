"""Your own pictures: a folder per split, masks beside them, a list of classes, captions where there are some.

    classes.txt                  the classes, one per line (see below)
    images/<split>/<stem>.jpg    pictures; also .jpeg .png .webp .bmp .tif .tiff
    masks/<split>/<stem>.png     optional, per picture: one channel, 8 or 16 bits or a palette, value = id
    captions.jsonl               optional: {"image": "train/dog.jpg", "captions": ["a dog on grass"]}
    licence.txt                  optional: the terms of the data, in words

Splits are usually `train`, `val` and `test`. A line of classes.txt is

    id name | synonym, synonym [unseen] [thing]

where everything after the name may be left out: `3 potted plant | houseplant, plant [thing]`. `[unseen]` marks
classes that training must not see labels of, `[thing]` countable objects. Lines that begin with # are comments.
The class of id k in a mask is the line with that id; gaps are allowed. The value 65535 means "no label", and so
does 255 unless classes.txt lists it. A mask has the size of its picture after the EXIF rotation was applied.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from lexiseg.data.adapters.base import IGNORE_ON_DISK, RawContent, RawSample
from lexiseg.data.adapters.files import inside, read_lines, read_mask, read_picture, relabel
from lexiseg.errors import DataError
from lexiseg.vocabulary import Vocabulary

_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
_LINE = re.compile(r"(?P<id>\d+)\s+(?P<name>[^|\[\]]+?)\s*(?:\|(?P<synonyms>[^\[\]]*))?(?P<flags>(?:\s*\[\w+\])*)\s*")


@dataclass(frozen=True)
class _Class:
    id: int
    name: str
    synonyms: tuple[str, ...]
    flags: frozenset[str]


class FolderAdapter:
    """Pictures, masks and captions in `folder`; see the module's text for the layout."""

    name = "folder"

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)

    @property
    def licence(self) -> str:
        """The text of licence.txt."""
        path = self._folder / "licence.txt"
        return path.read_text(encoding="utf-8").strip() if path.is_file() else "not stated (no licence.txt)"

    def splits(self) -> list[str]:
        """The folders below images/: train, val, test, then others by name."""
        images = self._folder / "images"
        found = sorted(path.name for path in images.iterdir() if path.is_dir()) if images.is_dir() else []
        if not found:
            raise DataError(
                found=f"no folder images/<split>/ in {self._folder.name}/",
                allowed="images/train/, images/val/ and images/test/ with the pictures",
                fix="arrange the pictures like this; `lexiseg.data.adapters.folder` documents the whole layout",
            )
        usual = [split for split in ("train", "val", "test") if split in found]
        return usual + [split for split in found if split not in usual]

    def vocabulary(self) -> Vocabulary:
        """The classes of classes.txt in the order of their lines."""
        return Vocabulary(
            names=tuple(entry.name for entry in self._classes),
            synonyms={entry.name: entry.synonyms for entry in self._classes},
            seen=tuple("unseen" not in entry.flags for entry in self._classes),
            things=tuple("thing" in entry.flags for entry in self._classes),
        )

    def samples(self, split: str) -> Iterator[RawSample]:
        """The pictures of a split by name; the id is the name without its ending."""
        _ = self._captions  # a fault in the list is a fault of the whole data set, not of each sample
        pictures = self._pictures(split)
        expected = {f"{path.stem}.png" for path in pictures}
        strays = sorted(path.name for path in self._masks(split).glob("[!.]*") if path.name not in expected)
        if strays:
            raise DataError(
                found=f"{len(strays)} mask(s) without a picture in masks/{split}/: {', '.join(strays[:5])}",
                allowed=f"masks/{split}/<stem>.png for a picture images/{split}/<stem>.*",
                fix="give the masks the names of their pictures, or remove them",
            )
        for path in pictures:
            yield RawSample(
                id=path.stem,
                file=f"images/{split}/{path.name}",
                load=lambda path=path: self._load(split, path),
            )

    def _load(self, split: str, path: Path) -> RawContent:
        content = read_picture(path, file=f"images/{split}/{path.name}")
        content = replace(content, captions=self._captions.get(f"{split}/{path.name}"))
        mask = self._masks(split) / f"{path.stem}.png"
        if not mask.exists():
            return content
        ids = read_mask(mask, file=f"masks/{split}/{mask.name}")
        classes = {entry.id: index for index, entry in enumerate(self._classes)}
        semantic, unknown = relabel(ids, classes=classes, ignored={255, IGNORE_ON_DISK} - set(classes))
        return replace(content, semantic=semantic, unknown_labels=unknown)

    def _pictures(self, split: str) -> list[Path]:
        folder = self._folder / "images" / split
        return sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in _ENDINGS)

    def _masks(self, split: str) -> Path:
        return self._folder / "masks" / split

    @cached_property
    def _classes(self) -> list[_Class]:
        classes: list[_Class] = []
        purpose = "one class per line, `id name | synonym, synonym [unseen] [thing]`"
        for number, line in read_lines(self._folder / "classes.txt", file="classes.txt", purpose=purpose):
            match = _LINE.fullmatch(line)
            flags = frozenset(re.findall(r"\[(\w+)\]", match["flags"])) if match else frozenset()
            taken = {entry.id for entry in classes}
            if (
                not match
                or not flags <= {"unseen", "thing"}
                or not 0 <= int(match["id"]) < IGNORE_ON_DISK
                or (int(match["id"]) in taken)
            ):
                raise DataError(
                    found=f"classes.txt line {number}: `{line}`",
                    allowed=f"{purpose}; ids from 0 to {IGNORE_ON_DISK - 1}, each once",
                    fix="correct that line of classes.txt",
                )
            words = tuple(word.strip() for word in (match["synonyms"] or "").split(",") if word.strip())
            classes.append(_Class(id=int(match["id"]), name=match["name"], synonyms=words, flags=flags))
        return classes

    @cached_property
    def _captions(self) -> dict[str, list[str]]:
        path = self._folder / "captions.jsonl"
        captions: dict[str, list[str]] = {}
        if not path.exists():
            return captions
        for number, line in read_lines(path, file="captions.jsonl", purpose="one JSON object per line"):
            place = f"captions.jsonl line {number}"
            try:
                entry = json.loads(line)
                image, sentences = entry["image"], entry["captions"]
                fine = isinstance(image, str) and isinstance(sentences, list) and sentences
                fine = fine and all(isinstance(sentence, str) for sentence in sentences) and image not in captions
            except (ValueError, KeyError, TypeError):
                image, sentences, fine = "", [], False
            if not fine or not inside(self._folder / "images", image, listed_in=place).is_file():
                raise DataError(
                    found=f"{place}: `{line[:80]}`",
                    allowed='{"image": "train/dog.jpg", "captions": ["…"]} for a picture in images/, each picture once',
                    fix="correct that line of captions.jsonl",
                )
            captions[image] = sentences
        return captions
