"""The surfaces of the world: power-law noise, and the ten textures made from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from lexiseg.data.world.recipe import Recipe

Array = np.ndarray


def power_noise(rng: np.random.Generator, shape: tuple[int, ...], exponent: float) -> Array:
    """Periodic noise whose amplitude falls with frequency as f^-exponent.

    Args:
        shape: length, or height and width, in pixels.

    Returns:
        float32 of that shape, mean 0, variance 1.
    """
    axes = [np.fft.fftfreq(length) for length in shape[:-1]] + [np.fft.rfftfreq(shape[-1])]
    frequency = np.sqrt(sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij")))
    frequency.flat[0] = 1.0  # the mean; removed below
    spectrum = np.fft.rfftn(rng.standard_normal(shape)) * frequency**-exponent
    spectrum.flat[0] = 0.0
    noise = np.fft.irfftn(spectrum, s=shape, axes=range(len(shape)))
    return (noise / noise.std()).astype(np.float32)


class Surface:
    """What a texture is made from: the pixel grid, three kinds of noise and the two colours of its class."""

    def __init__(self, rng: np.random.Generator, size: int, colours: tuple) -> None:
        self.rng, self.size = rng, size
        self.colours = np.asarray(colours, np.float32)[:, :, None, None]  # (2, 3, 1, 1)
        self.y, self.x = np.mgrid[:size, :size].astype(np.float32)
        self.low = power_noise(rng, (size, size), 1.8)
        self.middle = power_noise(rng, (size, size), 1.0)
        self.high = power_noise(rng, (size, size), 0.3)

    def mix(self, share: Array) -> Array:
        """(3, size, size): the first colour where `share` is 0, the second where it is 1."""
        share = share.clip(0, 1)
        return self.colours[0] * (1 - share) + self.colours[1] * share


def _sky(s: Surface) -> Array:
    return s.mix(0.25 + 0.3 * s.low)


def _grass(s: Surface) -> Array:
    white = s.rng.standard_normal((s.size, s.size)).astype(np.float32)
    blades = sum(np.roll(white, shift, axis=0) for shift in range(4)) / 2  # vertical streaks, four pixels long
    return s.mix(0.5 + 0.3 * blades + 0.1 * s.low)


def _sand(s: Surface) -> Array:
    return s.mix(0.5 + 0.2 * s.high + 0.2 * np.sin(0.9 * (s.y + 2 * s.low)) + 0.1 * s.low)


def _water(s: Surface) -> Array:
    waves = np.sin(1.2 * s.y + 1.5 * np.sin(0.35 * s.x) + 1.2 * s.middle)
    return s.mix(0.35 + 0.35 * waves + 0.08 * s.high)


def _brick(s: Surface) -> Array:
    row = np.floor(s.y / 6)
    mortar = (s.y % 6 < 1.2) | ((s.x + 6 * (row % 2)) % 12 < 1.2)
    return s.mix(mortar.astype(np.float32)) + 8 * s.high + 6 * s.middle


def _snow(s: Surface) -> Array:
    return s.mix(0.6 + 0.35 * s.low) + 3 * s.high


def _wood(s: Surface) -> Array:
    grain = np.sin(2.2 * s.x + 1.2 * s.low + 0.3 * np.sin(0.2 * s.y))
    return s.mix(0.5 + 0.25 * grain + 0.12 * s.middle) * np.where(s.x % 8 < 1, 0.55, 1.0).astype(np.float32)


def _rock(s: Surface) -> Array:
    return s.mix(0.5 + 0.45 * s.middle) * np.where(abs(s.low) < 0.12, 0.7, 1.0).astype(np.float32)


def _lava(s: Surface) -> Array:
    return s.mix(1.6 * abs(s.middle))


def _forest(s: Surface) -> Array:
    return s.mix(0.5 + 0.35 * np.sign(s.middle) * abs(s.middle) ** 0.7 + 0.15 * s.high)


_TEXTURES: Mapping[str, Callable[[Surface], Array]] = {
    "sky": _sky,
    "grass": _grass,
    "sand": _sand,
    "water": _water,
    "brick": _brick,
    "snow": _snow,
    "wood": _wood,
    "rock": _rock,
    "lava": _lava,
    "forest": _forest,
}


def texture_bank(recipe: Recipe, rng: np.random.Generator) -> Array:
    """All texture pictures.

    Returns:
        float32 (stuff classes, variants, 3 RGB, size, size), range 0..255.
    """
    settings = recipe.texture
    pictures = [
        [_TEXTURES[kind.texture](Surface(rng, settings.size, kind.colours)) for _ in range(settings.variants)]
        for kind in recipe.stuff.values()
    ]
    return np.asarray(pictures, np.float32).clip(0, 255)
