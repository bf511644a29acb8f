"""The class names of a data set and what is known about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lexiseg.errors import DataError
from lexiseg.storage import sha256_of_json


@dataclass(frozen=True)
class Vocabulary:
    """Class names in the order of their ids; id k on disk and in tensors is `names[k]`.

    Args:
        names: the C class names, as the data set spells them; none for pictures without any labels.
        synonyms: for a name, other words for the same class in order of preference. A table of text
            embeddings that lacks the name answers with the first of them that it has.
        seen: C flags; False = never labelled in training (zero-shot classes). Empty means all True.
        things: C flags; True = countable object, False = stuff. Empty means all False.
        templates: sentences with one `{}` each, into which a name is put before it is encoded.

    Raises:
        DataError: empty or repeated names, flags of another length, a synonym that means two classes,
            or a template without its `{}`.

    Example:
        >>> words = Vocabulary(names=("sky", "ring"), synonyms={"ring": ("hoop",)}, seen=(True, False))
        >>> words.index("ring"), words.unseen_names, words.words("ring")
        (1, ('ring',), ('ring', 'hoop'))
    """

    names: tuple[str, ...]
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    seen: tuple[bool, ...] = ()
    things: tuple[bool, ...] = ()
    templates: tuple[str, ...] = ("{}",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "synonyms", {name: tuple(words) for name, words in self.synonyms.items() if words})
        object.__setattr__(self, "seen", tuple(self.seen) or (True,) * len(self.names))
        object.__setattr__(self, "things", tuple(self.things) or (False,) * len(self.names))
        object.__setattr__(self, "templates", tuple(self.templates))
        faults = self._faults()
        if faults:
            raise DataError(
                found="a vocabulary with " + "; ".join(faults),
                allowed="unique, non-empty names; one seen and one thing flag per name; a synonym for one class only; "
                "templates with one {}",
                fix="correct the data set's list of classes",
            )

    def _faults(self) -> list[str]:
        faults = []
        bad = [name for name in self.names if not isinstance(name, str) or name != name.strip() or not name]
        if bad:
            faults.append(f"empty or padded names {bad}")
        twice = sorted({str(name) for name in self.names if self.names.count(name) > 1})
        if twice:
            faults.append(f"repeated names {twice}")
        for what, flags in (("seen", self.seen), ("things", self.things)):
            if len(flags) != len(self.names):
                faults.append(f"{len(flags)} `{what}` flags for {len(self.names)} names")
        strangers = sorted(set(self.synonyms) - set(self.names))
        if strangers:
            faults.append(f"synonyms for unknown names {strangers}")
        owner = {name: name for name in self.names}
        for name, words in self.synonyms.items():
            for word in words:
                if not word or word != word.strip():
                    faults.append(f"an empty or padded synonym of `{name}`")
                elif owner.setdefault(word, name) != name:
                    faults.append(f"the synonym `{word}` for both `{owner[word]}` and `{name}`")
        if not self.templates or any(template.count("{}") != 1 for template in self.templates):
            faults.append(f"templates {list(self.templates)}")
        return faults

    def __len__(self) -> int:
        return len(self.names)

    def require_names(self, *, needed_by: str, instead: str) -> None:
        """Refuse a data set without classes.

        Args:
            needed_by: what cannot do without class names.
            instead: what to set where there are none to be listed.

        Raises:
            DataError: there are no names.
        """
        if not self.names:
            raise DataError(
                found=f"{needed_by} on a data set without classes",
                allowed="a data set with class names",
                fix=f"list the classes in classes.txt of the raw data (docs/own-data.md), or {instead}",
            )

    def index(self, name: str) -> int:
        """Class id of a name. Raises DataError when it is not one of the names."""
        try:
            return self.names.index(name)
        except ValueError:
            raise DataError(
                found=f"the class name `{name}`",
                allowed=f"one of {', '.join(self.names)}" if self.names else "no name: the data set has no classes",
                fix="use a name of this vocabulary",
            ) from None

    def words(self, name: str) -> tuple[str, ...]:
        """The name and then its synonyms, in order of preference."""
        return (self.names[self.index(name)], *self.synonyms.get(name, ()))

    @property
    def seen_names(self) -> tuple[str, ...]:
        """Names that are labelled in training."""
        return tuple(name for name, seen in zip(self.names, self.seen, strict=True) if seen)

    @property
    def unseen_names(self) -> tuple[str, ...]:
        """Names that are never labelled in training."""
        return tuple(name for name, seen in zip(self.names, self.seen, strict=True) if not seen)

    @property
    def hash(self) -> str:
        """Hex sha256 of everything above; part of a protocol card."""
        return sha256_of_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain values for vocabulary.json."""
        return {
            "names": list(self.names),
            "synonyms": {name: list(words) for name, words in sorted(self.synonyms.items())},
            "seen": list(self.seen),
            "things": list(self.things),
            "templates": list(self.templates),
        }

    @classmethod
    def from_json(cls, value: Any) -> Vocabulary:
        """The inverse of `to_json`. Raises DataError for anything else."""
        try:
            return cls(
                names=tuple(value["names"]),
                synonyms={name: tuple(words) for name, words in value["synonyms"].items()},
                seen=tuple(bool(flag) for flag in value["seen"]),
                things=tuple(bool(flag) for flag in value["things"]),
                templates=tuple(value["templates"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                found=f"a vocabulary that cannot be read ({type(error).__name__}: {error})",
                allowed="an object with names, synonyms, seen, things and templates",
                fix="run `dvc repro prepare` to write vocabulary.json again",
            ) from error
