"""Defaults for the environment of our libraries: nobody is told what is done here, cores are shared, memory is kept.

Imported before any of them, because most read these variables once, on import. What the user has set stays.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import MutableMapping

TELEMETRY = {
    "DO_NOT_TRACK": "true",  # MLflow accepts no other spelling
    "DVC_NO_ANALYTICS": "1",
    "ITERATIVE_DO_NOT_TRACK": "1",  # the reporting package of DVC
    "GX_ANALYTICS_ENABLED": "false",  # Great Expectations
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "STREAMLIT_BROWSER_GATHER_USAGE_STATS": "false",
}
# Threads of OpenMP that wait for each other look again and again, which keeps the cores from other processes: two
# trainings of LSeg at once on two cores took 1.9 s per step each, where one took 0.44 s. Looking a thousand times
# before they sleep, it is 1.0 s, and 0.48 s alone. Small steps sleep too often then: of STEGO's, 20 a second were done
# alone; looking five thousand times it is 31, with no limit 36; and of each of two at once 10 (13.6 with a thousand,
# less than 4 with no limit).
DEFAULTS = TELEMETRY | {
    "HF_HUB_OFFLINE": "1",  # downloads are asked for: HF_HUB_OFFLINE=0 dvc repro
    "GOMP_SPINCOUNT": "5000",
}


def keep_quiet(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what is not set."""
    for name, value in DEFAULTS.items():
        environment.setdefault(name, value)


def keep_memory() -> None:
    """Let the C library keep freed memory instead of giving it back to the system.

    A training step frees and asks for the same large blocks again and again; having the system clear them each
    time took a third of a step of LSeg (0.80 s against 0.55 s on two cores). Only glibc knows the call.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        library.mallopt(mmap_threshold, 1 << 30)
        library.mallopt(trim_threshold, 2**31 - 1)


keep_quiet()
