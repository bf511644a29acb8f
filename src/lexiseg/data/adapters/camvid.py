"""CamVid: street scenes in the layout of the SegNet tutorial, with a list of classes beside it.

    classes.txt           one class per line: `id name R G B`; the colours are for display and not used
    train.txt  val.txt  test.txt     one sample per line: `image label`, relative to the folder
    train/*.png  trainannot/*.png    pictures, and masks (8-bit, one channel, value = id)

The class named Unlabelled or void means "no label".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from lexiseg.data.adapters.base import RawContent, RawSample
from lexiseg.data.adapters.files import inside, read_lines, read_mask, read_picture, relabel
from lexiseg.errors import DataError
from lexiseg.vocabulary import Vocabulary

_VOID = {"unlabelled", "unlabeled", "void"}
_THINGS = {"Car", "Pedestrian", "Bicyclist"}

# Other words for the classes, best first; the spellings of COCO panoptic, COCO-Stuff and LVIS are among them.
_SYNONYMS = {
    "Sky": ("sky", "sky-other-merged", "sky-other", "clouds", "fog"),
    "Building": (
        "building",
        "building-other-merged",
        "building-other",
        "skyscraper",
        "house",
    ),
    "Pole": ("pole", "lamppost", "telephone_pole", "flagpole"),
    "Road": ("road", "street"),
    "Pavement": ("pavement", "pavement-merged", "sidewalk"),
    "Tree": ("tree", "tree-merged", "bush", "leaves", "branch"),
    "SignSymbol": (
        "traffic sign",
        "street sign",
        "street_sign",
        "stop sign",
        "stop_sign",
        "signboard",
        "traffic light",
        "traffic_light",
    ),
    "Fence": ("fence", "fence-merged", "railing", "cage"),
    "Car": ("car", "car_(automobile)"),
    "Pedestrian": ("pedestrian", "person"),
    "Bicyclist": ("cyclist", "bicyclist", "rider", "bicycle"),
}


class CamvidAdapter:
    """CamVid in `folder`; see the module's text for the layout."""

    name = "camvid"
    licence = "CC BY-NC 4.0 as declared by the SegNet tutorial; CamVid itself: research use only"

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)

    def splits(self) -> list[str]:
        """Those of train, val and test that have a list file."""
        found = [split for split in ("train", "val", "test") if (self._folder / f"{split}.txt").is_file()]
        if not found:
            raise DataError(
                found=f"none of train.txt, val.txt and test.txt in {self._folder.name}/",
                allowed="the layout of CamVid: list files with one `image label` pair per line",
                fix="check the path, or use `--adapter folder` for another layout",
            )
        return found

    def vocabulary(self) -> Vocabulary:
        """The classes of classes.txt without void, in the order of their ids."""
        names = [name for _, name in sorted(self._classes.items()) if name.lower() not in _VOID]
        return Vocabulary(
            names=tuple(names),
            synonyms={name: words for name, words in _SYNONYMS.items() if name in names},
            things=tuple(name in _THINGS for name in names),
        )

    def samples(self, split: str) -> Iterator[RawSample]:
        """The samples in the order of the list file; the id is the picture's name without its ending."""
        listed_in = f"{split}.txt"
        for number, line in read_lines(
            self._folder / listed_in, file=listed_in, purpose="one `image label` pair per line"
        ):
            place, parts = f"{listed_in} line {number}", line.split()
            if len(parts) != 2:
                raise DataError(
                    found=f"{place}: `{line}`",
                    allowed="two paths, `image label`, with a space between",
                    fix=f"correct that line of {listed_in}",
                )
            picture, mask = (inside(self._folder, part, listed_in=place) for part in parts)
            yield RawSample(
                id=picture.stem,
                file=parts[0],
                load=lambda picture=picture, mask=mask: self._load(picture, mask),
            )

    def _load(self, picture: Path, mask: Path) -> RawContent:
        content = read_picture(picture, file=self._name(picture))
        ids = read_mask(mask, file=self._name(mask))
        void = [id for id, name in self._classes.items() if name.lower() in _VOID]
        kept = sorted(set(self._classes) - set(void))
        semantic, unknown = relabel(ids, classes={id: index for index, id in enumerate(kept)}, ignored=void)
        return replace(content, semantic=semantic, unknown_labels=unknown)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()

    @cached_property
    def _classes(self) -> dict[int, str]:
        classes: dict[int, str] = {}
        purpose = "one class per line, `id name R G B`"
        for number, line in read_lines(self._folder / "classes.txt", file="classes.txt", purpose=purpose):
            parts = line.split()
            if len(parts) < 2 or not parts[0].isdecimal() or int(parts[0]) > 255 or int(parts[0]) in classes:
                raise DataError(
                    found=f"classes.txt line {number}: `{line}`",
                    allowed="`id name R G B` with an id from 0 to 255 that occurs once",
                    fix="correct that line of classes.txt",
                )
            classes[int(parts[0])] = parts[1]
        if all(name.lower() in _VOID for name in classes.values()):
            raise DataError(
                found="classes.txt lists no class",
                allowed=purpose,
                fix="use the list that comes with CamVid; for photographs without labels use `--adapter folder`",
            )
        return classes
