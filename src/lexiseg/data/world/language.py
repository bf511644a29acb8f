"""What can be said about a scene: captions, referring phrases, questions with answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from lexiseg.data.world.recipe import Attributes, Recipe, Split
from lexiseg.data.world.scene import Drawing, Region, Thing

Item = TypeVar("Item")

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
_GRAMMAR = (
    "a the every left of right above below and on under with patch small large striped dotted checkered plain "
    "what colour pattern is how many things are there yes no"
)
_ALL = Attributes(colour=1.0, pattern=1.0, size=1.0)


class Dice:
    """Uniform numbers of a scene's generator, drawn in blocks because single draws are slow."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._numbers: Iterator[float] = iter(())

    def roll(self) -> float:
        """The next number in [0, 1)."""
        number = next(self._numbers, None)
        if number is None:
            self._numbers = iter(self._rng.random(256).tolist())
            number = next(self._numbers)
        return number

    def choose(self, items: Sequence[Item]) -> Item:
        return items[int(self.roll() * len(items))]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = int(self.roll() * (last + 1))
            result[last], result[other] = result[other], result[last]
        return result


def words(recipe: Recipe) -> tuple[str, ...]:
    """Every word that captions, phrases, questions, answers and templates of this recipe can hold, sorted."""
    most = max(len(recipe.kinds.scene.objects), len(recipe.kinds.iconic.objects))
    found = {*_GRAMMAR.split(), *recipe.names, *recipe.colours, *NUMBERS[:most]}
    for template in recipe.language.templates:
        found.update(template.replace("{}", " ").split())
    return tuple(sorted(found))


class Speaker:
    """Says things about drawn scenes, by the grammar of the recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._language = recipe, recipe.language

    def captions(self, drawing: Drawing, split: Split, dice: Dice) -> tuple[str, ...]:
        """`split.captions` captions of what is visible enough; the first is the full one where the split says so."""
        regions = [region for region in drawing.regions if region.said]
        things = [thing for thing in drawing.things if thing.said]
        mix = getattr(self._recipe.kinds, split.kind).captions
        result = []
        for number in range(split.captions):
            roll = dice.roll()
            if number == 0 and split.full_caption:
                result.append(self._rich(regions, things, _ALL, dice))
            elif roll < mix.rich:
                result.append(self._rich(regions, things, self._language.rich, dice))
            elif roll < mix.rich + mix.nouns:
                names = dict.fromkeys(item.name for item in (*regions, *things))
                result.append(" and ".join(dice.shuffled(list(names))))
            elif roll < mix.rich + mix.nouns + mix.partial:
                result.append(self._partial(regions, things, dice))
            else:
                form = self._language.short
                said = regions if not things or dice.roll() < form.regions else []
                result.append(self._rich(said, things, form, dice))
        return tuple(result)

    def _rich(self, regions: list[Region], things: list[Thing], form: Attributes, dice: Dice) -> str:
        things = dice.shuffled(things)
        mentions = [_attributes(thing, form, dice) for thing in things]
        setting = _setting(regions, bool(things))
        links = [""] + [" and "] * (len(things) - 1)
        if len(things) > 1:
            links[1] = f" {_relation(things[0], things[1])} "
        self._shorten(mentions, len(" ".join([*links, setting]).split()) + 2 * len(things))
        text = "".join(
            f"{link}{_phrase('a', mention, thing)}"
            for link, mention, thing in zip(links, mentions, things, strict=False)
        )
        return f"{text} {setting}".strip()

    def _shorten(self, mentions: list[dict[str, str]], fixed: int) -> None:
        surplus = fixed + sum(map(len, mentions)) - self._language.max_words
        for attribute in ("size", "pattern", "colour"):
            for mention in reversed(mentions):
                if surplus > 0 and mention.pop(attribute, None):
                    surplus -= 1

    def _partial(self, regions: list[Region], things: list[Thing], dice: Dice) -> str:
        form = self._language.partial
        least, most = form.mentions
        chosen = dice.shuffled([*regions, *things])[: least + int(dice.roll() * (most - least + 1))]
        mentions = [_attributes(item, form, dice) if isinstance(item, Thing) else {} for item in chosen]
        self._shorten(mentions, sum(3 if isinstance(item, Thing) else 2 for item in chosen) - 1)
        return " and ".join(
            _phrase("a", mention, item) if isinstance(item, Thing) else item.name
            for mention, item in zip(mentions, chosen, strict=True)
        )

    def phrases(self, drawing: Drawing, dice: Dice) -> tuple[dict[str, Any], ...]:
        """Referring phrases: {text, segment_ids}; each text fits exactly these segments of the scene."""
        things = drawing.things
        found: dict[str, list[int]] = {}
        for thing in things:
            if not thing.said:
                continue
            for text in (_unique(thing, things, dice), _related(thing, things, dice)):
                if text:
                    found[f"the {text}"] = [thing.segment_id]
            alike = [other.segment_id for other in things if other.name == thing.name]
            if len(alike) > 1:
                found[f"every {thing.name}"] = alike
        for region in drawing.regions:
            if region.said:
                found[f"the {region.name}"] = [region.segment_id]
        chosen = dice.shuffled(list(found.items()))[: self._language.phrases]
        return tuple({"text": text, "segment_ids": ids} for text, ids in chosen)

    def questions(self, drawing: Drawing, dice: Dice) -> tuple[dict[str, str], ...]:
        """Questions with answers of one word: {question, answer}."""
        things = drawing.things
        found: dict[str, str] = {}
        for thing in things:
            alone = sum(other.name == thing.name for other in things) == 1
            if not (thing.said and alone):
                continue
            about = "colour" if dice.roll() < 0.5 else "pattern"
            found[f"what {about} is the {thing.name}"] = getattr(thing, about)
            others = [other for other in things if other is not thing]
            if others:
                asked = dice.choose(others)
                relation = _relation(asked, thing)
                if asked.said and sum(_on_side(other, thing, relation) for other in others) == 1:
                    found[f"what is {relation} the {thing.name}"] = asked.name
        if all(thing.said for thing in things):
            found["how many things are there"] = NUMBERS[len(things)]
        # As many yes as no; a class that is there but hardly visible is not asked for.
        there = {item.name for item in (*drawing.regions, *things)}
        visible = sorted({item.name for item in (*drawing.regions, *things) if item.said})
        absent = [name for name in self._recipe.names if name not in there]
        for names, answer in ((visible, "yes"), (absent, "no")):
            if names:
                name = dice.choose(names)
                found[f"is there {'a ' if name in self._recipe.things else ''}{name}"] = answer
        chosen = dice.shuffled(list(found.items()))[: self._language.questions]
        return tuple({"question": question, "answer": answer} for question, answer in chosen)


def _attributes(thing: Thing, form: Attributes, dice: Dice) -> dict[str, str]:
    said = {}
    if dice.roll() < form.size:
        said["size"] = thing.size
    if dice.roll() < form.colour:
        said["colour"] = thing.colour
    if dice.roll() < form.pattern and thing.pattern != "plain":
        said["pattern"] = thing.pattern
    return said


def _phrase(article: str, attributes: dict[str, str], thing: Thing) -> str:
    return " ".join([article, *attributes.values(), thing.name])


def _setting(regions: list[Region], things: bool) -> str:
    names = {region.place: region.name for region in regions}
    parts = [names[place] for place in ("bottom", "top") if place in names]
    text = " under ".join(parts)
    if text and things:
        text = f"on {text}"
    if "patch" in names:
        text = f"{text} with a patch of {names['patch']}" if text or things else f"a patch of {names['patch']}"
    return text.strip()


def _relation(thing: Thing, other: Thing) -> str:
    across, down = thing.centre[0] - other.centre[0], thing.centre[1] - other.centre[1]
    if abs(across) > abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def _on_side(thing: Thing, other: Thing, relation: str) -> bool:
    # Weaker than `_relation`: a thing above and slightly to the left is also on the left side.
    axis = 0 if relation in ("left of", "right of") else 1
    before = thing.centre[axis] < other.centre[axis]
    return before if relation in ("left of", "above") else not before


def _words(thing: Thing, attributes: Sequence[str]) -> str:
    said = [getattr(thing, name) for name in ("size", "colour", "pattern") if name in attributes]
    return " ".join([*said, thing.name])


def _alike(thing: Thing, things: Sequence[Thing], attributes: Sequence[str]) -> list[Thing]:
    keys = ("name", *attributes)
    return [other for other in things if all(getattr(other, key) == getattr(thing, key) for key in keys)]


def _unique(thing: Thing, things: Sequence[Thing], dice: Dice) -> str | None:
    # Attributes are added in random order until only one object fits; sometimes one more than needed.
    order = dice.shuffled(["size", "colour"] + ["pattern"] * (thing.pattern != "plain"))
    for count in range(len(order) + 1):
        if len(_alike(thing, things, order[:count])) == 1:
            return _words(thing, order[: count + (dice.roll() < 0.3)])
    return None


def _related(thing: Thing, things: Sequence[Thing], dice: Dice) -> str | None:
    anchors = [other for other in things if other.said and sum(o.name == other.name for o in things) == 1]
    anchors = [other for other in anchors if other.name != thing.name]
    if not anchors:
        return None
    anchor = dice.choose(anchors)
    relation = _relation(thing, anchor)
    known = dice.shuffled(["colour"] + ["pattern"] * (thing.pattern != "plain"))[: int(dice.roll() * 3)]
    if any(o is not thing and _on_side(o, anchor, relation) for o in _alike(thing, things, known)):
        return None
    return f"{_words(thing, known)} {relation} the {anchor.name}"
