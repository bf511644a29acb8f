"""The name of a stage -> its function."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexiseg.errors import StageError
from lexiseg.methods import METHODS, resolve
from lexiseg.stage import RunFunction
from lexiseg.storage import write_json

NOT_RUN = "not-run.json"

SHARED = {
    "prepare": "lexiseg.stages.prepare:run",
    "validate": "lexiseg.stages.validate:run",
    "encode": "lexiseg.stages.encode:run",
    "encode-evaluate": "lexiseg.stages.encode_evaluate:run",
    "encode-trunk": "lexiseg.stages.encode_trunk:run",
    "report": "lexiseg.stages.report:run",
}
# Groups of baselines that run where a method does: those beside a method of clusters read its features.
OWNERS = {entry.baselines: name for name, entry in METHODS.items() if entry.clusters}
# The common tail: the same node for every method.
TAIL = {
    "predict": "lexiseg.stages.predict:run",
    "evaluate": "lexiseg.stages.evaluate:run",
    "register": "lexiseg.stages.register:run",
}


def stage_reference(name: str) -> tuple[str, dict[str, str]]:
    """Where a stage's function is ("module:name"), and the keyword arguments that make it this stage's.

    Raises:
        StageError: no function belongs to this name.
    """
    if name in SHARED:
        return SHARED[name], {}
    head, _, item = name.partition("@")
    if head == "baseline-predict" and item:
        return "lexiseg.stages.baseline:run", {"name": item}
    if head == "baseline-evaluate" and item:
        return TAIL["evaluate"], {"method": f"baselines/{item}"}
    if head == "kmeans-predict" and item:
        return "lexiseg.methods.stego.stages:kmeans_predict", {"kind": item}
    if head == "kmeans-evaluate" and item:
        return TAIL["evaluate"], {"method": f"baselines/kmeans-{item}"}
    method, _, part = name.partition("-")
    if method in METHODS and part in METHODS[method].stages:
        return METHODS[method].stages[part], {}
    if method in METHODS and part in TAIL:
        return TAIL[part], {"method": method}
    raise StageError(
        found=f"no function for the stage `{name}`",
        allowed=f"{', '.join(SHARED)}, <method>-<stage> with a method of {', '.join(METHODS)}, "
        "baseline-predict@NAME, baseline-evaluate@NAME, kmeans-predict@KIND, kmeans-evaluate@KIND",
        fix="correct the name in dvc.yaml, or add the stage to the method's entry in lexiseg.methods",
    )


def stage_function(name: str) -> RunFunction:
    """The function of a stage: `run(settings, inputs, outputs)`.

    Its module is imported when it runs: a stage that finds its result finished needs none of it, and the hash
    of the code is taken before the code is read.
    """
    reference, arguments = stage_reference(name)

    def run(settings: Any, inputs: Mapping[str, Path], outputs: Path) -> None:
        method, _, part = name.partition("@")[0].partition("-")
        method = OWNERS.get(method, method)
        if method in METHODS and not getattr(settings, method).run:
            print(f"{name}: not run, since params.yaml has `{method}.run: false`")
            _write_that_it_did_not_run(method, outputs, part=part)
        else:
            resolve(reference)(settings, inputs, outputs, **arguments)

    return run


def _write_that_it_did_not_run(method: str, outputs: Path, *, part: str) -> None:
    """What DVC expects of a stage, with nothing in it but the reason. A graph of DVC has no stages on condition."""
    note = {"method": method, "run": False}
    if part == "evaluate":
        write_json(outputs / "metrics.json", note)
        write_json(outputs / "pictures" / NOT_RUN, note)
        write_json(outputs / "tables" / NOT_RUN, note)
    else:
        write_json(outputs / NOT_RUN, note)
