"""What is where in a scene, before anything is drawn.

A scene consumes one block of uniform numbers, each by its place in the block: changing how one of them is used
leaves all others, and so the rest of the scene, as they were.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from lexiseg.data.world.recipe import Kind, Recipe, Split

PATTERNS = ("plain", "striped", "dotted", "checkered")

# Places in the block of uniforms: 0..15 the scene as a whole, then six per region, then a run for each object.
_REGION, _OBJECT, _OBJECT_RUN = 16, 40, 30


@dataclass(frozen=True, slots=True)
class Crop:
    """A part of a texture picture: class, variant, corner in pixels, gains of the three channels."""

    stuff: int
    variant: int
    top: int
    left: int
    gains: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Border:
    """The horizon: mean height in pixels, slope, and which curve is added from which of its points (0..1)."""

    height: float
    slope: float
    curve: float
    start: float


@dataclass(frozen=True, slots=True)
class Spot:
    """The patch: centre and longer half axis in pixels, and which outline (0..1)."""

    x: float
    y: float
    radius: float
    outline: float


@dataclass(frozen=True, slots=True)
class Placed:
    """An object: indices of its class and colour, its pattern, size word, place and turn (pixels, radians)."""

    kind: int
    colour: int
    pattern: str
    large: bool
    x: float
    y: float
    radius: float
    angle: float
    period: float
    phase: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Layout:
    """A scene's layout.

    Attributes:
        crops: surfaces of the bottom region, the top one and the patch; as many as there are regions.
        border: between bottom and top; used when there are two crops or more.
        spot: the patch; used when there are three crops.
        objects: in painter's order.
        light: unit vector (x, y) towards the light.
        gain: brightness of the whole picture.
        slope: change of brightness across the picture, along the light.
        noise: where the camera noise is taken from, (x, y) in 0..1.
    """

    crops: list[Crop]
    border: Border
    spot: Spot
    objects: list[Placed]
    light: tuple[float, float]
    gain: float
    slope: float
    noise: tuple[float, float]


class Planner:
    """Draws layouts by the numbers of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._looks = list(recipe.things.values())
        self._colours = list(recipe.colours)

    def plan(self, split: Split, rng: np.random.Generator) -> Layout:
        """One layout; `rng` stands at the scene's start and is left after the last number of the layout."""
        recipe, size = self._recipe, split.size
        kind: Kind = getattr(recipe.kinds, split.kind)
        u = rng.random(_OBJECT + _OBJECT_RUN * (len(kind.objects) - 1)).tolist()
        stuff = rng.permutation(len(recipe.stuff)).tolist()
        regions = _choose(kind.regions, u[0]) + 1
        turn = 2 * math.pi * u[2]
        objects: list[Placed] = []
        for number in range(_choose(kind.objects, u[1])):
            start = _OBJECT + _OBJECT_RUN * number
            placed = self._place(u[start : start + _OBJECT_RUN], kind, split, objects)
            if placed:
                objects.append(placed)
        return Layout(
            crops=[self._crop(stuff[n], size, u[_REGION + 6 * n : _REGION + 6 * n + 6]) for n in range(regions)],
            border=Border(size * _between(recipe.horizon.height, u[3]), _signed(recipe.horizon.tilt, u[4]), u[5], u[6]),
            spot=Spot(
                x=size * _between(recipe.patch.centre, u[8]),
                y=size * _between(recipe.patch.centre, u[9]),
                radius=size * _between(recipe.patch.radius, u[7]),
                outline=u[10],
            ),
            objects=objects,
            light=(math.cos(turn), math.sin(turn)),
            gain=1 + _signed(recipe.light.gain, u[12]),
            slope=recipe.light.gradient * u[11],
            noise=(u[14], u[13]),
        )

    def _crop(self, stuff: int, size: int, u: Sequence[float]) -> Crop:
        settings = self._recipe.texture
        room = settings.size - size + 1
        gains = tuple(1 + _signed(settings.gain, number) for number in u[3:6])
        return Crop(stuff, int(u[2] * settings.variants), int(u[0] * room), int(u[1] * room), gains)

    def _place(self, u: Sequence[float], kind: Kind, split: Split, others: list[Placed]) -> Placed | None:
        settings, size = self._recipe.objects, split.size
        which = int(u[0] * len(self._looks))
        look, large = self._looks[which], u[1] < settings.large_probability
        radius = _between(settings.large if large else settings.small, u[2]) * self._recipe.unit
        radius = min(radius, kind.radius_cap * size)
        allowed = kind.margin * size, size - kind.margin * size
        best, least = (0.0, 0.0), math.inf
        for attempt in range(settings.tries):
            x, y = _between(allowed, u[12 + 2 * attempt]), _between(allowed, u[13 + 2 * attempt])
            overlap = max((1 - math.hypot(x - o.x, y - o.y) / (radius + o.radius) for o in others), default=0.0)
            if overlap < least:
                best, least = (x, y), overlap
        if least > settings.overlap:
            return None
        usual = u[4] < split.canonical
        return Placed(
            kind=which,
            colour=self._colours.index(look.colour) if usual else int(u[5] * len(self._colours)),
            pattern=look.pattern if usual else PATTERNS[int(u[6] * len(PATTERNS))],
            large=large,
            x=best[0],
            y=best[1],
            radius=radius,
            angle=_signed(math.radians(settings.rotation), u[3]),
            period=_between(settings.period, u[7]),
            phase=(u[8], u[9]),
        )


def _between(bounds: tuple[float, float], number: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * number


def _signed(most: float, number: float) -> float:
    return most * (2 * number - 1)


def _choose(probabilities: Sequence[float], number: float) -> int:
    # The last one also takes what rounding leaves of the interval.
    return min(bisect_right(list(accumulate(probabilities)), number), len(probabilities) - 1)
