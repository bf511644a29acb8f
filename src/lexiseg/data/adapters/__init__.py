"""Adapters turn raw data sets into samples; `ADAPTERS` names them.

A new one is a class with the members of `lexiseg.data.adapters.base.Adapter`, in a file of its own, and one
line in the table below.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Literal

from lexiseg.data.adapters.base import Adapter
from lexiseg.errors import DataError

ADAPTERS: dict[str, str] = {
    "camvid": "lexiseg.data.adapters.camvid:CamvidAdapter",
    "coco": "lexiseg.data.adapters.coco:CocoAdapter",
    "coco20i": "lexiseg.data.adapters.coco20i:Coco20iAdapter",
    "folder": "lexiseg.data.adapters.folder:FolderAdapter",
    "fss": "lexiseg.data.adapters.fss:FssAdapter",
    "pascal5i": "lexiseg.data.adapters.pascal5i:Pascal5iAdapter",
    "world": "lexiseg.data.adapters.world:WorldAdapter",
}
"""Adapter classes by name, as `module:class`; a module is imported when its adapter is opened."""


FOLDED = ("coco20i", "pascal5i")
"""Adapters of data sets whose classes are divided into folds."""


def open_adapter(name: str, folder: Path, *, fold: int | Literal["all"] | None = None) -> Adapter:
    """The adapter `name` on the raw data in `folder`.

    Args:
        name: a key of `ADAPTERS`.
        folder: of the raw files.
        fold: which one is tested on, for the adapters in `FOLDED` and no others; "all" goes with any adapter and
            opens what is there, to look a folder through.

    Raises:
        DataError: there is no adapter of that name, the folder lacks what it needs, or it has folds and none is
            named (or the other way round).
    """
    if name not in ADAPTERS:
        raise DataError(
            found=f"the adapter `{name}`",
            allowed=f"one of {', '.join(sorted(ADAPTERS))}",
            fix="set `data.adapter` in params.yaml (or `--adapter`) to one of them",
        )
    module, _, attribute = ADAPTERS[name].partition(":")
    kind: Any = getattr(importlib.import_module(module), attribute)
    if name in FOLDED and fold is not None:
        return kind(Path(folder), fold=None if fold == "all" else fold)
    if name not in FOLDED and fold in (None, "all"):
        return kind(Path(folder))
    raise DataError(
        found=f"`data.fold: {'null' if fold is None else fold}` with the adapter `{name}`",
        allowed="0 to 3, the fold that is tested on"
        if name in FOLDED
        else f"null; only {', '.join(FOLDED)} have folds",
        fix="set `data.fold` in params.yaml",
    )
