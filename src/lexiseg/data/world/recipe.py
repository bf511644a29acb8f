"""The world's recipe (`data/world/world.yaml`) as typed blocks; its keys are documented in that file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, ValidatorFunctionWrapHandler, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from lexiseg.settings import Block, parse, read_yaml

# How pydantic names the faults that are found here.
_OWN = "recipe_fault"


def _fault(message: str) -> PydanticCustomError:
    return PydanticCustomError(_OWN, "{message}", {"message": message})


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise _fault("the first number must not be above the second")
    return pair


def _sums_to_one(values: tuple[float, ...]) -> tuple[float, ...]:
    if abs(sum(values) - 1) > 1e-6:
        raise _fault(f"probabilities that sum to 1, these sum to {sum(values):g}")
    return values


def _have_place(templates: tuple[str, ...]) -> tuple[str, ...]:
    if any(template.count("{}") != 1 for template in templates):
        raise _fault("templates that hold {} exactly once")
    return templates


Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Byte = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[Byte, Byte, Byte]
ShareRange = Annotated[tuple[Share, Share], AfterValidator(_ascending)]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]
Word = Annotated[str, Field(pattern=r"^[a-z]+$")]
Texture = Literal["sky", "grass", "sand", "water", "brick", "snow", "wood", "rock", "lava", "forest"]
Shape = Literal["disk", "ring", "square", "triangle", "star", "cross", "heart", "crescent", "arrow", "hourglass"]
Pattern = Literal["plain", "striped", "dotted", "checkered"]


class StuffClass(Block):
    texture: Texture
    colours: tuple[Colour, Colour]
    unseen: bool


class ThingClass(Block):
    shape: Shape
    colour: str
    pattern: Pattern
    unseen: bool


class Paint(Block):
    first: Colour
    second: Colour


class TextureSettings(Block):
    variants: Count
    size: Annotated[int, Field(ge=16, le=1024)]
    gain: Share


class Horizon(Block):
    height: ShareRange
    tilt: Annotated[float, Field(ge=0)]
    wobble: Share


class Patch(Block):
    radius: PositiveRange
    centre: ShareRange
    roughness: Annotated[float, Field(ge=0, le=0.3)]


class Objects(Block):
    small: PositiveRange
    large: PositiveRange
    large_probability: Share
    rotation: Annotated[float, Field(ge=0, le=180)]
    period: PositiveRange
    tries: Annotated[int, Field(ge=1, le=9)]
    overlap: Annotated[float, Field(ge=0)]
    rim: Share
    shading: Share
    visible: Share
    area: Share


class Light(Block):
    gain: Share
    gradient: Share
    noise: Annotated[float, Field(ge=0)]


class CaptionMix(Block):
    rich: Share
    nouns: Share
    partial: Share
    short: Share


class Kind(Block):
    regions: Annotated[tuple[Share, Share, Share], AfterValidator(_sums_to_one)]
    objects: Annotated[tuple[Share, ...], Field(min_length=1, max_length=9), AfterValidator(_sums_to_one)]
    margin: Annotated[float, Field(ge=0, le=0.5)]
    radius_cap: Positive
    captions: CaptionMix


class Kinds(Block):
    scene: Kind
    iconic: Kind


class Attributes(Block):
    colour: Share
    pattern: Share
    size: Share


class PartialForm(Attributes):
    mentions: Annotated[tuple[Count, Count], AfterValidator(_ascending)]


class ShortForm(Attributes):
    regions: Share


class Language(Block):
    rich: Attributes
    partial: PartialForm
    short: ShortForm
    max_words: Count
    phrases: Annotated[int, Field(ge=0)]
    questions: Annotated[int, Field(ge=0)]
    templates: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_have_place)]


class Split(Block):
    seed: Seed
    count: Annotated[int, Field(ge=1, lt=2**32)]
    size: Annotated[int, Field(ge=16)]
    kind: Literal["scene", "iconic"]
    canonical: Share
    captions: Count
    full_caption: bool


class Recipe(Block):
    """All numbers of the world."""

    seed: Seed
    unit: Positive
    stuff: Annotated[dict[Word, StuffClass], Field(min_length=3)]
    things: Annotated[dict[Word, ThingClass], Field(min_length=1)]
    colours: Annotated[dict[Word, Paint], Field(min_length=1)]
    texture: TextureSettings
    horizon: Horizon
    patch: Patch
    objects: Objects
    light: Light
    kinds: Kinds
    language: Language
    splits: Annotated[dict[str, Split], Field(min_length=1)]

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in the order of their ids: stuff, then things."""
        return (*self.stuff, *self.things)

    @property
    def unseen(self) -> tuple[bool, ...]:
        """For each class, whether it is left out of the dense labels of training."""
        return tuple(kind.unseen for kind in (*self.stuff.values(), *self.things.values()))

    @model_validator(mode="wrap")
    @classmethod
    def _check_whole(cls, values: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        # Checks across keys run on the plain values, so that they are reported together with wrong types.
        faults = _faults_across_keys(values) if isinstance(values, Mapping) else []
        try:
            recipe = handler(values)
        except ValidationError as error:
            for fault in error.errors():
                context = fault.get("ctx", {})
                kind = _fault(context["message"]) if fault["type"] == _OWN else fault["type"]
                faults.append(InitErrorDetails(type=kind, loc=fault["loc"], input=fault["input"], ctx=context))
            raise ValidationError.from_exception_data("Recipe", faults) from None
        if faults:
            raise ValidationError.from_exception_data("Recipe", faults)
        return recipe


def read_recipe(path: Path | str) -> Recipe:
    """Read a recipe file.

    Raises:
        SettingsError: the file is missing, is not YAML, or has unknown keys or wrong values; all are named at once.
    """
    return parse(read_yaml(path), Recipe, source=Path(path).name)


def _faults_across_keys(values: Mapping[str, Any]) -> list[InitErrorDetails]:
    faults: list[InitErrorDetails] = []

    def blame(loc: tuple[str, ...], value: Any, message: str) -> None:
        faults.append(InitErrorDetails(type=_fault(message), loc=loc, input=value))

    def table(*path: str) -> Mapping[str, Any]:
        found: Any = values
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found if isinstance(found, Mapping) else {}

    colours = list(table("colours"))
    for name, thing in table("things").items():
        if isinstance(thing, Mapping) and isinstance(thing.get("colour"), str) and thing["colour"] not in colours:
            blame(("things", name, "colour"), thing["colour"], f"one of `colours`: {', '.join(colours)}")
        if name in table("stuff"):
            blame(("things", name), name, "a name that `stuff` does not have")
    owners: dict[int, str] = {}
    largest = table("texture").get("size")
    for name in table("splits"):
        seed, size = table("splits", name).get("seed"), table("splits", name).get("size")
        if isinstance(seed, int) and owners.setdefault(seed, name) != name:
            blame(("splits", name, "seed"), seed, f"a seed of its own; `{owners[seed]}` has this one")
        if isinstance(size, int) and isinstance(largest, int) and size > largest:
            blame(("splits", name, "size"), size, f"at most `texture.size`, {largest}")
    most = 0
    for name, kind in table("kinds").items():
        mix, counts = table("kinds", name, "captions"), kind.get("objects") if isinstance(kind, Mapping) else None
        total = sum(share for share in mix.values() if isinstance(share, (int, float)))
        if mix and abs(total - 1) > 1e-6:
            blame(("kinds", name, "captions"), dict(mix), f"probabilities that sum to 1, these sum to {total:g}")
        most = max(most, len(counts) - 1) if isinstance(counts, (list, tuple)) else most
    limit = table("language").get("max_words")
    # "a ring" and the word "and" per object, one word more for "left of", "on x under y with a patch of z"
    least = 3 * most + 9
    if isinstance(limit, int) and limit < least:
        blame(("language", "max_words"), limit, f"at least {least}, so that a caption can name {most} objects")
    return faults
