"""A layout drawn: pixels, labels, and what can be said about them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lexiseg.data.world.layout import Border, Crop, Layout, Placed, Planner, Spot
from lexiseg.data.world.recipe import Recipe, Split
from lexiseg.data.world.shapes import EXTENT, PATCH_EXTENT, TABLE_SIZE, curve_bank, distance_table, patch_bank
from lexiseg.data.world.textures import texture_bank

Array = np.ndarray

# Owners of pixels while drawing: the three regions, then the objects in painter's order.
_PLACES = ("bottom", "top", "patch")
_FIRST_OBJECT = len(_PLACES)
# The noise picture is larger than a scene by this many pixels, so that crops of it differ from scene to scene.
_NOISE_MARGIN = 192


@dataclass(frozen=True, slots=True)
class Region:
    """A stuff region. `place` is "bottom" (also when alone), "top" or "patch"; `said`: visible enough for captions."""

    name: str
    place: str
    segment_id: int
    said: bool


@dataclass(frozen=True, slots=True)
class Thing:
    """An object: its words, its centre (x, y) in pixels, y downwards; `said`: visible enough for captions."""

    name: str
    size: str
    colour: str
    pattern: str
    centre: tuple[float, float]
    segment_id: int
    said: bool


@dataclass(frozen=True, slots=True)
class Drawing:
    """A drawn scene: the arrays and segments of `lexiseg.data.world.Scene` and what can be said about it."""

    image: Array
    semantic: Array
    panoptic: Array
    segments: tuple[dict, ...]
    regions: tuple[Region, ...]
    things: tuple[Thing, ...]


class Renderer:
    """Draws the scenes of one recipe; building it makes the banks that they share (below half a second)."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._planner = recipe, Planner(recipe)
        rng = np.random.Generator(np.random.Philox(key=(1 << 96) + recipe.seed))
        self._textures = texture_bank(recipe, rng)
        self._curves = curve_bank(rng)
        self._patches = patch_bank(rng, recipe.patch.roughness)
        side = max(split.size for split in recipe.splits.values()) + _NOISE_MARGIN
        self._noise = rng.standard_normal((3, side, side), np.float32) * recipe.light.noise
        self._tables = [distance_table(thing.shape) for thing in recipe.things.values()]
        cell = (2 * EXTENT / TABLE_SIZE) ** 2
        self._areas = [float((table < 0).sum()) * cell for table in self._tables]
        self._stuff, self._things, self._colours = list(recipe.stuff), list(recipe.things), list(recipe.colours)
        paints = np.array([(colour.first, colour.second) for colour in recipe.colours.values()], np.float32)
        self._paints = paints[..., None, None]  # (colours, 2: first and second, 3, 1, 1)

    def draw(self, split: Split, rng: np.random.Generator) -> Drawing:
        """Draw one scene; `rng` stands at the scene's start and is left after the last number of the layout."""
        layout = self._planner.plan(split, rng)
        image, owner = self._draw_regions(split.size, layout)
        for number, placed in enumerate(layout.objects, start=_FIRST_OBJECT):
            self._draw_object(image, owner, placed, layout.light, number)
        return self._describe(self._expose(image, layout), owner, layout)

    def _draw_regions(self, size: int, layout: Layout) -> tuple[Array, Array]:
        # float32 (3, H, W) picture, uint8 (H, W) owners. Channels come first as numpy is faster on long last axes.
        owner = np.zeros((size, size), np.uint8)
        image = self._surface(layout.crops[0], size)
        masks = (self._above(layout.border, size), self._inside(layout.spot, size))
        for number, (crop, mask) in enumerate(zip(layout.crops[1:], masks, strict=False), start=1):
            owner[mask] = number
            np.copyto(image, self._surface(crop, size), where=mask)
        return image, owner

    def _surface(self, crop: Crop, size: int) -> Array:
        picture = self._textures[crop.stuff, crop.variant]
        window = picture[:, crop.top : crop.top + size, crop.left : crop.left + size]
        return window * np.array(crop.gains, np.float32)[:, None, None]

    def _above(self, border: Border, size: int) -> Array:
        count, length = self._curves.shape
        x = np.arange(size)
        curve = self._curves[int(border.curve * count)][(x + int(border.start * length)) % length]
        height = border.height + border.slope * (x - size / 2) + size * self._recipe.horizon.wobble * curve
        return x[:, None] + 0.5 < height

    def _inside(self, spot: Spot, size: int) -> Array:
        grid, scale = np.arange(size) + 0.5, TABLE_SIZE / (2 * PATCH_EXTENT * spot.radius)
        column, row = (
            ((grid - centre) * scale + TABLE_SIZE / 2).astype(np.intp).clip(0, TABLE_SIZE - 1)
            for centre in (spot.x, spot.y)
        )
        return self._patches[int(spot.outline * len(self._patches))][row[:, None], column]

    def _draw_object(self, image: Array, owner: Array, o: Placed, light: tuple[float, float], number: int) -> None:
        size, reach, settings = len(owner), o.radius + 1.5, self._recipe.objects
        left, right = max(0, math.floor(o.x - reach)), min(size, math.ceil(o.x + reach))
        top, bottom = max(0, math.floor(o.y - reach)), min(size, math.ceil(o.y + reach))
        x = np.arange(left, right, dtype=np.float32) + (0.5 - o.x)
        y = (np.arange(top, bottom, dtype=np.float32) + (0.5 - o.y))[:, None]
        cos, sin = math.cos(o.angle), math.sin(o.angle)
        across, along = cos * x + sin * y, cos * y - sin * x  # the object's own axes, pixels
        scale, last = TABLE_SIZE / (2 * EXTENT * o.radius), TABLE_SIZE - 1
        column = np.minimum(np.maximum(across * scale + TABLE_SIZE / 2, 0), last).astype(np.intp)
        row = np.minimum(np.maximum(along * scale + TABLE_SIZE / 2, 0), last).astype(np.intp)
        distance = self._tables[o.kind][row, column] * o.radius
        paint, other = self._paints[o.colour]
        if o.pattern != "plain":
            second = _pattern(o.pattern, across / o.period + o.phase[0], along / o.period + o.phase[1])
            paint = np.where(second, other, paint)
        shade = (light[0] * x + light[1] * y) * (settings.shading / o.radius) + 1
        shade *= 1 - settings.rim * np.minimum(np.maximum(distance + 1.5, 0), 1)
        cover = np.minimum(np.maximum(0.5 - distance, 0), 1)
        window = image[:, top:bottom, left:right]
        window += (paint * shade - window) * cover
        owner[top:bottom, left:right][distance < 0] = number

    def _expose(self, image: Array, layout: Layout) -> Array:
        # Brightness, noise, rounding: float32 (3, H, W) -> uint8 (H, W, 3).
        size = image.shape[1]
        centred = (np.arange(size, dtype=np.float32) - (size - 1) / 2) * (layout.gain * layout.slope / size)
        image *= layout.gain + layout.light[0] * centred + (layout.light[1] * centred)[:, None]
        room = self._noise.shape[1] - size + 1
        left, top = (int(place * room) for place in layout.noise)
        image += self._noise[:, top : top + size, left : left + size]
        image += 0.5
        np.minimum(np.maximum(image, 0, out=image), 255, out=image)
        return np.ascontiguousarray(image.astype(np.uint8).transpose(1, 2, 0))

    def _describe(self, image: Array, owner: Array, layout: Layout) -> Drawing:
        settings, objects = self._recipe.objects, layout.objects
        pixels = np.bincount(owner.ravel(), minlength=_FIRST_OBJECT + len(objects)).tolist()
        enough = settings.area * owner.size
        classes, ids = np.zeros((2, len(pixels)), np.uint16)
        segments, regions, things = [], [], []
        for number, visible in enumerate(pixels):
            if not visible:
                continue
            segment_id, is_thing = len(segments) + 1, number >= _FIRST_OBJECT
            if is_thing:
                o = objects[number - _FIRST_OBJECT]
                class_id = len(self._stuff) + o.kind
                said = visible >= enough and visible >= settings.visible * self._areas[o.kind] * o.radius**2
                name, size = self._things[o.kind], "large" if o.large else "small"
                things.append(Thing(name, size, self._colours[o.colour], o.pattern, (o.x, o.y), segment_id, said))
            else:
                class_id = layout.crops[number].stuff
                regions.append(Region(self._stuff[class_id], _PLACES[number], segment_id, visible >= enough))
            classes[number], ids[number] = class_id, segment_id
            segments.append({"id": segment_id, "class_id": class_id, "thing": is_thing})
        return Drawing(image, classes[owner], ids[owner], tuple(segments), tuple(regions), tuple(things))


def _pattern(name: str, first: Array, second: Array) -> Array:
    # Where the second colour goes; both coordinates count periods.
    if name == "striped":
        return (first + second) * math.sqrt(0.5) % 1 < 0.5  # diagonal, so that stripes also cross thin shapes
    if name == "checkered":
        return (first % 1 < 0.5) ^ (second % 1 < 0.5)
    first, second = first % 1 - 0.5, second % 1 - 0.5
    return first * first + second * second < 0.085
