"""A team's servers: the processes of compose.yaml, with PostgreSQL and an S3 store, and what they let whom do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import optuna
import psycopg2
import pytest
import requests
from helpers.team import Team, wait_for
from helpers.working_tree import SOURCE, environment, run
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from lexiseg.errors import TrackingError
from lexiseg.promotion.promote import read_history
from lexiseg.promotion.story import faults
from lexiseg.tracking import claims
from lexiseg.tracking.claims import take_turn
from lexiseg.tracking.store import connect, tracking_errors

pytestmark = pytest.mark.timeout(600)
READ = "/api/2.0/mlflow/experiments/search?max_results=5"
WRITE = "/api/2.0/mlflow/experiments/create"


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Team]:
    """Servers that are not started yet. The test's own process has no key of the store."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "team").mkdir()
    team = Team(tmp_path / "team")
    try:
        yield team
    finally:
        team.close()


@pytest.fixture
def sign_in(team: Team, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MlflowClient]:
    """Be one of MLflow's users from now on; with no name, nobody."""

    def become(name: str | None = None, password: str | None = None) -> MlflowClient:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", team.url("mlflow"))
        for variable, value in (("USERNAME", name), ("PASSWORD", password)):
            monkeypatch.delenv(f"MLFLOW_TRACKING_{variable}", raising=False)
            if value is not None:
                monkeypatch.setenv(f"MLFLOW_TRACKING_{variable}", value)
        return MlflowClient(team.url("mlflow"))

    return become


def objects(team: Team, bucket: str) -> dict[str, bytes]:
    """What the S3 store has in a bucket."""
    store = store_of(team)
    found = store.list_objects_v2(Bucket=bucket).get("Contents", [])
    return {entry["Key"]: store.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read() for entry in found}


def store_of(team: Team) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=team.url("s3"),
        region_name="us-east-1",
        aws_access_key_id=team.secrets["S3_ACCESS_KEY"],
        aws_secret_access_key=team.secrets["S3_SECRET_KEY"],
    )


def documented(marker: str) -> list[str]:
    """The commands of docs/team.md that have some words."""
    lines = (SOURCE / "docs/team.md").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    found = [line for line in lines if marker in line and not line.startswith("|")]
    assert found, f"docs/team.md has no command with {marker!r}"
    return found


def refused(action: Callable[..., Any], *arguments: Any) -> str:
    """What the server says to a user who may not do this."""
    # Artifacts go another way than the rest, and have another error.
    with pytest.raises((MlflowException, requests.HTTPError), match=r"(?i)permission denied") as caught:
        action(*arguments)
    assert "403" in str(caught.value)
    return str(caught.value)


def test_mlflow_lets_members_write_readers_read_and_nobody_else_in(team, sign_in, tmp_path, monkeypatch):
    team.start("mlflow")
    passwords = {"anna": team.users("add", "anna"), "ben": team.users("add", "ben")}
    passwords["rita"] = team.users("add", "rita", "--reader")
    url, admin = team.url("mlflow"), ("admin", team.secrets["MLFLOW_ADMIN_PASSWORD"])

    for who in (None, ("anna", "wrong password"), ("admin", ""), ("nobody", passwords["anna"])):
        assert requests.get(url + READ, auth=who, timeout=30).status_code == 401
        assert requests.post(url + WRITE, auth=who, json={"name": "theirs"}, timeout=30).status_code == 401
    # Pages of others, and names of others that lead here, are refused even with a password.
    foreign = {"Host": "mlflow.example.org"}
    assert requests.get(url + READ, auth=admin, headers=foreign, timeout=30).status_code == 403
    foreign = {"Origin": "https://pages.example.org"}
    answer = requests.post(url + WRITE, auth=admin, headers=foreign, json={"name": "theirs"}, timeout=30)
    assert answer.status_code == 403
    found = requests.get(url + READ, auth=admin, timeout=30).json()["experiments"]
    assert {experiment["name"] for experiment in found} == {"Default", "lexiseg-promotions"}

    anna = sign_in("anna", passwords["anna"])
    experiment = anna.create_experiment("lexiseg-world")
    run_id = anna.create_run(experiment).info.run_id
    anna.log_metric(run_id, "miou", 0.5)
    (tmp_path / "scores.txt").write_text("0.5\n", encoding="utf-8")
    anna.log_artifact(run_id, str(tmp_path / "scores.txt"))
    assert objects(team, "mlflow") == {f"{experiment}/{run_id}/artifacts/scores.txt": b"0.5\n"}
    anna.create_registered_model("tcl")
    version = anna.create_model_version("tcl", f"runs:/{run_id}", run_id=run_id).version
    anna.set_registered_model_alias("tcl", "production", version)

    # A member writes what another has made; only its maker takes it away.
    ben = sign_in("ben", passwords["ben"])
    ben.log_metric(run_id, "miou_unseen", 0.25)
    ben.set_registered_model_alias("tcl", "challenger", version)
    refused(ben.delete_experiment, experiment)
    refused(ben.delete_registered_model, "tcl")

    rita = sign_in("rita", passwords["rita"])
    assert rita.get_run(run_id).data.metrics == {"miou": 0.5, "miou_unseen": 0.25}
    assert rita.get_model_version_by_alias("tcl", "production").version == version
    assert Path(rita.download_artifacts(run_id, "scores.txt", str(tmp_path))).read_bytes() == b"0.5\n"
    refused(rita.log_metric, run_id, "miou", 0.9)
    refused(rita.log_artifact, run_id, str(tmp_path / "scores.txt"), "more")
    refused(rita.create_run, experiment)
    refused(rita.set_registered_model_alias, "tcl", "production", version)
    refused(rita.delete_registered_model_alias, "tcl", "production")
    refused(rita.create_model_version, "tcl", f"runs:/{run_id}")
    said = refused(rita.log_metric, run_id, "miou", 0.9)
    assert list(objects(team, "mlflow").values()) == [b"0.5\n"]

    # lexiseg says to each of them what to do.
    sign_in()
    with pytest.raises(TrackingError, match="401") as caught:
        connect(tmp_path)
    assert "a user that the server lets in" in caught.value.allowed
    assert "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in caught.value.fix
    sign_in("anna", "wrong password")
    with pytest.raises(TrackingError, match="401"):
        connect(tmp_path)
    sign_in("rita", passwords["rita"])
    store = connect(tmp_path)
    with pytest.raises(TrackingError) as caught, tracking_errors(store.uri):
        store.client.log_metric(run_id, "miou", 0.9)
    assert "a user who may do this" in caught.value.allowed
    assert "(EDIT)" in caught.value.fix
    assert said.splitlines()[0][:60] in caught.value.found
    sign_in("ben", passwords["ben"])
    assert connect(tmp_path).experiment("lexiseg-world") == experiment
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url.replace("127.0.0.1", "127.1"))  # another name of this machine
    with pytest.raises(TrackingError, match="Invalid Host header") as caught:
        connect(tmp_path)
    assert "--allowed-hosts" in caught.value.fix

    # Who is no administrator makes no users; a new password counts at once, and so does a user's end.
    command = [sys.executable, str(SOURCE / "team/users.py"), "add", "eve"]
    own = environment(SOURCE) | team.member("ben", passwords["ben"])
    done = subprocess.run(command, env=own, text=True, capture_output=True, timeout=60)
    assert done.returncode == 1
    assert "found: 403 Forbidden" in done.stderr
    assert "to do: correct the name, or MLFLOW_TRACKING_URI" in done.stderr
    renewed = team.users("password", "ben")
    assert requests.get(url + READ, auth=("ben", passwords["ben"]), timeout=30).status_code == 401
    assert requests.get(url + READ, auth=("ben", renewed), timeout=30).status_code == 200
    team.users("remove", "ben")
    assert requests.get(url + READ, auth=("ben", renewed), timeout=30).status_code == 401


def test_members_decide_about_production_and_readers_do_not(team, sign_in, tmp_path):
    team.start("mlflow")
    passwords = {name: team.users("add", name) for name in ("anna", "ben")}
    passwords["rita"] = team.users("add", "rita", "--reader")
    said = {"reason": "passed", "asked": {"by": "them", "host": "here", "through": "a test"}}
    anna = sign_in("anna", passwords["anna"])
    run_id = anna.create_run(anna.create_experiment("lexiseg-world")).info.run_id
    anna.create_registered_model("lexiseg-lseg")
    for _ in range(2):
        anna.create_model_version("lexiseg-lseg", f"runs:/{run_id}", run_id=run_id)
    with take_turn(connect(tmp_path), "lseg") as turn:
        assert turn.make("promoted", version="1", after="1", **said).carried_out == "yes"

    rita = sign_in("rita", passwords["rita"])
    store = connect(tmp_path)
    with (
        pytest.raises(TrackingError, match=r"(?i)permission denied") as caught,
        tracking_errors(store.uri),
        take_turn(store, "lseg") as turn,
    ):
        turn.make("promoted", version="2", after="2", **said)
    assert "(EDIT)" in caught.value.fix
    assert [entry.decision.number for entry in read_history(tmp_path, "lseg").entries] == [1]
    # Nobody waits for it, nor for a claim whose process has ended.
    gone = subprocess.Popen(["true"])
    gone.wait()
    owner = {"user": "rita", "host": "here", "machine": claims._machine(), "pid": gone.pid, "started": 0.0}
    rita.create_experiment("promotion-lseg-3", tags={claims.OWNER: json.dumps(owner)})
    ben, started = sign_in("ben", passwords["ben"]), time.monotonic()
    with take_turn(connect(tmp_path), "lseg") as turn:
        assert (turn.number, turn.production) == (4, "1")
        assert turn.make("promoted", version="2", after="2", **said).carried_out == "yes"
    assert time.monotonic() - started < claims.LEASE_SECONDS / 2
    assert str(ben.get_model_version_by_alias("lexiseg-lseg", "production").version) == "2"
    found = read_history(tmp_path, "lseg")
    assert [entry.decision.outcome for entry in found.entries] == ["promoted", "void", "promoted"]
    assert faults(found) == []


FLOW = """
from prefect import flow

@flow
def greet(name: str) -> str:
    return f"hello {name}"

assert greet("team") == "hello team"
"""


def test_prefect_asks_for_its_password(team, tmp_path):
    team.start("prefect")
    api = f"{team.url('prefect')}/api"
    user, password = "lexiseg", team.secrets["PREFECT_PASSWORD"]
    for who in (None, (user, "wrong"), ("other", password)):
        assert requests.post(f"{api}/flows/filter", auth=who, json={}, timeout=30).status_code == 401
        assert requests.post(f"{api}/flows/", auth=who, json={"name": "theirs"}, timeout=30).status_code == 401
    assert requests.post(f"{api}/flows/filter", auth=(user, password), json={}, timeout=30).json() == []

    def member(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        own = environment(SOURCE) | {"HOME": str(tmp_path), "PREFECT_API_URL": api, **variables}
        return subprocess.run(command, cwd=SOURCE, env=own, text=True, capture_output=True, timeout=180)

    setup = (sys.executable, "flows/workpools.py")
    stranger = member(*setup)
    assert stranger.returncode == 1
    assert "correct PREFECT_API_URL and PREFECT_API_AUTH_STRING" in stranger.stderr
    known = {"PREFECT_API_AUTH_STRING": f"{user}:{password}"}
    done = member(*setup, **known)
    assert "work pool lexiseg-cpu" in done.stdout, done.stderr
    done = member(sys.executable, "-c", FLOW, **known)
    assert done.returncode == 0, done.stderr
    (flow_run,) = requests.post(f"{api}/flow_runs/filter", auth=(user, password), json={}, timeout=30).json()
    assert flow_run["state"]["type"] == "COMPLETED"
    # It is in PostgreSQL, and not in a file of the server.
    rows = team.shell(
        "psql --username=postgres --dbname=prefect --tuples-only --command='SELECT count(*) FROM flow_run'"
    )
    assert int(rows) == 1


def sweeps_of(team: Team, monkeypatch: pytest.MonkeyPatch, *, database: str = "sweeps") -> str:
    """What a member puts into LEXISEG_STORAGE; the password is in PGPASSWORD."""
    monkeypatch.setenv("PGPASSWORD", team.secrets["SWEEPS_DB_PASSWORD"])
    (command,) = documented("export LEXISEG_STORAGE=")
    address = command.partition("=")[2].replace("5432", str(team.ports["postgres"]))
    return address.removesuffix("sweeps") + database


def test_sweeps_share_a_database_that_opens_no_other(team, monkeypatch):
    team.start("optuna-dashboard")
    storage = sweeps_of(team, monkeypatch)
    study = optuna.create_study(storage=storage, study_name="tcl-weights")
    study.optimize(lambda trial: trial.suggest_float("area", 0.0, 1.0), n_trials=2)
    shown = requests.get(f"{team.url('optuna-dashboard')}/api/studies", timeout=30).json()["study_summaries"]
    assert [found["study_name"] for found in shown] == ["tcl-weights"]

    for database in ("mlflow", "mlflow_auth", "prefect"):
        with pytest.raises(psycopg2.OperationalError, match="permission denied for database"):
            psycopg2.connect(sweeps_of(team, monkeypatch, database=database))

    # What makes the databases may run again: it keeps them, and takes new passwords from .env.
    team.secrets["SWEEPS_DB_PASSWORD"] = "another"
    team.run("databases")
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        psycopg2.connect(storage)
    assert sweeps_of(team, monkeypatch) == storage
    again = optuna.load_study(storage=storage, study_name="tcl-weights")
    assert [trial.params for trial in again.trials] == [trial.params for trial in study.trials]


def test_data_go_to_the_store_by_dvc(team, tmp_path):
    team.start("bucket")
    tree = tmp_path / "tree"
    tree.mkdir()
    run(tree, "git", "init", "--quiet")
    run(tree, "dvc", "init", "--quiet")
    (tree / "photographs").mkdir()
    (tree / "photographs/one.txt").write_text("a photograph", encoding="utf-8")
    run(tree, "dvc", "add", "--quiet", "photographs")
    for command in documented("dvc remote"):
        run(tree, "bash", "-c", command.replace("http://127.0.0.1:7070", team.url("s3")))
    key = {"AWS_ACCESS_KEY_ID": team.secrets["S3_ACCESS_KEY"], "AWS_SECRET_ACCESS_KEY": team.secrets["S3_SECRET_KEY"]}

    def dvc(*arguments: str) -> None:
        command = ["dvc", *arguments, "--remote", "team"]
        subprocess.run(command, cwd=tree, env=environment(tree) | key, check=True, capture_output=True, timeout=180)

    dvc("push")
    assert b"a photograph" in objects(team, "dvc").values()
    run(tree, "rm", "-r", "photographs", ".dvc/cache")
    dvc("pull")
    assert (tree / "photographs/one.txt").read_text(encoding="utf-8") == "a photograph"
    assert team.secrets["S3_SECRET_KEY"] not in (tree / ".dvc/config.local").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_is_lost_comes_back_from_a_backup(team, sign_in, micro_tree, monkeypatch):
    team.start("mlflow", "optuna-dashboard")
    password = team.users("add", "anna")
    synced = subprocess.run(
        ["lexiseg", "sync"],
        cwd=micro_tree,
        env=environment(micro_tree) | team.member("anna", password),
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert synced.returncode == 0, synced.stdout + synced.stderr
    storage = sweeps_of(team, monkeypatch)
    study = optuna.create_study(storage=storage, study_name="tcl-weights")
    study.optimize(lambda trial: trial.suggest_float("area", 0.0, 1.0), n_trials=3)
    trials = [(trial.params, trial.values) for trial in study.trials]

    def seen() -> Any:
        """All that a member sees of runs and models, and the objects of the store."""
        client = sign_in("anna", password)
        experiments = sorted(found.experiment_id for found in client.search_experiments())
        runs = {found.info.run_id: found.data.to_dictionary() for found in client.search_runs(experiments)}
        models = {model.name: dict(model.aliases) for model in client.search_registered_models()}
        return runs, models, objects(team, "mlflow")

    runs, models, files = before = seen()
    assert runs
    assert files
    assert all("challenger" in aliases for aliases in models.values())
    assert len(models) >= 3

    dump, drop, restore = documented("docker compose exec -T postgres")
    save, load = documented("/team/bucket.py")
    assert documented("run --rm databases") == ["docker compose run --rm databases"]

    def there(command: str) -> str:
        """A command in the container of PostgreSQL, on this machine."""
        return command.replace("docker compose exec -T postgres ", "")

    def bucket(command: str) -> str:
        """A command in the container of the buckets, on this machine."""
        words = re.search(r"bucket (python /team/bucket\.py \w+) /backup(\S*)", command)
        assert words, command
        return team.run("bucket", *words[1].split(), f"{team.root}/backup{words[2]}")

    team.start("prefect")
    team.shell("mkdir -p backup")
    team.shell(there(dump))
    assert sorted(path.name for path in (team.root / "backup").iterdir()) == [
        *("mlflow.dump", "mlflow_auth.dump", "prefect.dump", "sweeps.dump")
    ]
    bucket(save)
    bucket(save)  # the second finds all of it there

    # Everything is changed, then lost.
    client = sign_in("anna", password)
    client.set_registered_model_alias(next(iter(models)), "production", "1")
    client.log_metric(next(iter(runs)), "miou", 0.123)
    team.users("remove", "anna")
    team.stop("mlflow", "prefect", "optuna-dashboard")
    team.shell(there(drop))
    for key in files:
        store_of(team).delete_object(Bucket="mlflow", Key=key)
    assert objects(team, "mlflow") == {}

    team.run("databases")
    bucket(load)
    team.shell(there(restore))
    for command in documented("docker compose run --rm mlflow"):  # the same version: there is nothing to upgrade
        team.run("mlflow", *command.removeprefix("docker compose run --rm mlflow ").split())
    team.start("mlflow", "prefect", "optuna-dashboard")
    assert seen() == before
    again = optuna.load_study(storage=storage, study_name="tcl-weights")
    assert [(trial.params, trial.values) for trial in again.trials] == trials
    shown = requests.get(f"{team.url('optuna-dashboard')}/api/studies", timeout=30).json()["study_summaries"]
    assert [found["study_name"] for found in shown] == ["tcl-weights"]
    # And it goes on: a member writes, and what is published is not published twice.
    client.log_metric(next(iter(runs)), "miou_later", 0.5)
    wait_for(lambda: requests.get(f"{team.url('prefect')}/api/health", timeout=30).ok, what=lambda: "Prefect is away")
