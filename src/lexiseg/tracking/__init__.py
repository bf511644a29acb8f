"""MLflow as a projection: runs and models are published from outputs/ and dvc.lock, and can be rebuilt from them.

Only modules of this package import mlflow. What it reads from the environment is set here, before that import,
where the user has not set it.
"""

import os

from lexiseg import environment  # noqa: F401  (first: MLflow starts its telemetry while it is imported)

_DEFAULTS = {
    # By default a dead server costs seven retries of growing length, about four minutes. Nothing is lost by giving
    # up early: results are in outputs/, and `lexiseg sync` publishes them later.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # A bar for every copy of three small files says nothing, and stdout is for results.
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)
