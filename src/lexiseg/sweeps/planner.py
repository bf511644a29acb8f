"""What a trial has to compute: derived from the `params:` of dvc.yaml, before the first one starts.

A setting enters the graph at the first stage that declares it. That stage and all that follow it up to the
method's evaluation run in every trial; what lies before is made once, or is in outputs/ already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexiseg.errors import SettingsError
from lexiseg.history import recall
from lexiseg.pipeline import Node, upstream_of
from lexiseg.plan import Step, duration, expect, size_text
from lexiseg.settings import fields_of
from lexiseg.stage import value_at
from lexiseg.stages.settings import root_block
from lexiseg.sweeps.space import Space
from lexiseg.trials import Trials
from lexiseg.workspace import private_folder


@dataclass(frozen=True)
class Plan:
    """How a sweep goes through the graph.

    Attributes:
        target: the stage whose metrics are compared.
        enters: knob -> the stage at which it enters the graph.
        reused: stages whose results in outputs/ serve all trials.
        once: stages that run before the first trial, for all of them, with what they should take.
        each: stages that run in every trial, with what they should take.
    """

    target: str
    enters: Mapping[str, str]
    reused: tuple[str, ...]
    once: tuple[Step, ...]
    each: tuple[Step, ...]

    @property
    def trains(self) -> bool:
        """Whether trials train the method, so that they can be ended on their way."""
        return any(step.stage == f"{self.target.partition('-')[0]}-train" for step in self.each)

    @property
    def scores_only(self) -> bool:
        """Whether trials score saved predictions again and run no network."""
        return [step.stage for step in self.each] == [self.target]


def plan_sweep(
    root: Path, trials: Trials, space: Space, *, target: str, common: Mapping[str, Any], also: Sequence[str] = ()
) -> Plan:
    """Plan a sweep.

    Args:
        root: the working tree.
        trials: its graph and settings.
        space: what is searched.
        target: the stage whose metrics are compared.
        common: changes that all trials share, by dotted key.
        also: further stages that every trial needs.

    Raises:
        SettingsError: knobs that enter no stage that the target needs.
    """
    graph = trials.graph
    lineage = trials.needed([target, *also])
    enters = {knob.key: _entry(graph, lineage, knob.key) for knob in space.knobs}
    outside = [key for key, stage in enters.items() if stage is None]
    if outside:
        raise SettingsError(
            found=f"{', '.join(f'`{key}`' for key in outside)} enter(s) no stage that {target} needs",
            allowed=", ".join(key for key in fields_of(root_block()) if _entry(graph, lineage, key)),
            fix="search knobs of this method, or name the method whose knobs they are",
        )
    touched = {stage for stage in enters.values() if stage}
    each = [name for name in lineage if name in touched or touched & set(upstream_of(graph, name))]
    # With values of the knobs: some settings are none without them.
    example = {**common, **{knob.key: knob.ends[0] for knob in space.knobs}}
    kept = trials.kept(example, [target, *also])
    values, _ = trials.settings_under(example)
    history = recall(private_folder(root))

    def costed(name: str) -> Step:
        return expect(Step(name, "run"), {key: value_at(values, key) for key in graph[name].params}, history)

    before = [name for name in lineage if name not in each]
    return Plan(
        target=target,
        enters={key: stage for key, stage in enters.items() if stage},
        reused=tuple(name for name in before if name in kept),
        once=tuple(costed(name) for name in before if name not in kept),
        each=tuple(costed(name) for name in each),
    )


def _entry(graph: Mapping[str, Node], lineage: Sequence[str], key: str) -> str | None:
    """The first stage that declares a setting, or a block that it is in."""
    return next(
        (name for name in lineage if any(key == own or key.startswith(f"{own}.") for own in graph[name].params)), None
    )


def plan_lines(plan: Plan, space: Space, *, trials: int, workers: int, rungs: Sequence[float]) -> list[str]:
    """The plan in words.

    Args:
        plan: of `plan_sweep`.
        space: what is searched.
        trials: how many are to come.
        workers: how many run at once.
        rungs: shares of a training at which trials that promise little are ended; empty: none is.
    """
    width = max(len(str(knob)) for knob in space.knobs)
    lines = ["knobs"]
    lines += [f"  {knob!s:<{width}}  enters at {plan.enters[knob.key]}" for knob in space.knobs]
    lines += [f"  {key} = {value}, in all trials" for key, value in space.fixed.items()]
    lines.append(f"reused    {', '.join(plan.reused) or 'nothing: outputs/ has no result of these settings yet'}")
    if plan.once:
        lines.append(f"once      {_named(plan.once)}")
    lines.append(f"per trial {_named(plan.each)}")
    if plan.scores_only:
        lines.append("          saved predictions are scored again; no network is run")
    if rungs:
        shares = ", ".join(f"{share:.0%}" for share in rungs)
        lines.append(f"pruning   at {shares} of a training only the better half of those that came so far goes on")
    steps = [*plan.once, *plan.each]
    unknown = [step.stage for step in steps if step.seconds is None]
    first = sum(step.seconds or 0 for step in plan.once)
    each = sum(step.seconds or 0 for step in plan.each)
    if len(unknown) < len(steps):
        rounds = -(-trials // workers)
        lines.append(
            f"cost      {trials} trials{f', {workers} at once' if workers > 1 else ''}: about "
            f"{duration(first + each * rounds)} going by earlier runs"
            + (", less what is pruned" if rungs else "")
            + (f", without {', '.join(unknown)}, of which none is known" if unknown else "")
            + f"; memory {size_text(max(step.memory or 0 for step in steps) * workers)}, "
            + f"disk {size_text(sum(step.disk or 0 for step in plan.each) * trials)} until the sweep ends"
        )
    else:
        lines.append("cost      not known: no earlier run of these stages")
    return lines


def _named(steps: Sequence[Step]) -> str:
    return ", ".join(f"{step.stage} ({'?' if step.seconds is None else duration(step.seconds)})" for step in steps)
