"""The tiny world: a folder with a recipe, `world.yaml`, whose scenes are rendered when they are read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path

from lexiseg.data.adapters.base import RawContent, RawSample
from lexiseg.data.world import Recipe, World, read_recipe
from lexiseg.errors import DataError
from lexiseg.vocabulary import Vocabulary

RECIPE_FILE = "world.yaml"


class WorldAdapter:
    """The world whose recipe lies in `folder`. Splits of kind iconic have captions only."""

    name = "world"
    licence = "Apache-2.0 (rendered by lexiseg)"

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)

    def splits(self) -> list[str]:
        """The recipe's splits, in its order."""
        return list(self._recipe.splits)

    def vocabulary(self) -> Vocabulary:
        """The recipe's classes, stuff before things."""
        recipe = self._recipe
        return Vocabulary(
            names=recipe.names,
            seen=tuple(not unseen for unseen in recipe.unseen),
            things=tuple(name in recipe.things for name in recipe.names),
            templates=recipe.language.templates,
        )

    def samples(self, split: str) -> Iterator[RawSample]:
        """The scenes of a split by index; the id is split and index.

        Raises:
            DataError: the recipe has no such split.
        """
        if split not in self._recipe.splits:
            raise DataError(
                found=f"the split `{split}`",
                allowed=f"one of {', '.join(self._recipe.splits)}",
                fix=f"use one of them, or add it to `splits` in {RECIPE_FILE}",
            )
        for index in range(self._recipe.splits[split].count):
            yield RawSample(id=f"{split}-{index:06d}", file=RECIPE_FILE, load=partial(self._load, split, index))

    def _load(self, split: str, index: int) -> RawContent:
        scene = self._world.render(split, index)
        if self._recipe.splits[split].kind == "iconic":
            return RawContent(image=scene.image, captions=list(scene.captions))
        return RawContent(
            image=scene.image,
            semantic=scene.semantic,
            panoptic=scene.panoptic,
            segments=list(scene.segments),
            captions=list(scene.captions),
            phrases=list(scene.phrases),
            questions=list(scene.questions),
        )

    @cached_property
    def _recipe(self) -> Recipe:
        path = self._folder / RECIPE_FILE
        if not path.is_file():
            raise DataError(
                found=f"no {RECIPE_FILE} in {self._folder.name}/",
                allowed=f"a folder with the world's recipe, {RECIPE_FILE}",
                fix="run `dvc pull data/world`, or check the path",
            )
        return read_recipe(path)

    @cached_property
    def _world(self) -> World:
        # Apart from the recipe: listing samples must not wait for the textures.
        return World(self._recipe)
