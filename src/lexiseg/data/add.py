"""Add a data set of one's own: `lexiseg data add NAME PATH --adapter …`.

The files go to data/NAME, and data.dvc gets an entry without a remote that says `push: false`: without that,
`dvc push -r embedded` would put the pictures into the folder that is committed with the repository. To share
them, replace that line by `remote: NAME` with a remote of your own. Running it again changes nothing.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lexiseg.data.adapters import open_adapter
from lexiseg.data.adapters.base import Adapter
from lexiseg.data.adapters.files import pixel_limit
from lexiseg.errors import DataError
from lexiseg.storage import atomic_path, hash_tree, sha256_of_file, write_text

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True)
class Added:
    """What `add_data` did.

    Attributes:
        folder: data/<name> below the root.
        splits: samples per split.
        classes: number of class names.
        changed: False when everything was there before.
        commands: the dvc commands that record it, each as arguments after `dvc`, to be run in the root.
    """

    folder: Path
    splits: dict[str, int]
    classes: int
    changed: bool
    commands: tuple[tuple[str, ...], ...]


def add_data(name: str, path: Path, *, adapter: str, root: Path, max_pixels: int) -> Added:
    """Check a data set, put it into data/<name> and name it in data.dvc.

    Hidden files (`.git`, `.DS_Store`) are left out. The copy is made beside its place and renamed when it is
    whole, so an interruption leaves nothing half-written.

    Args:
        name: small letters, digits, - and _.
        path: folder of the raw files.
        adapter: name of the adapter that reads it.
        root: the working tree.
        max_pixels: the setting `data.max_pixels`, for the pictures read as a check.

    Raises:
        DataError: a bad name, no such folder, a layout that the adapter cannot read, links out of the folder,
            or other data of that name.
    """
    path, target = Path(path).expanduser().resolve(), root / "data" / name
    if not _NAME.fullmatch(name):
        raise DataError(
            found=f"the data set name `{name}`",
            allowed="small letters, digits, - and _, beginning with a letter or digit",
            fix="choose such a name",
        )
    if not path.is_dir():
        raise DataError(
            found=f"no folder {path}", allowed="the folder of the raw files", fix="check the path after the name"
        )
    source = open_adapter(adapter, path, fold="all")
    splits, classes = _check_layout(source, max_pixels=max_pixels), len(source.vocabulary())
    ignored = _ignore(root / "data" / ".gitignore", f"/{name}")
    copied = _place(path, target)
    named = _name_in_data_dvc(root / "data.dvc", f"data/{name}")
    return Added(
        folder=target,
        splits=splits,
        classes=classes,
        changed=copied or named or ignored,
        commands=(("commit", "--force", "data.dvc"),),
    )


def _check_layout(adapter: Adapter, *, max_pixels: int) -> dict[str, int]:
    counts = {}
    for split in adapter.splits():
        samples = list(adapter.samples(split))
        counts[split] = len(samples)
        if samples:
            with pixel_limit(max_pixels):
                samples[0].load()
    if not any(counts.values()):
        raise DataError(
            found="no sample in any split",
            allowed="at least one picture",
            fix=f"check the path and the adapter (`{adapter.name}`)",
        )
    return counts


def _files(folder: Path) -> dict[str, Path]:
    files = {}
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for entry in sorted([*folders, *names]):
            file = Path(parent, entry)
            if file.is_symlink() and not file.resolve().is_relative_to(folder):
                raise DataError(
                    found=f"{file.relative_to(folder)} is a link out of the folder, to {file.resolve()}",
                    allowed="files inside the folder",
                    fix="replace the link by the files themselves",
                )
            if file.is_symlink() and file.is_dir():
                raise DataError(
                    found=f"{file.relative_to(folder)} is a link to a folder",
                    allowed="files and folders themselves",
                    fix="replace the link by the files themselves",
                )
            if file.is_file() and not entry.startswith("."):
                files[file.relative_to(folder).as_posix()] = file
    return files


def _place(path: Path, target: Path) -> bool:
    if target.resolve() == path:  # `lexiseg data add x data/x`
        return False
    files = _files(path)
    if target.exists():
        if hash_tree(target) == {relative: sha256_of_file(file) for relative, file in files.items()}:
            return False
        raise DataError(
            found=f"data/{target.name} exists and holds other files",
            allowed="a new name, or the same files again",
            fix=f"choose another name, or remove data/{target.name} and its entry in data.dvc first",
        )
    with atomic_path(target) as temporary:
        for relative, file in files.items():
            place = temporary / relative
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
    return True


def _name_in_data_dvc(file: Path, path: str) -> bool:
    yaml = YAML()  # round trip: comments and other entries stay as they are
    yaml.width = 4096
    try:
        content = yaml.load(file.read_text(encoding="utf-8")) if file.is_file() else {"outs": []}
        paths = [entry["path"] for entry in content["outs"]]
    except (YAMLError, KeyError, TypeError) as error:
        raise DataError(
            found=f"{file.name} cannot be read ({' '.join(str(error).split())})",
            allowed="a DVC file: `outs:` with a list of entries with `path:`",
            fix=f"restore it, e.g. `git checkout {file.name}`",
        ) from error
    if path in paths:
        return False
    content["outs"].append({"path": path, "push": False})
    text = StringIO()
    yaml.dump(content, text)
    write_text(file, text.getvalue())
    return True


def _ignore(file: Path, line: str) -> bool:
    # dvc adds this line as well, but only once it has hashed the files; until then git would offer them.
    before = file.read_text(encoding="utf-8") if file.is_file() else ""
    if line in before.splitlines():
        return False
    write_text(file, before + ("" if not before or before.endswith("\n") else "\n") + line + "\n")
    return True
