"""Outlines of the world: signed distances of the ten shapes, patch outlines and horizon curves."""

from __future__ import annotations

import numpy as np

from lexiseg.data.world.textures import power_noise

Array = np.ndarray

# Tables cover [-EXTENT, EXTENT] in both directions; every shape lies within the unit circle.
EXTENT = 1.25
TABLE_SIZE = 128
PATCH_EXTENT = 2.0
PATCH_OUTLINES = 48
CURVES = 48
CURVE_LENGTH = 128


def _polygon_distance(x: Array, y: Array, corners: Array) -> Array:
    # Distance to the nearest edge; the sign is negative inside (even-odd rule).
    nearest, inside = np.full(x.shape, np.inf), np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * ex, y - ay - along * ey))
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) / ey * ex)
    return np.where(inside, -nearest, nearest)


def _around(count: int, radii: tuple[float, ...]) -> Array:
    angles = np.arange(count) * 2 * np.pi / count - np.pi / 2  # the first corner points up (y grows downwards)
    radius = np.resize(np.asarray(radii), count)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _heart() -> Array:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 2], axis=1) / 18


def _quarter_turns() -> list[Array]:
    return [np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]


_POLYGONS: dict[str, Array] = {
    "square": np.array([[-0.7, -0.7], [0.7, -0.7], [0.7, 0.7], [-0.7, 0.7]]),
    "triangle": _around(3, (1.0,)),
    "star": _around(10, (1.0, 0.45)),
    "cross": np.concatenate([np.array([[-0.3, -0.92], [0.3, -0.92], [0.3, -0.3]]) @ turn for turn in _quarter_turns()]),
    "heart": _heart(),
    "arrow": np.array(
        [[-0.95, -0.26], [0.1, -0.26], [0.1, -0.66], [0.98, 0.0], [0.1, 0.66], [0.1, 0.26], [-0.95, 0.26]]
    ),
    "hourglass": np.array([[-0.62, -0.78], [0.62, -0.78], [0.1, 0.0], [0.62, 0.78], [-0.62, 0.78], [-0.1, 0.0]]),
}


def distance_table(shape: str) -> Array:
    """Signed distance to a shape's outline, in radii, negative inside.

    Returns:
        float32 (TABLE_SIZE, TABLE_SIZE), first axis y (downwards), cell centres spread over [-EXTENT, EXTENT].
    """
    cells = (np.arange(TABLE_SIZE) + 0.5) / TABLE_SIZE * 2 * EXTENT - EXTENT
    y, x = np.meshgrid(cells, cells, indexing="ij")
    centre = np.hypot(x, y)
    if shape == "disk":
        distance = centre - 0.9
    elif shape == "ring":
        distance = abs(centre - 0.75) - 0.2
    elif shape == "crescent":
        distance = np.maximum(centre - 0.95, 0.75 - np.hypot(x - 0.42, y))
    else:
        distance = _polygon_distance(x, y, _POLYGONS[shape])
    return distance.astype(np.float32)


def patch_bank(rng: np.random.Generator, roughness: float) -> Array:
    """Noisy ellipses whose longer half axis is 1.

    Returns:
        bool (PATCH_OUTLINES, TABLE_SIZE, TABLE_SIZE), true inside, spread over [-PATCH_EXTENT, PATCH_EXTENT].
    """
    cells = (np.arange(TABLE_SIZE) + 0.5) / TABLE_SIZE * 2 * PATCH_EXTENT - PATCH_EXTENT
    y, x = np.meshgrid(cells, cells, indexing="ij")
    waves = np.arange(2, 7)
    masks = []
    for _ in range(PATCH_OUTLINES):
        turn, flat = rng.uniform(-0.5, 0.5), rng.uniform(0.7, 1.0)
        u, v = x * np.cos(turn) + y * np.sin(turn), (y * np.cos(turn) - x * np.sin(turn)) / flat
        angle = np.arctan2(v, u)
        heights = rng.standard_normal(len(waves)) / waves**1.5
        heights *= roughness / max(float(np.sqrt((heights**2).sum() / 2)), 1e-9)
        phases = rng.uniform(0, 2 * np.pi, len(waves))
        outline = np.ones_like(angle)
        for height, wave, phase in zip(heights, waves, phases, strict=True):
            outline += height * np.cos(wave * angle + phase)
        masks.append(np.hypot(u, v) < outline.clip(0.3, 1.7))
    return np.asarray(masks)


def curve_bank(rng: np.random.Generator) -> Array:
    """Smooth horizon curves: float32 (CURVES, CURVE_LENGTH), mean 0, variance 1, periodic."""
    return np.asarray([power_noise(rng, (CURVE_LENGTH,), 2.0) for _ in range(CURVES)])
