"""params.yaml as typed blocks: unknown keys and wrong values are refused, all of them at once.

This file knows no method by name: a method's block is a subclass of `Block` in its own folder, and
`lexiseg.stages.settings.Root` puts the blocks together.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lexiseg.errors import SettingsError


class Block(BaseModel):
    """A part of params.yaml. Fields are typed; unknown keys are refused; values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


@dataclass(frozen=True)
class Sweep:
    """A range of a setting that is worth searching, as metadata of its field.

    Example:
        >>> class Train(Block):
        ...     lr: Annotated[float, Sweep(1e-4, 1e-2, log=True)]

    Attributes:
        low, high: both ends belong to it.
        log: values are spread evenly over orders of magnitude.
    """

    low: float
    high: float
    log: bool = False


_KINDS: dict[Any, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Any: "anything"}
BlockType = TypeVar("BlockType", bound=Block)


def read_yaml(path: Path | str) -> Any:
    """Read YAML 1.2 (so `1e-3` is a number) by a safe loader.

    Raises:
        SettingsError: the file is missing or not YAML.
    """
    path = Path(path)
    if not path.is_file():
        raise SettingsError(
            found=f"no file {path}", allowed="a YAML file", fix="run the command in the folder that holds params.yaml"
        )
    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(
            found=f"{path} is not valid YAML: {' '.join(str(error).split())}",
            allowed="YAML 1.2",
            fix="correct the line that is named",
        ) from error


def parse(values: Any, block: type[BlockType], *, source: str = "params.yaml") -> BlockType:
    """Turn plain values into a typed block.

    Raises:
        SettingsError: one line per unknown key, missing key or wrong value, each with what is allowed.
    """
    try:
        return block.model_validate(_lists_to_tuples(values))
    except ValidationError as error:
        found = error.errors()
        # Of a wrong value and of the list or block that holds it, only the inner one tells something.
        holders = {fault["loc"][:depth] for fault in found for depth in range(len(fault["loc"]))}
        faults = sorted(_describe(fault, block) for fault in found if fault["loc"] not in holders)
        raise SettingsError(
            found=f"{len(faults)} fault(s) in {source}:" + "".join(f"\n  - {fault[0]}" for fault in faults),
            allowed="".join(f"\n  - {fault[1]}" for fault in faults),
            fix=f"edit {source}; each key is documented where it stands",
        ) from error


def fields_of(block: type[BaseModel], *, prefix: str = "") -> dict[str, FieldInfo]:
    """The settings of a block and of those in it, by dotted key; blocks themselves are not among them."""
    found: dict[str, FieldInfo] = {}
    for name, info in block.model_fields.items():
        inner = [kind for kind in _options(info.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        for kind in inner:
            found |= fields_of(kind, prefix=f"{prefix}{name}.")
        if not inner:
            found[f"{prefix}{name}"] = info
    return found


def override(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested `values` with `changes` on top.

    Args:
        values: nested plain values, as read from params.yaml.
        changes: nested values, or dotted keys (`{"lseg.train.steps": 10}`). A mapping is merged key by key;
            anything else replaces what was there.
    """
    result = {key: override(value, {}) if isinstance(value, Mapping) else value for key, value in values.items()}
    for key, change in changes.items():
        head, _, rest = str(key).partition(".")
        if rest:
            change = {rest: change}
        old = result.get(head)
        if isinstance(change, Mapping) and (isinstance(old, Mapping) or rest):
            result[head] = override(old if isinstance(old, Mapping) else {}, change)
        else:
            result[head] = change
    return result


class View:
    """Settings as a stage may see them: only the keys its `params:` in dvc.yaml declare.

    DVC re-runs a stage when a declared parameter changes; reading any other one would let a result go
    stale unnoticed, so it raises.

    Args:
        block: the settings.
        declared: dotted keys; a key opens itself and everything below it.
    """

    def __init__(self, block: Any, declared: Iterable[str], *, prefix: str = "") -> None:
        self._block, self._declared, self._prefix = block, tuple(declared), prefix

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self._block, name)
        path = f"{self._prefix}{name}"
        if any(path == key or path.startswith(f"{key}.") for key in self._declared):
            return value
        if any(key.startswith(f"{path}.") for key in self._declared):
            return View(value, self._declared, prefix=f"{path}.")
        raise SettingsError(
            found=f"a stage reads the parameter `{path}`, which its entry in dvc.yaml does not declare",
            allowed=f"the declared ones: {', '.join(self._declared)}",
            fix=f"add `{path}` to the stage's `params:` in dvc.yaml",
        )


def _lists_to_tuples(value: Any) -> Any:
    # Blocks are frozen, so their sequences are tuples; strict mode would refuse YAML's lists for them.
    if isinstance(value, Mapping):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_lists_to_tuples(item) for item in value)
    return value


def _describe(fault: Any, block: type[Block]) -> tuple[str, str]:
    path = [str(part) for part in fault["loc"]]
    name = ".".join(path) or "top level"
    if fault["type"] == "extra_forbidden":
        owner = _block_at(block, path[:-1])
        fields = list(owner.model_fields) if owner else []
        close = difflib.get_close_matches(path[-1], fields, n=1)
        hint = f" (did you mean `{close[0]}`?)" if close else ""
        return f"`{name}`: unknown key{hint}", f"`{'.'.join(path[:-1]) or 'top level'}`: {', '.join(fields)}"
    if fault["type"] == "missing":
        return f"`{name}`: missing", f"`{name}`: {_allowed(block, path)}"
    shown = json.dumps(fault["input"], ensure_ascii=False, skipkeys=True, default=str)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    if fault["type"] == "value_error":  # a check of our own; its message is what is allowed
        whole_block = isinstance(fault["input"], Mapping)
        return (
            f"`{name}`: {'values that do not go together' if whole_block else shown}",
            f"`{name}`: {fault['ctx']['error']}",
        )
    return f"`{name}`: {shown}", f"`{name}`: {_allowed(block, path)} ({fault['msg']})"


def _field_type(block: type[Block], path: list[str]) -> Any:
    kind: Any = block
    for part in path:
        found = None
        for option in _options(kind):
            if isinstance(option, type) and issubclass(option, BaseModel) and part in option.model_fields:
                found = option.model_fields[part].annotation
            elif get_origin(option) in (dict, tuple, list):
                found = get_args(option)[-1] if get_origin(option) is dict else get_args(option)[0]
        if found is None:
            return kind
        kind = found
    return kind


def _options(kind: Any) -> tuple:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _block_at(block: type[Block], path: list[str]) -> type[Block] | None:
    for option in _options(_field_type(block, path)):
        if isinstance(option, type) and issubclass(option, Block):
            return option
    return None


def _allowed(block: type[Block], path: list[str]) -> str:
    words = []
    for option in _options(_field_type(block, path)):
        if get_origin(option) is Literal:
            words.append("one of " + ", ".join(str(value) for value in get_args(option)))
        elif option is type(None):
            words.append("null")
        elif get_origin(option) is not None:
            words.append("a list" if get_origin(option) is tuple else "a block")
        elif isinstance(option, type) and issubclass(option, BaseModel):
            words.append("a block with " + ", ".join(option.model_fields))
        else:
            words.append(_KINDS.get(option, str(option)))
    return " or ".join(words)
