"""COCO of 2017: photographs with panoptic labels and captions, as published or as a small selection.

    train2017/*.jpg   val2017/*.jpg            photographs; folders of these names in images/ do as well
    annotations/panoptic_train2017.json        the segments of each photograph, and the categories
    annotations/panoptic_train2017/*.png       masks: a pixel belongs to segment R + 256 G + 65536 B, 0 = none
    annotations/captions_train2017.json        sentences

and the same with val2017. A selection may be arranged like this instead:

    images/train2017/*.jpg   images/val2017/*.jpg
    images/captions_only/*.jpg                 photographs without labels: the split `captions`
    panoptic/panoptic_train2017.json   panoptic/train2017/*.png
    categories.json                            the list `categories` of a panoptic file
    captions.jsonl                             {"image": "images/val2017/000000000139.jpg", "captions": ["…"]}

A split is there when its photographs are; labels, captions and categories may be missing. Where a split has a panoptic
file, every photograph needs an entry in it and every entry its photograph. Captions of photographs that are not
there are not used. Without any list of categories the names are COCO's own 133.

A crowd, which is many objects drawn as one region, is labelled in the semantic mask and belongs to no segment of the
panoptic one: it is not one object, and COCO's own evaluation of panoptic results leaves it out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from lexiseg.data.adapters.base import IGNORE_ON_DISK, NO_SEGMENT, RawContent, RawSample
from lexiseg.data.adapters.coco_words import STUFF, THINGS, synonyms
from lexiseg.data.adapters.files import inside, read_lines, read_picture
from lexiseg.errors import DataError
from lexiseg.vocabulary import Vocabulary

_SPLITS = {"train": "train2017", "val": "val2017", "captions": "captions_only"}
# Where the parts of a split may lie, with COCO's name of the split for {}.
_PICTURES = ("{}", "images/{}")
_LISTS = ("annotations/panoptic_{}.json", "panoptic/panoptic_{}.json")
_MASKS = ("annotations/panoptic_{}", "panoptic/{}")
_SENTENCES = "annotations/captions_{}.json"
_VOID = {"unlabeled", "unlabelled", "void"}
_ENDINGS = {".jpg", ".jpeg", ".png"}
_FAULTS = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


@dataclass(frozen=True)
class _Category:
    name: str
    thing: bool


@dataclass(frozen=True)
class _Annotation:
    """The labels of one photograph: its mask's file name, and int64 (N, 3) of segment id, category id, crowd flag."""

    mask: str
    segments: np.ndarray


@dataclass(frozen=True)
class _Panoptic:
    """A panoptic file: its name, the folder of its masks (there or not), its categories by id, and the annotation of
    each photograph that it lists."""

    file: str
    masks: Path
    categories: dict[int, _Category]
    annotations: dict[str, _Annotation | None]


class CocoAdapter:
    """COCO in `folder`; see the module's text for the layouts."""

    name = "coco"
    licence = (
        "COCO: annotations and captions CC BY 4.0 (COCO Consortium); each photograph has terms of its own, mostly "
        "Creative Commons for non-commercial use, some without derivatives (see images.csv or the annotation files)"
    )

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)
        # A list of the whole of COCO takes seconds to read, so each is read once.
        self._read: dict[str, _Panoptic | None] = {}

    def splits(self) -> list[str]:
        """Those of train, val and captions that have photographs."""
        found = [split for split, name in _SPLITS.items() if self._find(_PICTURES, name)]
        if not found:
            raise DataError(
                found=f"none of train2017/, val2017/ and images/ with such folders in {self._folder.name}/",
                allowed="COCO of 2017: photographs in train2017/ and val2017/, labels in annotations/",
                fix="check the path; `lexiseg.data.adapters.coco` documents the layouts",
            )
        return found

    def vocabulary(self) -> Vocabulary:
        """The categories in the order of their list, in COCO's spelling, with other words for them."""
        categories = list(self._categories.values())
        names = tuple(category.name for category in categories)
        return Vocabulary(
            names=names,
            synonyms=synonyms(names),
            things=tuple(category.thing for category in categories),
        )

    def samples(self, split: str) -> Iterator[RawSample]:
        """The photographs of a split by file name; the id is that name without its ending.

        Raises:
            DataError: there is no such split, or a list of it is at fault.
        """
        name = _SPLITS.get(split, "")
        folder = self._find(_PICTURES, name) if name else None
        if folder is None:
            raise DataError(
                found=f"the split `{split}`", allowed=f"one of {', '.join(self.splits())}", fix="use one of these"
            )
        panoptic, captions = self._panoptic(name), self._captions(name, folder)
        if panoptic is not None:
            self._check_panoptic(panoptic, name)
        files = {path.name for path in folder.glob("[!.]*") if path.suffix.lower() in _ENDINGS}
        for file in sorted(files.union(panoptic.annotations if panoptic else ())):
            picture = folder / file
            yield RawSample(
                id=picture.stem,
                file=self._name(picture),
                load=partial(self._load, picture, panoptic, file, captions.get(self._name(picture))),
            )

    def _load(self, picture: Path, panoptic: _Panoptic | None, listed: str, captions: list[str] | None) -> RawContent:
        content = replace(read_picture(picture, file=self._name(picture)), captions=captions)
        if panoptic is None:
            return content
        annotation = panoptic.annotations.get(listed)
        if annotation is None:
            raise DataError(
                found=f"{self._name(picture)} has no annotation in {panoptic.file}",
                allowed="one for every photograph of the split",
                fix="add it, or remove the photograph",
            )
        path = panoptic.masks / annotation.mask
        file = self._name(path)
        mask = read_picture(path, file=file)
        if mask.image is None or mask.mode != "RGB":
            raise DataError(
                found=f"{file} has the mode {mask.mode}",
                allowed="an RGB picture: the id of a pixel's segment is R + 256 G + 65536 B",
                fix="use COCO's panoptic masks; those that hold a category per pixel do not tell objects apart",
            )
        colours = mask.image.astype(np.int64)
        ids = colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2]
        classes = {id: index for index, id in enumerate(self._categories)}
        things = [category.thing for category in self._categories.values()]
        try:
            labels = _labels(ids, annotation.segments, classes=classes, things=things)
        except ValueError as error:
            raise DataError(
                found=f"{file} and its entry in {panoptic.file} disagree: {error}",
                allowed="in the mask the ids that are listed for it, each once, and 0; the id is R + 256 G + 65536 B",
                fix="take mask and list from one download",
            ) from error
        return replace(content, **labels)

    def _panoptic(self, name: str) -> _Panoptic | None:
        if name not in self._read:
            path = self._find(_LISTS, name)
            self._read[name] = None if path is None else self._read_panoptic(path, name)
        return self._read[name]

    def _read_panoptic(self, path: Path, name: str) -> _Panoptic:
        file = self._name(path)
        masks = self._find(_MASKS, name) or self._folder / _MASKS[0].format(name)
        lists = _lists(path, "images", "annotations", "categories", file=file)
        annotations: dict[str, _Annotation | None] = {}
        files: dict[int, str] = {}
        place = ""
        try:
            for number, entry in enumerate(lists["images"]):
                place = f"{file}, images[{number}]"
                files[entry["id"]] = entry["file_name"]
                inside(self._folder, entry["file_name"], listed_in=place)
                annotations[entry["file_name"]] = None
            for number, entry in enumerate(lists["annotations"]):
                place = f"{file}, annotations[{number}]"
                picture = _listed(files, entry["image_id"])
                if annotations[picture] is not None:
                    raise ValueError(f"the second one of the image {entry['image_id']}")
                segments = [(one["id"], one["category_id"], one.get("iscrowd", 0)) for one in entry["segments_info"]]
                inside(masks, entry["file_name"], listed_in=place)
                annotations[picture] = _Annotation(
                    entry["file_name"], np.array(segments, dtype=np.int64).reshape(-1, 3)
                )
        except _FAULTS as error:
            raise DataError(
                found=f"{place} cannot be used ({_words(error)})",
                allowed='images: {"id", "file_name"}; annotations, one per image: {"image_id", "file_name", '
                '"segments_info": [{"id", "category_id", "iscrowd"}]}',
                fix=f"correct that entry, or fetch {file} again",
            ) from error
        return _Panoptic(file, masks, _categories(lists["categories"], file=file), annotations)

    @cached_property
    def _categories(self) -> dict[int, _Category]:
        path = self._folder / "categories.json"
        if path.is_file():
            return _categories(_json(path, file=path.name), file=path.name)
        for name in ("val2017", "train2017"):  # both list the same; that of val is much faster to read
            if panoptic := self._panoptic(name):
                return panoptic.categories
        return {id: _Category(name, name in THINGS) for id, name in enumerate((*THINGS, *STUFF), start=1)}

    def _check_panoptic(self, panoptic: _Panoptic, name: str) -> None:
        # Of a split that is used: lists of others often lie beside it without their masks.
        if not panoptic.masks.is_dir():
            raise DataError(
                found=f"{panoptic.file} without the folder of its masks",
                allowed=f"the masks in {' or '.join(place.format(name) for place in _MASKS)}/",
                fix=f"unpack panoptic_{name}.zip there (COCO ships it with the list), or remove {panoptic.file}",
            )
        ours, theirs = self._categories, panoptic.categories
        other = sorted(id for id in {*ours, *theirs} if ours.get(id) != theirs.get(id))
        if other:
            raise DataError(
                found=f"{panoptic.file} lists other categories than the rest of the data set, "
                f"those with the ids {', '.join(map(str, other[:5]))}" + (" …" if len(other) > 5 else ""),
                allowed="one list of categories: id, name and isthing alike in every file",
                fix="take all files from one download",
            )

    def _captions(self, name: str, folder: Path) -> dict[str, list[str]]:
        """Sentences by the photograph's path, relative to the data set's folder."""
        path = self._folder / _SENTENCES.format(name)
        if not path.is_file():
            return self._caption_lines
        file, place = self._name(path), ""
        lists = _lists(path, "images", "annotations", file=file)
        files: dict[int, str] = {}
        captions: dict[str, list[str]] = {}
        try:
            for number, entry in enumerate(lists["images"]):
                place = f"{file}, images[{number}]"
                files[entry["id"]] = self._name(inside(folder, entry["file_name"], listed_in=place))
            for number, entry in enumerate(lists["annotations"]):
                place = f"{file}, annotations[{number}]"
                captions.setdefault(_listed(files, entry["image_id"]), []).append(_sentence(entry["caption"]))
        except _FAULTS as error:
            raise DataError(
                found=f"{place} cannot be used ({_words(error)})",
                allowed='images: {"id", "file_name"}; annotations: {"image_id", "caption"}',
                fix=f"correct that entry, or fetch {file} again",
            ) from error
        return self._caption_lines | captions

    @cached_property
    def _caption_lines(self) -> dict[str, list[str]]:
        path = self._folder / "captions.jsonl"
        captions: dict[str, list[str]] = {}
        if not path.is_file():
            return captions
        for number, line in read_lines(path, file=path.name, purpose="one JSON object per line"):
            try:
                entry = json.loads(line)
                image, sentences = entry["image"], [_sentence(text) for text in entry["captions"]]
                fine = isinstance(entry["captions"], list) and sentences and image not in captions
            except (*_FAULTS, RecursionError):
                image, sentences, fine = "", [], False
            if not fine:
                raise DataError(
                    found=f"captions.jsonl line {number}: `{line[:80]}`",
                    allowed='{"image": "images/val2017/000000000139.jpg", "captions": ["…"]}, each photograph once',
                    fix="correct that line of captions.jsonl",
                )
            captions[image] = sentences
        return captions

    def _find(self, places: tuple[str, ...], name: str) -> Path | None:
        paths = (self._folder / place.format(name) for place in places)
        return next((path for path in paths if path.exists()), None)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


def _labels(ids: np.ndarray, segments: np.ndarray, *, classes: Mapping[int, int], things: list[bool]) -> dict[str, Any]:
    """The labels of one photograph.

    Args:
        ids: int64 H x W, the segment of each pixel, 0 = none.
        segments: int64 (N, 3): segment id, category id, crowd flag.
        classes: category id -> index into the vocabulary.
        things: per index, whether it is a countable object.

    Returns:
        The fields of `RawContent` that hold labels: `semantic`, `panoptic` with ids from 1 on in the order of COCO's
        own, `segments`, and `unknown_labels`, the categories that `classes` lacks. Listed segments without pixels
        are left out.

    Raises:
        ValueError: the mask holds ids that are not listed, or an id is listed twice.
    """
    listed = np.concatenate([[(0, 0, 0)], segments])  # id 0: no segment
    listed = listed[np.argsort(listed[:, 0], kind="stable")]
    numbers, counts = np.unique(listed[:, 0], return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"the id {numbers[counts > 1][0]} is listed twice (0 means no segment)")
    row = np.searchsorted(numbers, ids).clip(max=len(numbers) - 1)
    strays = np.unique(ids[numbers[row] != ids])
    if strays.size:
        some = ", ".join(map(str, strays[:5])) + (" …" if strays.size > 5 else "")
        raise ValueError(f"{strays.size} id(s) of the mask are not listed: {some}")
    present = np.bincount(row.ravel(), minlength=len(numbers)) > 0
    semantic = np.full(len(listed), IGNORE_ON_DISK, np.uint16)
    panoptic = np.full(len(listed), NO_SEGMENT, np.uint16)
    table, unknown = [], set()
    for position in np.flatnonzero(present & (numbers != 0)):
        category, crowd = int(listed[position, 1]), bool(listed[position, 2])
        if category not in classes:
            unknown.add(category)
            continue
        semantic[position] = classes[category]
        if not crowd:
            panoptic[position] = number = len(table) + 1
            table.append({"id": number, "class_id": classes[category], "thing": things[classes[category]]})
    return {
        "semantic": semantic[row],
        "panoptic": panoptic[row],
        "segments": table,
        "unknown_labels": tuple(sorted(unknown)),
    }


def _categories(entries: Any, *, file: str) -> dict[int, _Category]:
    """Categories by id, in the order of the list, without the one that means "no label"."""
    found: dict[int, _Category] = {}
    listed: list[Any] = entries if isinstance(entries, list) and entries else [entries]
    for number, entry in enumerate(listed):
        try:
            id, name, thing = entry["id"], entry["name"], entry["isthing"]
            fine = isinstance(id, int) and isinstance(name, str) and thing in (0, 1) and id not in found
        except _FAULTS:
            id, name, thing, fine = 0, "", 0, False
        if not fine:
            raise DataError(
                found=f"{file}, category {number}: `{str(entry)[:80]}`",
                allowed='a list of {"id": 1, "name": "person", "isthing": 1}, each id once',
                fix=f"correct that entry, or fetch {file} again",
            )
        found[id] = _Category(name, bool(thing))
    return {id: category for id, category in found.items() if category.name not in _VOID}


def _lists(path: Path, *keys: str, file: str) -> dict[str, list[Any]]:
    content = _json(path, file=file)
    lacking = [key for key in keys if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if lacking:
        raise DataError(
            found=f"{file} without the list(s) {', '.join(lacking)}",
            allowed=f"an object with the lists {', '.join(keys)}",
            fix=f"fetch {file} again; files of COCO for other tasks have other lists",
        )
    return content


def _json(path: Path, *, file: str) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            found=f"{file} cannot be read ({_words(error)})",
            allowed="a JSON file of COCO",
            fix=f"fetch or unpack {file} again",
        ) from error


def _listed(files: Mapping[int, str], image: int) -> str:
    if image not in files:
        raise ValueError(f"`images` has no id {image}")
    return files[image]


def _sentence(text: str) -> str:
    # COCO's captions have line ends and runs of spaces in them. Raises AttributeError for anything but text.
    return " ".join(text.split())


def _words(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
