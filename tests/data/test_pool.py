import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.micro import picture, save, write_folder

from lexiseg.data.adapters import open_adapter
from lexiseg.data.pool import Pool, Source
from lexiseg.errors import DataError


def test_order_is_that_of_the_samples(tmp_path):
    folder = write_folder(tmp_path / "d")
    for index in range(150):
        save(folder / f"images/train/x{index:03d}.png", picture(index, height=2, width=2))
    samples = list(open_adapter("folder", folder).samples("train"))
    source = Source("folder", folder, "train", max_pixels=1000, class_count=3)
    results = []
    for workers in (1, 2):
        with Pool(workers=workers) as pool:
            results.append([one for chunk in pool.examine(source, samples) for one in chunk])
    assert [one.facts["id"] for one in results[0]] == [sample.id for sample in samples]
    assert results[0] == results[1]
    assert not multiprocessing.active_children()


def test_killed_worker_is_a_clear_error(tmp_path):
    folder = write_folder(tmp_path / "d")
    for index in range(150):
        save(folder / f"images/train/x{index:03d}.png", picture(index, height=2, width=2))
    samples = list(open_adapter("folder", folder).samples("train"))
    with Pool(workers=2) as pool:
        chunks = pool.examine(Source("folder", folder, "train", 1000, 3), samples * 50)
        next(chunks)
        for worker in multiprocessing.active_children():
            worker.kill()
        with pytest.raises(DataError) as error:
            list(chunks)
    assert "the split `train` was killed" in error.value.found
    assert "data.workers" in error.value.fix


SCRIPT = """
import sys, time
from pathlib import Path
from lexiseg.data.adapters import open_adapter
from lexiseg.data.pool import Pool, Source
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    samples = list(open_adapter("folder", folder).samples("train"))
    with Pool(workers=2) as pool:
        for chunk in pool.examine(Source("folder", folder, "train", 1000, 3), samples):
            print(*[process.pid for process in __import__("multiprocessing").active_children()], flush=True)
            time.sleep(60)
"""


def test_workers_end_with_a_killed_parent(tmp_path):
    folder = write_folder(tmp_path / "d")
    for index in range(150):
        save(folder / f"images/train/x{index:03d}.png", picture(index, height=2, width=2))
    (tmp_path / "script.py").write_text(SCRIPT)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    workers = [int(word) for word in parent.stdout.readline().split()]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while (left := [pid for pid in workers if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def _runs(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
