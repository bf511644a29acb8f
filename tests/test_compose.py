"""What compose.yaml promises: open to this machine alone by default, no secret in it, pinned images, health checks."""

from __future__ import annotations

import configparser
import itertools
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from helpers.compose import PORTS, VARIABLE, filled, natively, read_env, services
from helpers.team import Team
from helpers.working_tree import SOURCE, environment

SERVICES = services(SOURCE)
TEXT = (SOURCE / "compose.yaml").read_text(encoding="utf-8")
EXAMPLE = (SOURCE / ".env.example").read_text(encoding="utf-8")


def servers() -> list[str]:
    return [name for name, service in SERVICES.items() if service["restart"] != "no"]


def test_ports_are_open_to_this_machine_alone_unless_told_otherwise():
    for name in servers():
        (published,) = SERVICES[name]["ports"]
        assert filled(published, {}) == f"127.0.0.1:{PORTS[name]}:{PORTS[name]}"
        told = filled(published, {"LEXISEG_BIND": "10.0.0.2"})
        # What has no password stays here whatever is told.
        assert told.startswith("127.0.0.1:" if name == "optuna-dashboard" else "10.0.0.2:"), name
    assert not [name for name in SERVICES if name not in servers() and "ports" in SERVICES[name]]


def test_every_secret_comes_from_the_environment_and_has_to():
    asked = {match["name"]: match["kind"] for match in VARIABLE.finditer(TEXT)}
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|ACCESS_KEY|AUTH_STRING", variable):
                (match,) = VARIABLE.finditer(value)
                assert match["kind"] == ":?", f"{name}: {variable}"
    for name, kind in asked.items():
        line = rf"^{name}=$" if kind == ":?" else rf"^# {name}="
        assert re.search(line, EXAMPLE, flags=re.MULTILINE), f".env.example lacks {name}"
    assert set(re.findall(r"^(\w+)=", EXAMPLE, flags=re.MULTILINE)) <= set(asked)
    with pytest.raises(KeyError, match=r"POSTGRES_PASSWORD: missing, see \.env\.example"):
        filled(SERVICES["postgres"]["environment"]["POSTGRES_PASSWORD"], {"POSTGRES_PASSWORD": ""})


def test_no_command_line_holds_a_secret():
    for name, service in SERVICES.items():
        words = service.get("command", []) + service.get("healthcheck", {}).get("test", [])
        used = {match["name"] for word in words for match in VARIABLE.finditer(str(word))}
        assert used <= {"LEXISEG_MLFLOW_HOSTS", "LEXISEG_MLFLOW_ORIGINS"}, name


def test_images_are_pinned():
    dockerfile = (SOURCE / "team/Dockerfile").read_text(encoding="utf-8")
    images = [service["image"] for service in SERVICES.values()] + re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    assert len(images) == len(SERVICES) + 1
    for image in images:
        assert re.search(r":v?\d[\w.-]*$", image), image
    built = {service["image"] for service in SERVICES.values() if "build" in service}
    assert built == {"lexiseg-team:1"}


def test_every_server_has_a_check_and_what_it_needs_is_there_first():
    for name, service in SERVICES.items():
        if name in servers():
            assert service["healthcheck"]["test"][0] == "CMD", name
            assert service["restart"] == "unless-stopped", name
        for need, how in service.get("depends_on", {}).items():
            expected = "service_healthy" if need in servers() else "service_completed_successfully"
            assert how["condition"] == expected, f"{name}: {need}"


def test_passwords_are_remembered_in_one_process_only():
    settings = configparser.ConfigParser()
    settings.read(SOURCE / "team/mlflow-auth.ini")
    # With more of them, the others would let an old password or a removed user in.
    assert int(settings["mlflow"]["auth_cache_ttl_seconds"]) > 0
    assert "--workers=1" in SERVICES["mlflow"]["command"]
    assert settings["mlflow"]["default_permission"] == "READ"
    assert "admin_password" not in settings["mlflow"]


def test_the_image_has_what_the_extra_has_and_its_versions():
    extra = tomllib.loads((SOURCE / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    dockerfile = (SOURCE / "team/Dockerfile").read_text(encoding="utf-8")
    line = re.search(r"^RUN pip install -c /tmp/constraints.txt (.+)$", dockerfile, flags=re.MULTILINE)
    assert line
    # Prefect is lexiseg's own, and the store of data is the members' business.
    assert set(shlex.split(line[1])) == {*extra["team"], "prefect"} - {"dvc-s3"}


def test_git_and_the_builder_of_images_never_see_the_secrets():
    assert subprocess.run(["git", "check-ignore", "--quiet", ".env"], cwd=SOURCE).returncode == 0
    ignored = (SOURCE / ".dockerignore").read_text(encoding="utf-8").split("\n")
    assert "*" in ignored
    assert [line for line in ignored if line.startswith("!")] == ["!constraints.txt", "!team/Dockerfile"]


def test_secrets_are_made_once_and_are_all_different(tmp_path):
    (tmp_path / "team").mkdir()
    for name in (".env.example", "team/make_env.py"):
        (tmp_path / name).write_text((SOURCE / name).read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, str(tmp_path / "team/make_env.py")]
    subprocess.run(command, check=True, capture_output=True)
    made = read_env(tmp_path / ".env")
    assert set(made) == set(re.findall(r"^(\w+)=$", EXAMPLE, flags=re.MULTILINE))
    assert len(set(made.values())) == len(made)
    assert all(re.fullmatch(r"[0-9a-f]{32}", secret) for secret in made.values())
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600
    again = subprocess.run(command, text=True, capture_output=True)
    assert again.returncode == 1
    assert "to do: keep it" in again.stderr
    assert read_env(tmp_path / ".env") == made


def test_a_command_moves_to_this_machine_and_stays_the_same_otherwise():
    ports = dict(zip(PORTS, range(1, 6), strict=True))
    moved = [natively(word, ports=ports, root=SOURCE) for word in SERVICES["mlflow"]["command"]]
    changed = {old: new for old, new in zip(SERVICES["mlflow"]["command"], moved, strict=True) if old != new}
    assert changed == {
        "--host=0.0.0.0": "--host=127.0.0.1",
        "--port=5000": "--port=3",
        "--allowed-hosts=${LEXISEG_MLFLOW_HOSTS:-localhost:5000,127.0.0.1:5000}": (
            "--allowed-hosts=${LEXISEG_MLFLOW_HOSTS:-localhost:3,127.0.0.1:3}"
        ),
        "--cors-allowed-origins=${LEXISEG_MLFLOW_ORIGINS:-http://localhost:5000}": (
            "--cors-allowed-origins=${LEXISEG_MLFLOW_ORIGINS:-http://localhost:3}"
        ),
    }


def test_the_commands_without_containers_are_those_of_the_containers():
    page = (SOURCE / "docs/team.md").read_text(encoding="utf-8").replace("\\\n", " ")
    for name in ("mlflow", "prefect", "optuna-dashboard"):
        expected = [filled(word, {}).replace("0.0.0.0", "127.0.0.1") for word in SERVICES[name]["command"]]
        start = " ".join(itertools.takewhile(lambda word: not word.startswith("--"), expected))
        (words,) = (shlex.split(line) for line in page.splitlines() if line.startswith(f"{start} --"))
        # A folder instead of the store, which a machine alone has no need of.
        assert words == [word.replace("s3://mlflow", "/srv/lexiseg/artifacts") for word in expected]


def test_a_folder_that_holds_no_backup_is_not_taken_for_one(tmp_path):
    (tmp_path / "mlflow").mkdir()
    command = [sys.executable, str(SOURCE / "team/bucket.py"), "load", str(tmp_path)]
    own = environment(SOURCE) | {"AWS_DEFAULT_REGION": "us-east-1"}
    done = subprocess.run(command, env=own, text=True, capture_output=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"found: no dvc in {tmp_path}\nallowed: a folder that `save` has written")


def test_a_store_that_does_not_answer_is_told_of(tmp_path):
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_MAX_ATTEMPTS": "1"}
    own = environment(SOURCE) | keys | {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    command = [sys.executable, str(SOURCE / "team/bucket.py"), "create"]
    done = subprocess.run(command, env=own, text=True, capture_output=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith('found: Could not connect to the endpoint URL: "http://127.0.0.1:9')
    assert "to do: set AWS_ENDPOINT_URL" in done.stderr


def test_a_server_that_ends_is_told_with_what_it_said(tmp_path, monkeypatch):
    team = Team(tmp_path)
    try:
        team.start("databases")
        monkeypatch.setitem(team.secrets, "PREFECT_DB_PASSWORD", "wrong")
        with pytest.raises(AssertionError, match="prefect ended"):
            team.start("prefect")
    finally:
        team.close()
