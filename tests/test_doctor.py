from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from dvc.repo import Repo
from helpers.working_tree import SOURCE

import lexiseg
from lexiseg.doctor import Finding, examine
from lexiseg.environment import DEFAULTS
from lexiseg.storage import write_text


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What doctor looks at, in good health."""
    monkeypatch.delenv("LEXISEG_HOME", raising=False)
    for name, value in DEFAULTS.items():
        monkeypatch.setenv(name, value)
    shutil.copytree(SOURCE / "profiles", tmp_path / "profiles")
    shutil.copy(SOURCE / "dvc.yaml", tmp_path)
    shutil.copy(SOURCE / "profiles/embedded.yaml", tmp_path / "params.yaml")
    Repo.init(str(tmp_path), no_scm=True).close()
    write_text(tmp_path / "data/world/world.yaml", "")
    monkeypatch.setattr(lexiseg, "__file__", str(tmp_path / "src/lexiseg/__init__.py"))
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=50e9))
    return tmp_path


def bad(root: Path) -> Finding:
    """The one thing at fault."""
    found = [finding for finding in examine(root) if not finding.good]
    assert len(found) == 1, found
    assert found[0].fix
    return found[0]


def test_nothing_at_fault(tree):
    findings = examine(tree)
    assert all(finding.good for finding in findings), findings
    text = "\n".join(finding.what for finding in findings)
    for part in (
        "Python 3",
        "torch 2",
        "of this working tree",
        "on PATH",
        "computing on",
        "profile embedded;",
        "GB free",
    ):
        assert part in text
    assert "data/world is there" in text


def test_edits_of_params_are_shown(tree):
    text = (tree / "params.yaml").read_text()
    write_text(tree / "params.yaml", text.replace("\nseed: 0 ", "\nseed: 5 "))
    assert any("profile embedded, changed in seed;" in finding.what for finding in examine(tree))


def test_wrong_settings(tree):
    write_text(tree / "params.yaml", (tree / "params.yaml").read_text().replace("\nseed: 0 ", "\nsead: 0 "))
    found = bad(tree)
    assert "`sead`: unknown key (did you mean `seed`?)" in found.what
    assert "edit params.yaml" in found.fix


@pytest.mark.parametrize("content", ["a: [1", "just text"])
def test_settings_that_cannot_be_read(tree, content):
    write_text(tree / "params.yaml", content)
    findings = [finding for finding in examine(tree) if not finding.good]
    assert len(findings) == 2  # of settings and of data: neither can be known
    assert "no data set is named in params.yaml" in findings[1].what


def test_a_broken_graph(tree):
    write_text(tree / "dvc.yaml", "stages: [")
    assert "dvc cannot read the graph" in bad(tree).what


def test_missing_data(tree):
    shutil.rmtree(tree / "data/world")
    found = bad(tree)
    assert found.what == "data/world is missing"
    assert "dvc pull data/world" in found.fix
    assert "lexiseg data add world PATH" in found.fix


def test_a_missing_package(tree, monkeypatch):
    monkeypatch.setattr("lexiseg.doctor.PACKAGES", ("torch", "no-such-package"))
    found = bad(tree)
    assert found.what == "no-such-package is missing"
    assert "pip install" in found.fix


def test_the_package_of_another_tree(tree, monkeypatch):
    monkeypatch.setattr(lexiseg, "__file__", "/elsewhere/lexiseg/__init__.py")
    found = bad(tree)
    assert "from /elsewhere/lexiseg" in found.what
    assert "pip install -e ." in found.fix


def test_tools_that_are_not_on_path(tree, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "dvc" else name)
    found = bad(tree)
    assert found.what == "not on PATH: dvc"
    assert "source .venv/bin/activate" in found.fix


def test_a_disk_that_is_nearly_full(tree, monkeypatch):
    write_text(tree / ".lexiseg/work/big", "x" * 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e9))
    found = bad(tree)
    assert "1 GB free; .lexiseg holds 0.0 GB" in found.what
    assert "lexiseg clean" in found.fix


def test_telemetry_that_somebody_switched_on(tree, monkeypatch):
    monkeypatch.setenv("DO_NOT_TRACK", "false")
    found = bad(tree)
    assert "DO_NOT_TRACK" in found.what
    assert "unset" in found.fix


def test_files_that_a_killed_dvc_left_half_written(tree):
    write_text(tree / "dvc.lock", "schema: '2.0'\nstages:\n  prepare:\n    cmd: lexiseg\n    deps:\n    - pa")
    write_text(tree / ".dvc/tmp/rwlock", "")
    findings = [finding for finding in examine(tree) if not finding.good]
    assert "dvc cannot read the graph" in findings[0].what
    finding = findings[1]
    assert finding.what == "half-written by a killed dvc: dvc.lock, .dvc/tmp/rwlock"
    assert "lexiseg mend" in finding.fix
