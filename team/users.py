"""MLflow's users of a team: `add` and `password` print a new password, to be given to that person alone.

python team/users.py add anna
python team/users.py add guest --reader
python team/users.py password anna
python team/users.py remove anna

The server is that of MLFLOW_TRACKING_URI, the administrator's name and password are MLFLOW_TRACKING_USERNAME and
MLFLOW_TRACKING_PASSWORD. MLflow's own client would do; it takes seconds to import, and needs what its server needs.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from typing import Any

import requests

# Where `lexiseg promote` writes what was decided. It belongs to the administrator, so that no reader, who may make what
# is new, makes it theirs.
DECISIONS = "lexiseg-promotions"
# What a member may change of others: anything in experiments and models, but not delete it or manage who may.
SHARED = ("experiment", "registered_model")


def add(name: str, *, reader: bool) -> str:
    """Make a user; one who is no reader may write into the experiments and models of everybody.

    Returns:
        The password.
    """
    _make_decisions()
    password = secrets.token_urlsafe(16)
    _ask("POST", "2.0/mlflow/users/create", username=name, password=password)
    for kind in () if reader else SHARED:
        grant = {"resource_type": kind, "resource_id": "*", "permission": "EDIT"}
        _ask("POST", "3.0/mlflow/users/permissions/grant", username=name, **grant)
    return password


def renew(name: str) -> str:
    """Give a user a new password, and return it."""
    password = secrets.token_urlsafe(16)
    _ask("PATCH", "2.0/mlflow/users/update-password", username=name, password=password)
    return password


def remove(name: str) -> None:
    """Take a user away. What they made stays."""
    _ask("DELETE", "2.0/mlflow/users/delete", username=name)


def _make_decisions() -> None:
    try:
        _ask("POST", "2.0/mlflow/experiments/create", name=DECISIONS)
    except requests.HTTPError as error:
        if "RESOURCE_ALREADY_EXISTS" not in str(error):
            raise


def _ask(method: str, path: str, **values: Any) -> None:
    server = os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    who = os.environ.get("MLFLOW_TRACKING_USERNAME", ""), os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    answer = requests.request(method, f"{server}/api/{path}", auth=who, json=values, timeout=30)
    if not answer.ok:
        raise requests.HTTPError(f"{answer.status_code} {answer.reason}: {answer.text[:300]}")


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description="MLflow's users of a team.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (("add", "make a user"), ("password", "a new password"), ("remove", "take a user away")):
        commands.add_parser(command, help=text).add_argument("name")
    commands.choices["add"].add_argument("--reader", action="store_true", help="may read, and write what is its own")
    given = parser.parse_args()
    try:
        if given.command == "add":
            print(add(given.name, reader=given.reader))
        elif given.command == "password":
            print(renew(given.name))
        else:
            remove(given.name)
    except requests.RequestException as error:
        sys.exit(
            f"found: {error}\n"
            "allowed: the address of a server with users, the name and password of its administrator, and a name "
            "that is free (add) or there (password, remove)\n"
            "to do: correct the name, or MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )


if __name__ == "__main__":
    main()
