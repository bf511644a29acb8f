"""Nothing phones home: what the libraries make of the environment that lexiseg sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lexiseg.environment import DEFAULTS, keep_quiet
from lexiseg.settings import read_yaml

ROOT = Path(__file__).parents[1]
# What each library itself says, as an expression that is true when it keeps quiet.
QUIET = {
    "mlflow": "__import__('mlflow.telemetry.utils').telemetry.utils.is_telemetry_disabled()",
    "huggingface_hub": "__import__('huggingface_hub.constants').constants.HF_HUB_DISABLE_TELEMETRY",
    "huggingface_hub offline": "__import__('huggingface_hub.constants').constants.HF_HUB_OFFLINE",
    "dvc": "not __import__('dvc.analytics').analytics.is_enabled()",
}


def is_quiet(library: str, *, after: str, home: Path) -> bool:
    # A bare environment: some libraries keep quiet by themselves where they see a test or a CI run.
    bare = {"PATH": os.environ["PATH"], "HOME": str(home)}
    code = f"{after}; print(bool({QUIET[library]}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=home, env=bare, text=True, capture_output=True, check=True)
    return done.stdout.split()[-1] == "True"


def test_what_the_user_sets_stays():
    environment = {"HF_HUB_OFFLINE": "0"}
    keep_quiet(environment)
    assert environment == {**DEFAULTS, "HF_HUB_OFFLINE": "0"}


@pytest.mark.parametrize("library", QUIET)
def test_libraries_keep_quiet(library, tmp_path):
    assert is_quiet(library, after="import lexiseg.cli", home=tmp_path)
    assert not is_quiet(library, after="pass", home=tmp_path), "the check itself cannot fail"


def test_all_of_them_are_set_before_the_command_line_imports_anything_else():
    lines = (ROOT / "src/lexiseg/cli.py").read_text(encoding="utf-8").splitlines()
    own = [line for line in lines if line.startswith(("from lexiseg", "import lexiseg"))]
    assert own[0].startswith(("from lexiseg import environment", "import lexiseg.environment"))


def test_dvc_is_told_in_the_repository():
    # dvc is also called directly, without lexiseg: then its own file counts.
    text = (ROOT / ".dvc/config").read_text(encoding="utf-8")
    assert "analytics = false" in text
    assert "check_update = false" in text


def test_the_embedded_remote_is_not_the_default():
    text = (ROOT / ".dvc/config").read_text(encoding="utf-8")
    assert "remote = " not in text
    entries = read_yaml(ROOT / "data.dvc")["outs"]
    assert [entry["path"] for entry in entries if entry.get("remote") == "embedded"] == ["data/world"]
