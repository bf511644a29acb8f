"""Class ids -> training targets over the classes that are seen in training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lexiseg.segmentation import IGNORE_LABEL
from lexiseg.vocabulary import Vocabulary


def seen_targets(vocabulary: Vocabulary) -> Callable[[np.ndarray], np.ndarray]:
    """A function from class ids to positions in `vocabulary.seen_names`, both int64 of any shape.

    Pixels without a label (-100) and of classes that are not seen become -100: they never enter a loss.
    """
    table = np.full(len(vocabulary) + 1, IGNORE_LABEL, dtype=np.int64)
    for target, name in enumerate(vocabulary.seen_names):
        table[vocabulary.index(name)] = target
    # -100 would count from the end of the table: its last entry stands for "no label".
    return lambda semantic: table[np.where(semantic < 0, len(vocabulary), semantic)]
