from pathlib import Path
from typing import Any

import pytest

from lexiseg.data.world import World
from lexiseg.data.world.recipe import Recipe
from lexiseg.settings import parse, read_yaml


@pytest.fixture(scope="session")
def world_folder() -> Path:
    """The raw data of the embedded default: a folder with the recipe."""
    return Path(__file__).parents[3] / "data" / "world"


@pytest.fixture(scope="session")
def plain_recipe(world_folder) -> dict[str, Any]:
    """The embedded recipe as plain values; copy before changing."""
    return read_yaml(world_folder / "world.yaml")


@pytest.fixture(scope="session")
def world(plain_recipe) -> World:
    return World(parse(plain_recipe, Recipe, source="world.yaml"))


@pytest.fixture(scope="session")
def train_scenes(world) -> list:
    return [world.render("train", index) for index in range(600)]


@pytest.fixture(scope="session")
def val_scenes(world) -> list:
    return [world.render("val", index) for index in range(256)]
