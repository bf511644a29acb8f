"""Your own pictures: a folder per split; masks, a list of classes and captions where there are some.

    images/<split>/<stem>.jpg    pictures; also .jpeg .png .webp .bmp .tif .tiff
    masks/<split>/<stem>.png     optional, per picture: one channel, 8 or 16 bits or a palette, value = id
    classes.txt                  the classes, one per line (see below); only where there are no masks it may be missing
    captions.jsonl               optional: {"image": "train/dog.jpg", "captions": ["a dog on grass"]}
    licence.txt                  optional: the terms of the data, in words

Splits are usually `train`, `val` and `test`. Pictures may also lie in images/ itself, all of them: they are the split
`train`, with masks in masks/ itself. A line of classes.txt is

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
        """The folders below images/: train, val, test, then others by name; train, where pictures lie there itself."""
        if self._flat:
            return ["train"]
        images = self._folder / "images"
        found = sorted(path.name for path in images.iterdir() if path.is_dir() and not path.name.startswith("."))
        usual = [split for split in ("train", "val", "test") if split in found]
        return usual + [split for split in found if split not in usual]

    def vocabulary(self) -> Vocabulary:
        """The classes of classes.txt in the order of their lines; none where there is neither the list nor a mask."""
        return Vocabulary(
            names=tuple(entry.name for entry in self._classes),
            synonyms={entry.name: entry.synonyms for entry in self._classes},
            seen=tuple("unseen" not in entry.flags for entry in self._classes),
            things=tuple("thing" in entry.flags for entry in self._classes),
        )

    def samples(self, split: str) -> Iterator[RawSample]:
        """The pictures of a split by name; the id is the name without its ending."""
        _ = self._captions  # a fault in the list is a fault of the whole data set, not of each sample
        images, masks = self._of_split("images", split), self._of_split("masks", split)
        pictures = self._pictures(images)
        expected = {f"{path.stem}.png" for path in pictures}
        strays = sorted(path.name for path in masks.glob("[!.]*") if path.name not in expected)
        if strays:
            raise DataError(
                found=f"{len(strays)} mask(s) without a picture in {self._name(masks)}/: {', '.join(strays[:5])}",
                allowed=f"{self._name(masks)}/<stem>.png for a picture {self._name(images)}/<stem>.*",
                fix="give the masks the names of their pictures, or remove them",
            )
        for path in pictures:
            yield RawSample(
                id=path.stem,
                file=self._name(path),
                load=lambda path=path: self._load(path, masks / f"{path.stem}.png"),
            )

    def _load(self, path: Path, mask: Path) -> RawContent:
        content = read_picture(path, file=self._name(path))
        content = replace(content, captions=self._captions.get(path.relative_to(self._folder / "images").as_posix()))
        if not mask.exists():
            return content
        ids = read_mask(mask, file=self._name(mask))
        classes = {entry.id: index for index, entry in enumerate(self._classes)}
        semantic, unknown = relabel(ids, classes=classes, ignored={255, IGNORE_ON_DISK} - set(classes))
        return replace(content, semantic=semantic, unknown_labels=unknown)

    @staticmethod
    def _pictures(folder: Path) -> list[Path]:
        return sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in _ENDINGS)

    def _of_split(self, kind: str, split: str) -> Path:
        return self._folder / kind if self._flat else self._folder / kind / split

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()

    @cached_property
    def _flat(self) -> bool:
        """Whether the pictures lie in images/ itself, and not in a folder per split."""
        images = self._folder / "images"
        loose = self._pictures(images)
        folders = sorted(path.name for path in images.glob("[!.]*") if path.is_dir())
        if bool(loose) == bool(folders):
            raise DataError(
                found=f"pictures ({loose[0].name}, …) and folders ({folders[0]}/, …) side by side in images/"
                if loose
                else f"no picture and no folder in images/ of {self._folder.name}/",
                allowed="images/train/, images/val/ and images/test/ with the pictures; or all of them in images/",
                fix="arrange the pictures like this; `lexiseg.data.adapters.folder` documents the whole layout",
            )
        return bool(loose)

    @cached_property
    def _classes(self) -> list[_Class]:
        classes: list[_Class] = []
        if not (self._folder / "classes.txt").exists():
            mask = next((path for path in self._folder.glob("masks/**/[!.]*") if path.is_file()), None)
            if mask is None:
                return classes
            raise DataError(
                found=f"masks ({self._name(mask)}, …) and no classes.txt",
                allowed="classes.txt with a line for each id in the masks, `id name`",
                fix="list the classes in classes.txt; or remove masks/, to have photographs without labels",
            )
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
        if not classes:
            raise DataError(
                found="classes.txt lists no class",
                allowed=purpose,
                fix="list the classes; or remove classes.txt and masks/, to have photographs without labels",
            )
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
