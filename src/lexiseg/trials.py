"""Stages of the graph under changed settings, outside of outputs/: the ground of ablations and sweeps.

A trial runs only what its changes touch. A stage whose settings and upstream are those of the working tree,
and whose outputs are as dvc.lock recorded them, is taken from outputs/; everything else runs in its work folder
under its fingerprint, so repeated and interrupted trials share results.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexiseg.errors import ChangedError, SettingsError
from lexiseg.pipeline import Node, hash_dependencies, read_graph, read_lock, upstream_of
from lexiseg.settings import View, override
from lexiseg.stage import Job, execute, value_at
from lexiseg.stages.registry import stage_function
from lexiseg.stages.settings import parse_settings, read_values
from lexiseg.storage import hash_tree, sha256_of_json
from lexiseg.workspace import private_folder

if TYPE_CHECKING:
    from lexiseg.training import Onlooker  # Lightning behind it takes seconds to import

SHAPING = ("baselines", "data.name")  # dvc.yaml makes stages and dependencies of these


@dataclass(frozen=True)
class _Result:
    folder: Path  # what stands for the node's folder of outputs/
    identity: str | None  # None: it is the working tree's own result


class Trials:
    """Runs stages with overridden settings.

    Args:
        root: the working tree.

    Attributes:
        root: the working tree.
        graph: the stages by name.
        values: the plain values of params.yaml.
        folders: of the last run, by stage, the work folders that are the trials' own, also where it did not end well.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.graph = root, read_graph(root)
        self.values, self._lock = read_values(root), read_lock(root)
        self.folders: dict[str, Path] = {}
        self._hashes: dict[str, str] = {}

    def run(
        self,
        changes: Mapping[str, Any],
        targets: Sequence[str],
        *,
        onlooker: Callable[[Progress], Onlooker] | None = None,
    ) -> dict[str, Path]:
        """Bring the target stages up to date under `changes` (dotted keys).

        Args:
            changes: of settings, by dotted key.
            targets: names of stages.
            onlooker: makes who looks at the trainings of a stage, see `Progress`.

        Returns:
            For each target, the folder that stands for its folder of outputs/.

        Raises:
            SettingsError: wrong settings, or such as would change the graph itself.
            ChangedError: something the trials rest on changed since they began.
            GivenUpError: an onlooker gave the trial up.
        """
        values, settings = self.settings_under(changes)
        results: dict[str, _Result] = {}
        self.folders = {}
        for name in self.needed(targets):
            progress = Progress(self, name, settings, dict(results))
            with _watched(onlooker(progress)) if onlooker else nullcontext():
                results[name] = self._run_node(self.graph[name], values, settings, results)
        return {name: results[name].folder for name in targets}

    def kept(self, changes: Mapping[str, Any], targets: Sequence[str]) -> list[str]:
        """The stages that `run` would take from outputs/ as they are, of those that the targets need."""
        values, _ = self.settings_under(changes)
        kept: list[str] = []
        for name in self.needed(targets):
            node = self.graph[name]
            made = [self._producer(dep) for dep in node.deps]
            if all(other is None or other in kept for other in made) and self._stays(node, values):
                kept.append(name)
        return kept

    def settings_under(self, changes: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """What a trial with these changes goes by: the plain values, and the settings.

        Raises:
            SettingsError: wrong settings, or such as would change the graph itself.
        """
        values = override(self.values, changes)
        settings = parse_settings(values, source=f"params.yaml with {dict(changes)}")
        shaping = [key for key in SHAPING if value_at(values, key) != value_at(self.values, key)]
        if shaping:
            raise SettingsError(
                found=f"a trial changes {', '.join(f'`{key}`' for key in shaping)}",
                allowed="changes of settings that leave the stages and their inputs as they are",
                fix="set it in params.yaml (or by `lexiseg profile use`), run `dvc repro`, then the trials",
            )
        return values, settings

    def _run_node(
        self, node: Node, values: Mapping[str, Any], settings: Any, results: Mapping[str, _Result]
    ) -> _Result:
        upstream = {dep: self._producer(dep) for dep in node.deps}
        own = all(name is None or results[name].identity is None for name in upstream.values())
        if own and self._stays(node, values):
            return _Result(self.root / node.folder, None)

        def identify() -> dict[str, str]:
            made = {dep: results[name].identity if name else None for dep, name in upstream.items()}
            return {dep: identity or self._hash([dep])[dep] for dep, identity in made.items()}

        job = Job(
            node=node,
            run=stage_function(node.name),
            settings=settings,
            values=values,
            inputs={key: self._place(dep, results) for key, dep in node.inputs.items()},
            identify=identify,
            private=private_folder(self.root),
        )
        folder = execute(job, began=lambda work: self.folders.update({node.name: work}))
        return _Result(folder, sha256_of_json(hash_tree(folder)))

    def _place(self, dep: str, results: Mapping[str, _Result]) -> Path:
        name = self._producer(dep)
        if name is None:
            return self.root / dep
        return results[name].folder / os.path.relpath(dep, self.graph[name].folder)

    def _stays(self, node: Node, values: Mapping[str, Any]) -> bool:
        """Whether outputs/ has the node's result under these values, where what it needs stays as well."""
        return all(value_at(values, key) == value_at(self.values, key) for key in node.params) and self._is_recorded(
            node
        )

    def needed(self, targets: Sequence[str]) -> list[str]:
        """The targets and all stages that they need, in the order of the graph."""
        needed: set[str] = set()
        waiting = list(targets)
        while waiting:
            name = waiting.pop()
            if name not in needed:
                needed.add(name)
                waiting += [up for dep in self.graph[name].deps if (up := self._producer(dep))]
        return [name for name in self.graph if name in needed]

    def _producer(self, dep: str) -> str | None:
        for name, node in self.graph.items():
            if any(dep == out or dep.startswith(f"{out}/") for out in node.outs):
                return name
        return None

    def _is_recorded(self, node: Node) -> bool:
        entry = self._lock.get(node.name)
        if entry is None:
            return False
        recorded = {item["path"]: item["md5"] for item in [*entry.get("deps", []), *entry.get("outs", [])]}
        paths = [*node.deps, *node.outs]
        if set(recorded) != set(paths) or not all((self.root / path).exists() for path in paths):
            return False
        params = entry.get("params", {}).get("params.yaml", {})
        same = all(params.get(key) == value_at(self.values, key) for key in node.params)
        return same and self._hash(paths) == recorded

    def _hash(self, paths: Sequence[str]) -> dict[str, str]:
        # The code was imported once: under new hashes, its results would stand for code that did not make them.
        found = hash_dependencies(self.root, paths)
        changed = [path for path in paths if self._hashes.setdefault(path, found[path]) != found[path]]
        if changed:
            raise ChangedError(
                found=f"{', '.join(changed)} changed since the trials began",
                allowed="data, code and outputs that stay as they are until the last trial ends",
                fix="run them again; what finished before the change is found, not run",
            )
        return found


def _watched(onlooker: Onlooker) -> AbstractContextManager[None]:
    from lexiseg.training import watched_by

    return watched_by(onlooker)


@dataclass(frozen=True)
class Progress:
    """A stage of a trial at work, for those who look at its training.

    Attributes:
        trials: whose it is.
        stage: its name.
        settings: of the trial.
        results: of the stages before it.
    """

    trials: Trials
    stage: str
    settings: Any
    results: Mapping[str, _Result]

    def preview(self, made: Path, target: str, scratch: Path, *, instead: Mapping[str, Path]) -> Path:
        """Run the stages between this one and a target on what it would write if it ended now; nothing is kept.

        Args:
            made: folder that stands for the stage's outputs.
            target: name of a later stage.
            scratch: folder to write into.
            instead: stage -> folder that stands for its outputs, where it is not to be the trial's own.

        Returns:
            The folder of the target's outputs.
        """
        graph = self.trials.graph
        results = dict(self.results) | {name: _Result(folder, None) for name, folder in instead.items()}
        results[self.stage] = _Result(made, None)
        for name in self.trials.needed([target]):
            if name not in results and self.stage in upstream_of(graph, name):
                folder = scratch / name
                folder.mkdir(parents=True)
                inputs = {key: self.trials._place(dep, results) for key, dep in graph[name].inputs.items()}
                stage_function(name)(View(self.settings, graph[name].params), inputs, folder)
                results[name] = _Result(folder, None)
        return results[target].folder
