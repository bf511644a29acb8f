"""dvc.yaml against the code: every stage declares the code that it runs, and no other.

An undeclared module is the worse fault: after a change in it DVC would call an old result up to date. A
superfluous one makes stages run again for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import grimp
import pytest

from lexiseg.data.adapters import ADAPTERS
from lexiseg.methods import BASELINES, METHODS
from lexiseg.pipeline import Node, read_graph
from lexiseg.stages.registry import stage_reference

ROOT = Path(__file__).parents[1]

# Imported by stages and declared by none: a change in them does not change what a stage writes.
PLUMBING = {
    "lexiseg": "the version, and names for `import lexiseg`",
    "lexiseg.device": "picks one of the machine's devices; like the processor, it is in no fingerprint",
    "lexiseg.errors": "the form of messages",
    "lexiseg.methods": "the registry; what it refers to is followed below",
    "lexiseg.phases": "notes how long parts of a prediction take",
    "lexiseg.settings": "the values themselves are parameters of the stage",
    "lexiseg.cluster": "where a stage runs is no part of what it computes; tests compare results with Ray and without",
    "lexiseg.ranks": "starts the processes of a training and divides its batches; tests compare them with one process",
    "lexiseg.storage": "writes what it is given; its tests fix the bytes",
    "lexiseg.workspace": "where caches and weight files lie",
}

# Declared as folders although a stage runs only some of their files: what is in them changes together, and lists of
# a dozen files in every stage would be harder to read than a stage that runs once too often.
AS_A_WHOLE = {
    "src/lexiseg/encoders",
    "src/lexiseg/evaluation",
    "src/lexiseg/methods/baselines",
    "src/lexiseg/methods/lseg",
    "src/lexiseg/methods/stego",
    "src/lexiseg/methods/tcl",
    "src/lexiseg/pictures",
}


@cache
def nodes() -> dict[str, Node]:
    return read_graph(ROOT)


@cache
def imports() -> grimp.ImportGraph:
    """All imports of the package, those inside functions too, without the ones for type checkers alone."""
    return grimp.build_graph("lexiseg", cache_dir=None, exclude_type_checking_imports=True)


def referred(module: str, arguments: dict[str, str], *, stage: str) -> list[str]:
    """The modules that `module` imports by a name in a table, for a stage with these arguments."""
    references: Iterable[str] = ()
    if module == "lexiseg.data.adapters":
        references = ADAPTERS.values()
    elif module == "lexiseg.methods" and "name" in arguments:
        references = [BASELINES[arguments["name"]]]
    elif module == "lexiseg.methods" and (method := owner(arguments.get("method", ""))) in METHODS:
        entry = METHODS[method]
        # The evaluate stage has no model, only what is done to saved scores; register copies the model's files.
        parts = {"evaluate": [entry.refiner], "register": []}.get(
            stage.partition("@")[0].rpartition("-")[2], [entry.load]
        )
        references = filter(None, parts)
    return [reference.partition(":")[0] for reference in references]


def owner(method: str) -> str:
    """The method whose parts evaluate a method: itself, or for k-means the one that it stands beside."""
    group = method.removeprefix("baselines/").partition("-")[0]
    beside = [name for name, entry in METHODS.items() if entry.clusters and entry.baselines == group]
    return beside[0] if beside else method


def run_by(stage: str) -> set[str]:
    """All modules whose code a stage runs, without the plumbing."""
    reference, arguments = stage_reference(stage)
    seen: set[str] = set()
    waiting = [reference.partition(":")[0]]
    while waiting:
        module = waiting.pop()
        waiting += referred(module, arguments, stage=stage) if module not in seen else []
        if module not in seen and module not in PLUMBING:
            waiting += imports().find_modules_directly_imported_by(module)
        seen.add(module)
    return seen - PLUMBING.keys()


def file_of(module: str) -> str:
    path = Path("src", *module.split("."))
    return (path / "__init__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")).as_posix()


def covers(declared: str, file: str) -> bool:
    return file == declared or file.startswith(f"{declared}/")


@pytest.mark.parametrize("stage", nodes())
def test_a_stage_declares_the_code_it_runs(stage):
    missing = {file_of(module) for module in run_by(stage)}
    missing = {file for file in missing if not any(covers(path, file) for path in nodes()[stage].code)}
    assert not missing, f"add to the deps of {stage} in dvc.yaml: {', '.join(sorted(missing))}"


@pytest.mark.parametrize("group", sorted({name.partition("@")[0] for name in nodes()}))
def test_a_stage_declares_no_other_code(group):
    # The items of a `foreach` share one list of dependencies.
    items = [name for name in nodes() if name.partition("@")[0] == group]
    files = {file_of(module) for item in items for module in run_by(item)}
    declared = {path for item in items for path in nodes()[item].code}
    # Of a folder, every module: a change in one that the stage does not run would run it again for nothing.
    modules = {path for path in declared if path in AS_A_WHOLE or not (ROOT / path).is_dir()}
    modules |= {
        file.relative_to(ROOT).as_posix() for path in declared - modules for file in (ROOT / path).rglob("*.py")
    }
    unused = sorted(path for path in modules if not any(covers(path, file) for file in files))
    assert not unused, f"remove from the deps of {group} in dvc.yaml, nothing there is imported: {', '.join(unused)}"


def test_the_list_of_plumbing_is_needed():
    started = {stage_reference(stage)[0].partition(":")[0] for stage in nodes()}
    modules = started.union(*map(run_by, nodes()))
    imported = {name for module in modules for name in imports().find_modules_directly_imported_by(module)}
    assert PLUMBING.keys() <= imported


@pytest.mark.parametrize("stage", nodes())
def test_outputs_lie_in_a_folder_of_the_stage_alone(stage):
    folder = nodes()[stage].folder
    assert folder.startswith("outputs/")
    others = {name: node.folder for name, node in nodes().items() if name != stage}
    assert not [name for name, other in others.items() if covers(other, folder)]
