"""Charts as pictures: curves over a common axis, and bars. Equal values give equal pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Blue, orange and green of Okabe and Ito (jfly.uni-koeln.de/color), then their vermilion.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00")
_DPI = 100


def histograms(
    panels: Mapping[str, Mapping[str, np.ndarray]],
    *,
    marks: Mapping[str, Mapping[str, float]] | None = None,
    bins: int = 80,
) -> np.ndarray:
    """Panels beside each other, each with the densities of some samples.

    Args:
        panels: title -> name of a sample -> its values, of any shape. A name has one colour in all panels.
        marks: title -> name -> a value to mark by a dashed line in the colour of that sample.
        bins: of each histogram.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    names = list(dict.fromkeys(name for samples in panels.values() for name in samples))
    figure = _figure(width=4.2 * len(panels), height=3.4)
    for number, (title, samples) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1)
        values = np.concatenate([np.ravel(sample) for sample in samples.values()])
        low, high = float(values.min()), float(values.max())
        edges = np.linspace(low, max(high, low + 1e-3), bins + 1)
        for name, sample in samples.items():
            density, _ = np.histogram(np.ravel(sample), bins=edges, density=True)
            axes.stairs(density, edges, color=_COLOURS[names.index(name) % 4], label=name, linewidth=1.4)
        for name, value in (marks or {}).get(title, {}).items():
            axes.axvline(value, color=_COLOURS[names.index(name) % 4], linestyle="--", linewidth=1.1)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("cosine", fontsize=9)
        axes.set_yticks([])
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8, frameon=False)
    return _pixels(figure)


def bars(values: Sequence[float], names: Sequence[str], *, title: str, unit: str) -> np.ndarray:
    """A bar per name, from top to bottom.

    Args:
        values: lengths.
        names: one per value.
        title: above the bars.
        unit: below the axis.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    figure = _figure(width=6.0, height=1.0 + 0.22 * len(values))
    axes = figure.add_subplot()
    axes.barh(range(len(values)), list(values), color=_COLOURS[0])
    axes.set_yticks(range(len(values)), list(names), fontsize=8)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(unit, fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    return _pixels(figure)


def _figure(*, width: float, height: float) -> Any:
    # Here, since it takes half a second to import and few stages draw. A figure of its own needs no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _pixels(figure: Any) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
