"""How everything here is measured: candidates take turns, memory is that of a fresh process, a result is a file.

The file is named after what was measured, the hardware, torch's version and the number format, so that results of
several machines lie side by side, and it holds the command that repeats it.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lexiseg.provenance import made_with
from lexiseg.storage import write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUIET_SECONDS = 2.0  # what takes longer shows its progress

Candidates = Mapping[str, Callable[[], Any]]


# ---- time --------------------------------------------------------------------------------------------------------


def compare(
    candidates: Candidates,
    *,
    repeats: int,
    warmup: int = 1,
    device: str = "cpu",
    title: str = "compare",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Time candidates in turns, so that whatever else the machine does meets all of them.

    Each round runs every candidate once; every other round goes backwards, so that none always runs on the heels of
    the same other one.

    Args:
        candidates: name -> what is timed; the first is the one that the others are compared with.
        repeats: timed rounds.
        warmup: rounds before, not timed.
        device: with "cuda", time counts until the GPU has finished.
        title: words on the progress bar.
        clock: seconds.

    Returns:
        `seconds`: per candidate median, quartiles (25 % and 75 %) and all times in the order of the rounds.
        `times_as_long`: per other candidate, its time over the first one's: `of_medians`, and `quartiles` and
        `range` (lowest, highest) of the ratios within each round.
    """
    finish = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    names, times = list(candidates), {name: [] for name in candidates}
    gc.collect()
    gc.freeze()  # what is there already is not looked through again in every round
    with tqdm(total=(warmup + repeats) * len(names), desc=title, delay=QUIET_SECONDS, leave=False, unit="run") as bar:
        for turn in range(warmup + repeats):
            for name in names if turn % 2 == 0 else reversed(names):
                gc.collect()  # nobody pays for another's garbage
                finish()
                start = clock()
                candidates[name]()
                finish()
                if turn >= warmup:
                    times[name].append(clock() - start)
                bar.update()
    gc.unfreeze()
    first = np.array(times[names[0]])
    return {
        "repeats": repeats,
        "warmup": warmup,
        "seconds": {name: {**summary(values), "all": values} for name, values in times.items()},
        "times_as_long": {name: ratios(times[name], first) for name in names[1:]},
    }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, (25, 50, 75)).tolist()
    return {"median": middle, "quartiles": [low, high]}


def ratios(values: Sequence[float], first: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """How many times as long as the first: over the medians, and the spread over the rounds."""
    rounds = np.array(values) / np.array(first)
    return {
        "of_medians": float(np.median(values) / np.median(first)),
        "quartiles": summary(rounds.tolist())["quartiles"],
        "range": [float(rounds.min()), float(rounds.max())],
    }


def table(timed: Mapping[str, Any], *, per: int = 1, unit: str = "run") -> str:
    """What `compare` gave as lines to print: milliseconds per unit, of which a run does `per`."""
    lines = []
    for name, seconds in timed["seconds"].items():
        middle, low, high = (1000 * value / per for value in (seconds["median"], *seconds["quartiles"]))
        line = f"  {name:<34} {middle:10.2f} ms/{unit}  ({low:.2f} to {high:.2f})"
        if ratio := timed["times_as_long"].get(name):
            line += f"  {ratio['of_medians']:.2f} times as long ({ratio['range'][0]:.2f} to {ratio['range'][1]:.2f})"
        lines.append(line)
    return "\n".join(lines)


# ---- memory ------------------------------------------------------------------------------------------------------


def peak_bytes() -> int:
    """The most memory that this process has had resident, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux hands getrusage's figure on to a child that a large process starts; this one begins anew.
        return int(re.findall(r"^VmHWM:\s+(\d+) kB", status.read_text(), flags=re.MULTILINE)[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory(function: str, **arguments: Any) -> dict[str, Any]:
    """Run a function of a script here in a process of its own, and see how much memory that had at most.

    Args:
        function: "script:name"; what the script imports counts as imports, what the function does as work.
        arguments: of the function, such as JSON can hold.

    Returns:
        `peak_bytes`, `imports_bytes` (what the imports alone took), `work_bytes` (the difference), and the
        function's own `result`.

    Raises:
        RuntimeError: the process failed, or was killed for want of memory.
    """
    command = [sys.executable, __file__, function, json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{function} ended with {done.returncode} (-9: killed, as for want of memory)")
    return json.loads(done.stdout.splitlines()[-1])


def _run_in_this_process(reference: str, arguments: str) -> None:
    sys.path.insert(0, str(ROOT))
    script, _, name = reference.partition(":")
    function = getattr(import_module(f"benchmarks.{script}"), name)
    imports = peak_bytes()
    result = function(**json.loads(arguments))
    peak = peak_bytes()
    figures = {"peak_bytes": peak, "imports_bytes": imports, "work_bytes": peak - imports, "result": result}
    print(json.dumps(figures))


# ---- results -----------------------------------------------------------------------------------------------------


def arguments_for(description: str | None, *, repeats: int | None) -> argparse.ArgumentParser:
    """A parser with the options that every script has; `--repeats` where something is timed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if repeats:
        parser.add_argument("--repeats", type=int, default=repeats, help="timed rounds")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU; default: torch's own choice")
    parser.add_argument(
        "--out", nargs="?", type=Path, const=RESULTS, metavar="FOLDER", help="write a result file (benchmarks/results)"
    )
    return parser


def use_threads(count: int | None) -> None:
    """As many threads as `--threads` says."""
    if count:
        torch.set_num_threads(count)


def write_result(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    given: argparse.Namespace,
    precision: str,
    device: str = "cpu",
    peers: Sequence[str] = (),
) -> Path | None:
    """Write what was measured, where `--out` asks for it.

    Args:
        name: script and variant, the first words of the file's name.
        rows: one per case.
        given: the script's options.
        precision: the number format, such as fp32.
        device: "cpu" or "cuda".
        peers: packages that were compared with, whose versions are noted too.
    """
    if given.out is None:
        return None
    made = made_with(ROOT)
    made["versions"] |= {package: version(package) for package in peers}
    made["threads"] = torch.get_num_threads()
    made["device"] = device
    if torch.device(device).type == "cuda":
        made["versions"]["cuda"] = torch.version.cuda
    settings = {key: value for key, value in vars(given).items() if key not in ("out", "threads")}
    path = given.out / file_name(name, made, precision=precision)
    write_json(path, {"benchmark": name, "settings": settings, "rows": rows, "made_with": made})
    print(f"written: {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}", file=sys.stderr)
    return path


def file_name(name: str, made: Mapping[str, Any], *, precision: str) -> str:
    """<name>-<hardware>-torch<version>-<precision>.json; the GPU where one did the work, else processor and cores."""
    hardware = made["hardware"]
    on_gpu = torch.device(made["device"]).type == "cuda"
    machine = hardware["gpu"] if on_gpu else f"{hardware['processor']} {hardware['cores']} cores"
    return f"{slug(name)}-{slug(machine)}-torch{slug(made['versions']['torch'])}-{slug(precision)}.json"


def slug(text: str) -> str:
    """ "Intel(R) Xeon(R) CPU @ 2.20GHz" -> "intel-xeon-cpu-2.20ghz"."""
    return re.sub(r"[^a-z0-9._]+", "-", re.sub(r"\((r|tm)\)", " ", text.lower())).strip("-")


if __name__ == "__main__":
    _run_in_this_process(*sys.argv[1:])
