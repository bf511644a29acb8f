"""compose.yaml as its readers see it, and as it is on this machine without containers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?P<kind>:\?|:-)?(?P<rest>[^}]*)\}")
# The port that a server has in its container; no two have the same.
PORTS = {"postgres": 5432, "s3": 7070, "mlflow": 5000, "prefect": 4200, "optuna-dashboard": 8080}


@dataclass(frozen=True)
class Process:
    """A service as a process of this machine."""

    command: list[str]
    environment: dict[str, str]
    health: list[str] | None
    needs: list[str]


def services(root: Path) -> dict[str, dict[str, Any]]:
    """What compose.yaml says of each service."""
    return YAML(typ="safe").load(root / "compose.yaml")["services"]


def filled(text: str, variables: Mapping[str, str]) -> str:
    """A text with its ${VARIABLES}, by the rules of Compose for the three forms that compose.yaml has.

    Raises:
        KeyError: one that has to be there is not.
    """

    def value(match: re.Match[str]) -> str:
        given = variables.get(match["name"], "")
        if match["kind"] == ":-":
            return given or match["rest"]
        if not given:
            raise KeyError(f"{match['name']}: {match['rest']}")
        return given

    return VARIABLE.sub(value, text)


def read_env(path: Path) -> dict[str, str]:
    """The variables of an .env file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def natively(text: str, *, ports: Mapping[str, int], root: Path) -> str:
    """A word of a command or a variable's value on this machine: loopback, free ports, the working tree's folder."""
    text = re.sub(r"0\.0\.0\.0|(?<=//)s3(?=:)", "127.0.0.1", text)
    for name, port in PORTS.items():
        text = re.sub(rf"\b{port}\b", str(ports[name]), text)
    return re.sub(r"(?:^|(?<==))/team/", f"{root}/team/", text)


def process(root: Path, name: str, *, variables: Mapping[str, str], ports: Mapping[str, int]) -> Process:
    """A service of compose.yaml as a process of this machine: its very command and environment, moved here."""
    service = services(root)[name]

    def here(text: str) -> str:
        return filled(natively(str(text), ports=ports, root=root), variables)

    environment = {key: here(value) for key, value in service["environment"].items()}
    if "PGHOST" in environment:
        environment["PGHOST"] = "127.0.0.1"
    test = service.get("healthcheck", {}).get("test")
    return Process(
        command=[here(word) for word in service["command"]],
        environment=environment,
        health=[here(word) for word in test[1:]] if test else None,
        needs=list(service.get("depends_on", {})),
    )
