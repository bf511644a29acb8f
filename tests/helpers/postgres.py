"""A PostgreSQL server of a test's own, on loopback, from the programs of Debian's package."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest


class Postgres:
    """A server in a temporary folder; `url` is SQLAlchemy's address of its database.

    Args:
        superuser: the role that owns it.
        password: what it asks everybody for; without one it lets everybody in.
    """

    def __init__(self, *, superuser: str = "lexiseg", password: str | None = None) -> None:
        self.programs = _programs()
        # PostgreSQL refuses to run as root, and pytest's folders are closed to others.
        self._user = "postgres" if os.getuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix="lexiseg-postgres-", dir="/tmp"))
        if self._user:
            owner = pwd.getpwnam(self._user)
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"postgresql://{superuser}@127.0.0.1:{self.port}/postgres"
        secret = self.folder / "password"
        secret.write_text(password or "", encoding="utf-8")
        asked = ["--auth=scram-sha-256", f"--pwfile={secret}"] if password else ["--auth=trust"]
        self._run("initdb", "--no-sync", *asked, f"--username={superuser}", "--encoding=UTF8", "--locale=C")
        settings = self.folder / "data" / "postgresql.auto.conf"
        settings.write_text(
            f"port = {self.port}\nlisten_addresses = '127.0.0.1'\n"
            f"unix_socket_directories = '{self.folder}'\nfsync = off\n"
        )
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._run("pg_ctl", "start", "--wait", "--silent", f"--log={self.folder / 'log'}")

    def stop(self) -> None:
        """Stop it at once, as a crash would; its data stay."""
        self._run("pg_ctl", "stop", "--wait", "--silent", "--mode=immediate")

    def remove(self) -> None:
        """Stop it and remove its data."""
        self._run("pg_ctl", "stop", "--silent", "--mode=immediate", check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str, check: bool = True) -> None:
        command = [str(self.programs / program), f"--pgdata={self.folder / 'data'}", *arguments]
        with (self.folder / "commands").open("ab") as log:  # a pipe would stay open in the server
            done = subprocess.run(
                command, user=self._user, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        assert not check or done.returncode == 0, (self.folder / "commands").read_text()


def _programs() -> Path:
    found = shutil.which("pg_ctl")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for place in places:
        if (place / "pg_ctl").is_file() and (place / "initdb").is_file():
            return place
    pytest.skip("no PostgreSQL here: Debian's package `postgresql` has it")
