"""Search spaces: which settings a sweep changes, and where between it looks.

A space is a list of knobs. One grammar serves the command line, files and the spaces that methods declare:

    tcl.loss.area                   the range that the setting declares ("sweep" in params.yaml)
    tcl.loss.area=0.1..1,log        a range; `log` spreads values evenly over orders of magnitude
    lseg.model.block=none|depthwise choices
    stego.loss.shifts=fixed         one value: not searched, but the same in every trial
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lexiseg.errors import SettingsError
from lexiseg.methods import METHODS, resolve
from lexiseg.settings import Sweep, fields_of, read_yaml
from lexiseg.stages.settings import root_block

FORMS = "`KEY`, `KEY=low..high`, `KEY=low..high,log`, `KEY=a|b|c`, `KEY=value`"


@dataclass(frozen=True)
class Knob:
    """A setting that a sweep searches.

    Attributes:
        key: dotted key of params.yaml.
        low, high: ends of the range, both belong to it; None where there are choices.
        log: values are spread evenly over orders of magnitude.
        whole: only whole numbers.
        choices: values to choose from; empty where there is a range.
    """

    key: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    whole: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that have to be possible for the knob to be: both ends, or all choices."""
        if self.choices:
            return self.choices
        return tuple(int(end) if self.whole else end for end in (self.low, self.high) if end is not None)

    def holds(self, value: Any) -> bool:
        """Whether a value is one that the knob can take."""
        if self.low is None or self.high is None:
            return value in self.choices
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high

    def __str__(self) -> str:
        if self.choices:
            return f"{self.key}={'|'.join(map(text_of, self.choices))}"
        return f"{self.key}={self.low:.12g}..{self.high:.12g}{',log' if self.log else ''}"


@dataclass(frozen=True)
class Space:
    """What a sweep goes through.

    Attributes:
        name: for people: a declared space, a file's stem, or "custom".
        knobs: what is searched.
        fixed: what is set for all trials, by dotted key.
    """

    name: str
    knobs: tuple[Knob, ...]
    fixed: Mapping[str, Any]


def spaces_of(method: str) -> dict[str, tuple[str, ...]]:
    """The spaces that a method declares; the first is the usual one.

    Raises:
        SettingsError: no such method, or one without spaces.
    """
    if method not in METHODS or METHODS[method].spaces is None:
        raise SettingsError(
            found=f"no sweep of `{method}`",
            allowed=", ".join(name for name, entry in METHODS.items() if entry.spaces),
            fix="name one of these",
        )
    return resolve(str(METHODS[method].spaces))  # type: ignore[return-value]


def read_space(method: str, given: Iterable[str] = (), *, fixed: Iterable[str] = ()) -> Space:
    """The space that a user asks for.

    Args:
        method: name in the registry.
        given: knobs in the grammar above, names of declared spaces, and YAML files; none: the method's usual space.
        fixed: further `KEY=value` that all trials share.

    Raises:
        SettingsError: unknown keys, empty ranges and the like, all at once; or nothing to search.
    """
    declared = spaces_of(method)
    given = list(given) or [next(iter(declared))]
    names, texts, faults = [], [], []
    for text in given:
        if text in declared:
            names.append(text)
            texts += declared[text]
        elif Path(text).suffix in (".yaml", ".yml"):
            names.append(Path(text).stem)
            texts += _lines_of(Path(text))
        elif "=" in text or "." in text:
            texts.append(text)
        else:
            faults.append(
                (f"`{text}`", f"a space of {method} ({', '.join(declared)}), a YAML file, or a knob: {FORMS}")
            )
    fields = fields_of(root_block())
    knobs: dict[str, Knob] = {}
    settled: dict[str, Any] = {}
    for text in [*texts, *fixed]:
        try:
            found = _read(text, fields)
        except _FaultError as fault:
            faults.append(fault.args)
            continue
        # What is said later wins: a declared space can be narrowed on the command line.
        knobs.pop(key := found.key if isinstance(found, Knob) else found[0], None)
        settled.pop(key, None)
        if isinstance(found, Knob):
            knobs[key] = found
        else:
            settled[key] = found[1]
    if not knobs and not faults:
        faults.append((f"{', '.join(given)}: only fixed values", f"at least one knob to search: {FORMS}"))
    if faults:
        raise SettingsError(
            found=f"{len(faults)} fault(s) in the space:" + "".join(f"\n  - {found}" for found, _ in faults),
            allowed="".join(f"\n  - {allowed}" for allowed in dict.fromkeys(allowed for _, allowed in faults)),
            fix="correct --space and --set; params.yaml documents each key where it stands",
        )
    plain = len(names) == len(given) == 1
    return Space(name=names[0] if plain else "custom", knobs=tuple(knobs.values()), fixed=settled)


class _FaultError(Exception):
    """What was found, and what is allowed."""


def read_knob(text: str) -> Knob:
    """A knob of the form that `str` gives it.

    Raises:
        SettingsError: there is no such setting any more.
    """
    try:
        found = _read(text, fields_of(root_block()))
    except _FaultError:
        found = None
    if isinstance(found, Knob):
        return found
    raise SettingsError(
        found=f"the knob `{text}`, which this version does not know",
        allowed=f"a knob: {FORMS}",
        fix="check out the version that the study was made with",
    )


def _read(text: str, fields: Mapping[str, FieldInfo]) -> Knob | tuple[str, Any]:
    key, equals, value = (part.strip() for part in text.partition("="))
    if key not in fields:
        raise _FaultError(*_unknown(key, fields))
    kinds = _kinds(fields[key].annotation)
    whole, numeric = kinds == {int}, bool(kinds & {int, float})
    if not equals:
        declared = next((found for found in fields[key].metadata if isinstance(found, Sweep)), None)
        if declared is None:
            raise _FaultError(f"`{key}` declares no range", f"`{key}=low..high`, `{key}=a|b|c` or `{key}=value`")
        return Knob(key, declared.low, declared.high, log=declared.log, whole=whole)
    if ".." in value and numeric:
        return _range(key, value, whole=whole)
    if "|" in value:
        choices = tuple(_value(key, part) for part in value.split("|"))
        if len(set(map(text_of, choices))) < len(choices):
            raise _FaultError(f"`{text}` names a choice twice", f"different choices of `{key}`")
        return Knob(key, choices=choices)
    return key, _value(key, value)


def _range(key: str, text: str, *, whole: bool) -> Knob:
    ends, _, scale = text.partition(",")
    low, _, high = ends.partition("..")
    allowed = f"`{key}=low..high`, two numbers, the first below the second"
    try:
        numbers = float(low), float(high)
    except ValueError:
        raise _FaultError(f"`{key}={text}`", allowed) from None
    if scale.strip() not in ("", "log"):
        raise _FaultError(f"`{key}={text}`", f"`{key}=low..high` or `{key}=low..high,log`")
    if not numbers[0] < numbers[1] or not all(map(math.isfinite, numbers)):
        raise _FaultError(f"`{key}={text}`, an empty range", allowed)
    if scale and numbers[0] <= 0:
        raise _FaultError(f"`{key}={text}`", f"a range above 0 for `log`, or `{key}={ends}`")
    if whole and not all(number.is_integer() for number in numbers):
        raise _FaultError(f"`{key}={text}`", f"whole numbers: `{key}` counts something")
    return Knob(key, *numbers, log=bool(scale), whole=whole)


def _value(key: str, text: str) -> Any:
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        raise _FaultError(f"`{key}={text}`", f"`{key}=value` in YAML") from None
    if isinstance(value, Mapping):
        raise _FaultError(f"`{key}={text}`, a block", "keys one by one")
    return value


def _unknown(key: str, fields: Iterable[str]) -> tuple[str, str]:
    fields = list(fields)
    block = key.rpartition(".")[0]
    while block and not any(name.startswith(f"{block}.") for name in fields):
        block = block.rpartition(".")[0]
    close = difflib.get_close_matches(key, fields, n=1)
    inside = [name for name in fields if name.startswith(f"{block}.")] if block else fields
    return f"`{key}`: unknown knob" + (f" (did you mean `{close[0]}`?)" if close else ""), ", ".join(inside)


def _lines_of(path: Path) -> list[str]:
    """The knobs in a YAML file: `key: low..high`, `key: [a, b]`, `key: value`, or `key:` for the declared range."""
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise SettingsError(
            found=f"{path} holds no knobs",
            allowed="a line per knob: `KEY: low..high`, `KEY: [a, b]`, `KEY: value`, or `KEY:` for the declared range",
            fix=f"correct {path}",
        )
    return [
        str(key)
        if value is None
        else f"{key}={'|'.join(map(text_of, value)) if isinstance(value, list) else text_of(value)}"
        for key, value in content.items()
    ]


def text_of(value: Any) -> str:
    """A value as the grammar writes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _kinds(annotation: Any) -> set[Any]:
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    plain = (get_args(option)[0] if get_origin(option) is Annotated else option for option in options)
    return {option for option in plain if option is not type(None)}
