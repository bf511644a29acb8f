"""Profiles: params.yaml is profiles/embedded.yaml plus what one profile changes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq

from lexiseg.errors import SettingsError
from lexiseg.settings import override, read_yaml
from lexiseg.storage import write_text

BASE = "embedded"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def profile_names(root: Path) -> list[str]:
    """The profiles of a working tree, the default first."""
    names = sorted(path.stem for path in (root / "profiles").glob("*.yaml"))
    return sorted(names, key=lambda name: name != BASE)


def render_profile(root: Path, name: str) -> str:
    """The text of params.yaml under a profile: the default's text and comments with the profile's values.

    Raises:
        SettingsError: no such profile.
    """
    if name not in profile_names(root):
        raise SettingsError(
            found=f"no profile `{name}`",
            allowed=", ".join(profile_names(root)),
            fix="`lexiseg profile list` shows them; a new one is a file in profiles/",
        )
    text = (root / "profiles" / f"{BASE}.yaml").read_text(encoding="utf-8")
    return text if name == BASE else _edited(text, read_yaml(root / "profiles" / f"{name}.yaml"))


def edit_params(root: Path, changes: Mapping[str, Any]) -> None:
    """Change settings in params.yaml, by dotted key; its comments stay."""
    path = root / "params.yaml"
    if changes:
        write_text(path, _edited(path.read_text(encoding="utf-8"), override({}, changes)))


def _edited(text: str, changes: Mapping[str, Any]) -> str:
    editor = YAML()
    editor.width = 200
    editor.indent(mapping=2, sequence=4, offset=2)
    # By itself it leaves the place of a null empty, as if a value had been forgotten.
    editor.representer.add_representer(
        type(None), lambda writer, _: writer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    values = editor.load(text)
    _merge(values, changes)
    stream = StringIO()
    editor.dump(values, stream)
    return stream.getvalue()


def use_profile(root: Path, name: str, *, force: bool = False) -> str:
    """Write params.yaml for a profile.

    Returns:
        The name of the profile that was in use before.

    Raises:
        SettingsError: no such profile, or params.yaml holds edits that no profile has (unless `force`).
    """
    text = render_profile(root, name)
    current = read_yaml(root / "params.yaml") or {}
    before = str(current.get("profile", "?"))
    edits = unsaved_edits(root)
    if edits and not force:
        raise SettingsError(
            found=f"params.yaml differs from its profile `{before}` in {', '.join(edits)}",
            allowed="a params.yaml without unsaved edits",
            fix="`lexiseg profile save NAME` keeps them as a profile; --force drops them",
        )
    write_text(root / "params.yaml", text)
    return before


def save_profile(root: Path, name: str, *, changes: Mapping[str, Any] | None = None) -> list[str]:
    """Write what params.yaml changes against the default as profiles/NAME.yaml, and use it.

    Args:
        root: the working tree.
        name: of the profile.
        changes: more changes, nested or by dotted keys.

    Returns:
        The dotted keys that the profile holds.

    Raises:
        SettingsError: the name is taken, or not one for a file.
    """
    path = check_new_profile(root, name)
    base = read_yaml(root / "profiles" / f"{BASE}.yaml")
    current = override(read_yaml(root / "params.yaml"), {**(changes or {}), "profile": name})
    stream = StringIO()
    YAML().dump(_changed(base, current), stream)
    write_text(path, f"# What differs from the embedded profile; saved as the profile {name}.\n" + stream.getvalue())
    use_profile(root, name, force=True)
    return sorted(differences(base, current))


def check_new_profile(root: Path, name: str) -> Path:
    """The file of a profile that is to be made.

    Raises:
        SettingsError: the name is taken, or not one for a file.
    """
    if not _NAME.fullmatch(name):
        raise SettingsError(
            found=f"the profile name `{name}`",
            allowed="small letters, digits, - and _, beginning with a letter or digit",
            fix="choose such a name",
        )
    path = root / "profiles" / f"{name}.yaml"
    if path.exists():
        raise SettingsError(
            found=f"a profile `{name}` exists already", allowed="a new name", fix=f"choose another name, or edit {path}"
        )
    return path


def unsaved_edits(root: Path) -> list[str]:
    """Dotted keys in which params.yaml differs from the profile it names."""
    current = read_yaml(root / "params.yaml") or {}
    name = current.get("profile")
    if name not in profile_names(root):
        return ["profile"]
    expected = YAML(typ="safe", pure=True).load(render_profile(root, str(name)))
    return sorted(differences(expected, current))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Dotted keys whose values differ, with the new value (None where the key is gone)."""
    result: dict[str, Any] = {}
    for key in {*old, *new}:
        path = f"{prefix}{key}"
        if isinstance(old.get(key), Mapping) and isinstance(new.get(key), Mapping):
            result |= differences(old[key], new[key], prefix=f"{path}.")
        elif key not in old or key not in new or old[key] != new[key]:
            result[path] = new.get(key)
    return result


def _merge(values: Any, changes: Mapping[str, Any]) -> None:
    # In place: only so the comments of the default's text stay where they are.
    for key, change in changes.items():
        if isinstance(change, Mapping) and isinstance(values.get(key), Mapping) and values[key]:
            _merge(values[key], change)
        elif isinstance(change, list) and isinstance(old := values.get(key), CommentedSeq) and old.fa.flow_style():
            old[:] = change  # it stays on one line
        else:
            values[key] = change


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _changed(old[key], value) if isinstance(value, Mapping) and isinstance(old.get(key), Mapping) else value
        for key, value in new.items()
        if key not in old or old[key] != value
    }
