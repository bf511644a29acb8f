"""Adapters turn raw data sets into samples; `ADAPTERS` names them.

A new one is a class with the members of `lexiseg.data.adapters.base.Adapter`, in a file of its own, and one
line in the table below.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from lexiseg.data.adapters.base import Adapter
from lexiseg.errors import DataError

ADAPTERS: dict[str, str] = {
    "camvid": "lexiseg.data.adapters.camvid:CamvidAdapter",
    "folder": "lexiseg.data.adapters.folder:FolderAdapter",
    "world": "lexiseg.data.adapters.world:WorldAdapter",
}
"""Adapter classes by name, as `module:class`; a module is imported when its adapter is opened."""


def open_adapter(name: str, folder: Path) -> Adapter:
    """The adapter `name` on the raw data in `folder`.

    Raises:
        DataError: there is no adapter of that name, or the folder lacks what it needs.
    """
    if name not in ADAPTERS:
        raise DataError(
            found=f"the adapter `{name}`",
            allowed=f"one of {', '.join(sorted(ADAPTERS))}",
            fix="set `data.adapter` in params.yaml (or `--adapter`) to one of them",
        )
    module, _, attribute = ADAPTERS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)(Path(folder))
