"""Stage baseline-predict@<name>: a baseline's scores on the evaluated splits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexiseg.methods import BASELINES, resolve
from lexiseg.stages.predict import write_predictions
from lexiseg.storage import read_json
from lexiseg.vocabulary import Vocabulary


def run(settings: Any, inputs: Mapping[str, Path], outputs: Path, *, name: str) -> None:
    """Build the baseline (`linear` fits its head first) and write its predictions folder.

    Raises:
        DataError: a data set without classes.
    """
    vocabulary = Vocabulary.from_json(read_json(inputs["prepare"] / "vocabulary.json"))
    vocabulary.require_names(needed_by=f"the baseline {name}", instead="take it out of `baselines` in params.yaml")
    scorer = resolve(BASELINES[name])(settings, inputs)
    asked = settings.evaluate
    write_predictions(scorer, inputs["prepare"], outputs, splits=asked.splits, episodes=asked.episodes)
