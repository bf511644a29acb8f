"""The tiny world: scenes with labels, captions, referring phrases and questions, rendered from a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lexiseg.data.world.language import Dice, Speaker, words
from lexiseg.data.world.recipe import Recipe, Split, read_recipe
from lexiseg.data.world.scene import Region, Renderer, Thing
from lexiseg.errors import DataError

__all__ = ["Recipe", "Region", "Scene", "Split", "Thing", "World", "read_recipe", "words"]


@dataclass(frozen=True, slots=True)
class Scene:
    """One rendered scene.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        semantic: uint16 (H, W), class ids; every pixel has one.
        panoptic: uint16 (H, W), segment ids from 1; every pixel has one.
        segments: {id, class_id, thing} per segment. A stuff class is one segment, an object is one segment.
        captions: the stored captions, lower case, words separated by one space.
        phrases: {text, segment_ids}, each text fits exactly these segments.
        questions: {question, answer}.
        regions: what captions know about the stuff.
        things: what captions know about the objects, in painter's order.
    """

    image: np.ndarray
    semantic: np.ndarray
    panoptic: np.ndarray
    segments: tuple[dict[str, Any], ...]
    captions: tuple[str, ...]
    phrases: tuple[dict[str, Any], ...]
    questions: tuple[dict[str, str], ...]
    regions: tuple[Region, ...]
    things: tuple[Thing, ...]


class World:
    """Renders the scenes of a recipe.

    Attributes:
        recipe: what was given.
        words: every word of captions, phrases, questions, answers and templates, sorted.

    Example:
        >>> world = World(read_recipe("data/world/world.yaml"))
        >>> scene = world.render("val", 5)
        >>> scene.image.shape
        (64, 64, 3)
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.words = words(recipe)
        self._renderer, self._speaker = Renderer(recipe), Speaker(recipe)

    def render(self, split: str, index: int) -> Scene:
        """Render one scene; it depends on the recipe, the split's seed and `index` only.

        Raises:
            DataError: there is no such split or index.
        """
        settings = self.recipe.splits.get(split)
        if settings is None or not 0 <= index < settings.count:
            raise DataError(
                found=f"scene {index} of split {split!r}",
                allowed=", ".join(f"{name} 0..{one.count - 1}" for name, one in self.recipe.splits.items()),
                fix="ask for one of these, or add it to `splits` in world.yaml",
            )
        rng = np.random.Generator(np.random.Philox(key=(settings.seed << 32) + index))
        drawing = self._renderer.draw(settings, rng)
        dice = Dice(rng)
        captions = self._speaker.captions(drawing, settings, dice)
        iconic = settings.kind == "iconic"
        return Scene(
            image=drawing.image,
            semantic=drawing.semantic,
            panoptic=drawing.panoptic,
            segments=drawing.segments,
            captions=captions,
            phrases=() if iconic else self._speaker.phrases(drawing, dice),
            questions=() if iconic else self._speaker.questions(drawing, dice),
            regions=drawing.regions,
            things=drawing.things,
        )
