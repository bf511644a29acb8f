"""FSS-1000: a thousand classes with ten pictures each.

    FSS-1000/<class>/<number>.jpg            pictures, each of one object
    FSS-1000/<class>/<number>.png            masks: 128 and more is the object
    splits/fss/{trn,val,test}.txt            one class per line: 520, 240 and 240 of them

Every picture is asked about its class. Training takes the classes of `trn`; those of `val` and `test` are unseen.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from lexiseg.data.adapters.base import Episodes
from lexiseg.data.adapters.files import inside, read_lines, read_picture
from lexiseg.data.adapters.listed import ListedAdapter, Pair
from lexiseg.errors import DataError

_PARTS = {"train": "trn", "val": "val", "test": "test"}
_OBJECT = 128


class FssAdapter(ListedAdapter):
    """FSS-1000 in `folder`; see the module's text for the layout."""

    name = "fss"
    licence = "FSS-1000: as its authors publish it, for research"

    def splits(self) -> list[str]:
        """`train`, `val` and `test`, whose classes differ."""
        return list(_PARTS)

    def episodes(self, split: str) -> Episodes:
        """Every picture of the split's classes, with its class."""
        return self._as_episodes(self._parts[split], self._pairs(split))

    def _classes(self) -> tuple[str, ...]:
        return tuple(name for names in self._parts.values() for name in names)

    def _unseen(self) -> set[str]:
        return {*self._parts["val"], *self._parts["test"]}

    def _pairs(self, split: str) -> list[Pair]:
        pairs = []
        for name in self._parts[split]:
            pictures = sorted((self._folder / "FSS-1000" / name).glob("*.jpg"))
            if not pictures:
                raise DataError(
                    found=f"no picture in FSS-1000/{name}/, a class of splits/fss/{_PARTS[split]}.txt",
                    allowed=f"FSS-1000/{name}/1.jpg, 2.jpg, …",
                    fix="copy the folder of the class, or take its line out of the list",
                )
            pairs += [(f"FSS-1000/{name}/{path.name}", name) for path in pictures]
        return pairs

    def _mask_of(self, picture: str) -> str:
        return f"{picture.removesuffix('.jpg')}.png"

    def _id(self, picture: str) -> str:
        path = PurePosixPath(picture)
        return f"{path.parent.name}/{path.stem}"

    def _semantic(self, path: Path, *, file: str) -> tuple[np.ndarray, tuple[int, ...]]:
        # Saved as grey or as colour pictures.
        pixels = read_picture(path, file=file).image
        assert pixels is not None  # read_picture always decodes
        grey = np.asarray(Image.fromarray(pixels).convert("L"))
        id = 1 + self._classes().index(path.parent.name)
        return np.where(grey >= _OBJECT, id, 0).astype(np.uint16), ()

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        """Classes by split, each sorted: their order is that of the official ids."""
        parts, seen = {}, set()
        for split, part in _PARTS.items():
            file = f"splits/fss/{part}.txt"
            names = []
            for number, name in read_lines(self._folder / file, file=file, purpose="one class per line"):
                if "/" in name or name in seen:
                    raise DataError(
                        found=f"{file} line {number}: `{name}`",
                        allowed="the name of a folder in FSS-1000/, in one list and once",
                        fix=f"correct that line of {file}",
                    )
                inside(self._folder, f"FSS-1000/{name}", listed_in=file)
                seen.add(name)
                names.append(name)
            parts[split] = sorted(names)
        return parts
