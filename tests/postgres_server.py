"""A PostgreSQL server for tests, and an empty catalog on it for each home."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg

from requirements import require

URL_VARIABLE = "DINO_SEARCH_TEST_DATABASE"

# Nothing here has to survive a power cut; crashes of the server, what was committed does.
_FAST = "fsync=off max_wal_size=256MB shared_buffers=32MB".split()


class Server:
    """A server of our own in a temporary folder, on a free port of the loopback interface."""

    def __init__(self, binaries: Path, settings: Sequence[str] = _FAST, *, standby_of: Server | None = None) -> None:
        """settings: `name=value` of postgresql.conf. standby_of: the server that this one follows."""
        self._settings = settings
        self._user = _unprivileged_user()
        self._folder = Path(tempfile.mkdtemp(prefix="dino-search-postgres-"))
        self._binaries = binaries
        if self._user is not None:
            # The user that the server runs as may not even look into the environment that it was installed in.
            if not _can_be_reached(binaries):
                self._binaries = Path(shutil.copytree(binaries.parent, self._folder / "server", symlinks=True)) / "bin"
            shutil.chown(self._folder, self._user)
        self._data = self._folder / "data"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        if standby_of is None:
            self._create()
        else:
            self._run("pg_basebackup", f"--dbname={standby_of.url}", "--write-recovery-conf", "--checkpoint=fast")
        self.start()

    def _create(self) -> None:
        password_file = self._folder / "password"
        password_file.write_text("secret")
        password_file.chmod(0o644)
        self._run(
            "initdb", "--username=tester", "--encoding=UTF8", "--locale=C", "--no-sync", "--auth=scram-sha-256",
            f"--pwfile={password_file}",
        )  # fmt: skip

    @property
    def url(self) -> str:
        return f"postgresql://tester:secret@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        settings = " ".join(f"-c {setting}" for setting in self._settings)
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k '' {settings}"
        self._run("pg_ctl", "start", "--wait", "--silent", f"--log={self._folder / 'log'}", "-o", options)

    def stop(self, mode: str = "fast") -> None:
        """mode: `smart`, `fast`, or `immediate`, which is as a crash."""
        self._run("pg_ctl", "stop", "--wait", "--silent", f"--mode={mode}")

    def promote(self) -> None:
        """Makes a standby the server that takes changes."""
        self._run("pg_ctl", "promote", "--wait", "--silent")

    def delete(self) -> None:
        if (self._data / "postmaster.pid").exists():
            self.stop("immediate")
        shutil.rmtree(self._folder)

    def _run(self, program: str, *arguments: str) -> None:
        as_user: dict[str, Any] = {} if self._user is None else {"user": self._user, "extra_groups": []}
        # The server keeps what it inherits open: pipes would never end.
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(
                [self._binaries / program, "-D", self._data, *arguments],
                stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd=self._folder, check=False, **as_user,
            )  # fmt: skip
            output.seek(0)
            assert done.returncode == 0, f"{program}: {output.read()}"


class Catalogs:
    """The catalog of each home on a server, in a schema of its own; a name in place of URLs for a test's helpers."""

    _numbers = itertools.count()

    def __init__(self, server_url: str) -> None:
        self._server_url = server_url
        self._schemas: dict[Path, str] = {}

    def url_of(self, home: Path) -> str:
        """The URL of a home's catalog; an empty schema for a home that was not asked for before."""
        home = Path(os.path.abspath(home))
        if home not in self._schemas:
            schema = f"test_{os.getpid()}_{next(self._numbers)}"
            self._execute(f"CREATE SCHEMA {schema}")
            self._schemas[home] = schema
        joint = "&" if "?" in self._server_url else "?"
        return f"{self._server_url}{joint}options={quote(f'-csearch_path={self._schemas[home]}')}"

    def drop(self) -> None:
        for schema in self._schemas.values():
            self._execute(f"DROP SCHEMA {schema} CASCADE")

    def _execute(self, statement: str) -> None:
        with psycopg.connect(self._server_url, autocommit=True) as connection:
            connection.execute(statement)


def find_server_binaries() -> Path:
    """The folder with `initdb` and `pg_ctl`: Debian's newest, on the PATH, or pgserver's. Skips where there is none."""
    for folder in _candidates():
        if (folder / "initdb").exists() and (folder / "pg_ctl").exists():
            require(os.geteuid() != 0 or _unprivileged_user(), "PostgreSQL needs another user than root to run as")
            return folder
    require(False, f"no PostgreSQL: install Debian's postgresql or PyPI's pgserver, or set {URL_VARIABLE}")
    raise AssertionError("not reached")


def _candidates() -> Sequence[Path]:
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    found = shutil.which("initdb")
    # Not imported: that would warn, and start what it needs for servers of its own.
    spec = importlib.util.find_spec("pgserver")
    bundled = [Path(spec.origin).parent / "pginstall/bin"] if spec and spec.origin else []
    return [*debian, *([Path(found).resolve().parent] if found else []), *bundled]


def _unprivileged_user() -> str | None:
    """Whom the server runs as: None for this user itself, who is not root."""
    if os.geteuid() != 0:
        return None
    import pwd

    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


def _can_be_reached(folder: Path) -> bool:
    """Whether every user may enter the folder."""
    return all(parent.stat().st_mode & 0o001 for parent in (folder, *folder.parents))
