"""`lexiseg sync`: publish what outputs/ hold and MLflow lacks."""

from __future__ import annotations

import sys
from pathlib import Path

from filelock import FileLock, Timeout

from lexiseg.pipeline import read_lock
from lexiseg.tracking.identity import methods_in, stage_name
from lexiseg.tracking.publish import Published, publish_run
from lexiseg.tracking.records import Record, read_record
from lexiseg.tracking.registry import publish_model
from lexiseg.tracking.store import connect, tracking_errors, tracking_uri
from lexiseg.tracking.workplace import Workplace
from lexiseg.workspace import private_folder

LOCK = "sync.lock"


def sync(root: Path) -> list[Published]:
    """Publish every evaluated method and baseline, and the models they registered.

    It may be interrupted and repeated at any time, by several processes at once: what is there already is
    neither written again nor changed. Results that do not belong together (a graph that was stopped half-way)
    are passed over with a line on stderr.

    Args:
        root: the working tree.

    Returns:
        What MLflow lacked and has now; empty when it had everything.

    Raises:
        TrackingError: MLflow cannot be reached or written. Nothing in outputs/ is ever touched.
    """
    private = private_folder(root)
    with tracking_errors(tracking_uri(root)):
        private.mkdir(parents=True, exist_ok=True)
    done: list[Published] = []
    with _waiting(private / LOCK):
        records = gather(root)
        if not records:
            return []
        store = connect(root)
        with tracking_errors(store.uri):
            for record in records:
                run_id, published = publish_run(store, record)
                done += published
                done += publish_model(store, record, run_id)
    return done


def gather(root: Path) -> list[Record]:
    """What MLflow should hold, from dvc.lock and outputs/."""
    lock = read_lock(root)
    methods = methods_in(lock)
    if not methods:
        _say("nothing to publish: dvc.lock has no evaluated method; `dvc repro` makes one")
        return []
    place = Workplace(root, lock)
    records = []
    for method in methods:
        reason = place.why_not(stage_name(lock, method, "evaluate"))
        if reason:
            _say(f"{method} is not published: {reason}; `dvc repro` (or `dvc checkout`) puts it right")
        else:
            records.append(read_record(place, method))
    return records


def _waiting(path: Path) -> FileLock:
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
        lock.release()
    except Timeout:
        _say("another sync is going on, waiting for it")
    return lock


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
