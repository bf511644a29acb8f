"""Pictures of a study, by Optuna: history, importance, slice, parallel coordinates, contours, pruned curves, front."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from lexiseg.sweeps.definition import task_of
from lexiseg.sweeps.objective import PICTURES, Task

FEWEST = 4  # complete trials: of fewer there is no importance to be told


def write_pictures(study: optuna.Study, folder: Path) -> list[Path]:
    """Write what a study can be shown by; pictures of an earlier state are replaced.

    Of several goals each has its own history and importance, named after it, and they share a front.

    Returns:
        The files.
    """
    import matplotlib

    matplotlib.use("agg")
    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
    if not complete:
        return []
    import optuna.visualization.matplotlib as plots

    task, folder = task_of(study), Path(folder)
    keys = [knob.key for knob in task.knobs]
    varied = [key for key in keys if len({trial.params.get(key) for trial in complete}) > 1]
    several = len(task.goals) > 1
    made: dict[str, Callable[[], Any]] = {}
    for number, goal in enumerate(task.goals):
        how: dict[str, Any] = {"target_name": f"{goal.name} on {task.split}"}
        if several:
            how["target"] = lambda trial, number=number: trial.values[number]
        end = f"_{goal.name}" if several else ""
        made[f"history{end}"] = lambda how=how: plots.plot_optimization_history(study, **how)
        if len(complete) >= FEWEST and varied:
            made[f"importance{end}"] = lambda how=how: plots.plot_param_importances(study, params=varied, **how)
        if varied:
            made[f"slice{end}"] = lambda how=how: plots.plot_slice(study, params=varied, **how)
        if len(varied) > 1:
            made[f"parallel_coordinate{end}"] = lambda how=how: plots.plot_parallel_coordinate(
                study, params=varied, **how
            )
            made[f"contour{end}"] = lambda how=how: plots.plot_contour(study, params=varied, **how)
    if any(trial.intermediate_values for trial in study.get_trials(deepcopy=False)):
        made["pruning"] = lambda: _pruning(plots.plot_intermediate_values(study), task)
    if several:
        made["front"] = lambda: plots.plot_pareto_front(study, target_names=[goal.name for goal in task.goals])
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [_draw(draw, folder / f"{name}.png", count=len(varied)) for name, draw in made.items()]
    return [path for path in drawn if path]


def _draw(draw: Callable[[], Any], path: Path, *, count: int) -> Path | None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's drawing by matplotlib is "experimental", since version 2.2
        try:
            axes = draw()
        except (ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
            # Some need more trials, or more different values, than there are; the study is no worse for it.
            print(f"note: no picture {path.stem} ({error})", file=sys.stderr)
            return None
    figure = getattr(axes, "figure", None) or axes.ravel()[0].figure
    for one in figure.axes:
        for axis in (one.xaxis, one.yaxis):
            if axis.get_scale() == "log":  # Optuna leaves labels such as 3 x 10^-1 above each other
                axis.set_major_locator(FixedLocator(_round_values(*axis.get_view_interval())))
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_locator(NullLocator())
    figure.set_size_inches(*{"slice": (3.2 * max(2, count), 3.6), "contour": (3.4 * count, 3.2 * count)}.get(
        path.stem.partition("_")[0], (8, 4.5)
    ))  # fmt: skip
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path


def _pruning(axes: Any, task: Task) -> Any:
    axes.set_title("Trials on their way")
    axes.set_xlabel("% of the training")
    axes.set_ylabel(f"{task.goals[0].name} on {PICTURES} pictures of {task.split}")
    return axes


def _round_values(low: float, high: float) -> list[float]:
    """A few round values between two, for an axis of orders of magnitude."""
    for digits in ((1,), (1, 3), (1, 2, 5), range(1, 10), [digit / 2 for digit in range(2, 20)]):
        decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
        found = [digit * 10.0**decade for decade in decades for digit in digits]
        found = [value for value in found if low <= value <= high]
        if len(found) >= 3:
            return found[:: -(-len(found) // 4)]
    return [low, high]
