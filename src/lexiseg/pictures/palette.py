"""Colours that also people with a red-green deficiency can tell apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# The first seven are those of Okabe and Ito (jfly.uni-koeln.de/color) without black. Each further one was chosen as
# the colour furthest from all before it in CIELAB, the nearest of normal, protan and deutan vision deciding
# (Machado et al. 2009), very dark, pale and glaring colours left out. A test measures the distances.
_COLOURS = """
    E69F00 56B4E9 009E73 F0E442 0072B2 D55E00 CC79A7 6666FF EEEEBB 663322 55FFFF 770066 AAEE77 BB9955 113399 336655
    7799FF EEAAAA 555500 775577 22BBCC BB5544 55DD88 CC22BB EE6677 CC0055 664488 FF9944 AAEEDD CC1122 BBCCFF 3333BB
"""


def palette(labels: Sequence[str]) -> np.ndarray:
    """A colour per label.

    Colours go by the alphabetical order of the names, so the same set of labels has the same colours in whatever
    order it is given. The first 32 are distinct hues; from there on they come again darker, then lighter.

    Returns:
        (N, 3) uint8 RGB, in the order of `labels`.
    """
    base = np.frombuffer(bytes.fromhex(_COLOURS), dtype=np.uint8).reshape(-1, 3).astype(float)
    rank = np.empty(len(labels), dtype=int)
    rank[np.argsort(np.array(labels, dtype=str), kind="stable")] = np.arange(len(labels))
    colours = base[rank % len(base)]
    turn = (rank // len(base))[:, None]
    strength = 1 - 0.6 ** ((turn + 1) // 2)  # 0, .4, .4, .64, .64 …
    target = np.where(turn % 2 == 1, 0.0, 255.0)
    return (colours + strength * (target - colours)).round().astype(np.uint8)
