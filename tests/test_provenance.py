import subprocess
import sys
from importlib.metadata import version

from lexiseg.provenance import made_with


def test_what_a_number_was_made_with(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/lexiseg", "ablate", "lseg"])
    found = made_with(tmp_path)
    assert found["command"] == "lexiseg ablate lseg"
    assert found["commit"] is None  # no repository
    assert found["versions"]["torch"] == version("torch")
    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["processor"]


def test_a_changed_tree_is_told(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    git("init")
    (tmp_path / "src").mkdir()
    (tmp_path / "src/file").write_text("1")
    git("add", "src")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert made_with(tmp_path)["commit"] == commit
    (tmp_path / "dvc.lock").write_text("what every run writes")
    git("add", "dvc.lock")
    assert made_with(tmp_path)["commit"] == commit
    (tmp_path / "src/file").write_text("2")
    assert made_with(tmp_path)["commit"] == f"{commit}+"
