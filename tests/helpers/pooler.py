"""Poolers in transaction mode: each transaction of a client gets any free connection.

One is minimal and always available. The other is PgBouncer, where it is installed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg

from tests.helpers.ports import free_port
from tests.helpers.postgresql import NOBODY, PASSWORD

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.helpers.postgresql import Cluster

_REPORTED = (
    *("server_version", "server_encoding", "client_encoding", "DateStyle", "TimeZone", "integer_datetimes"),
    *("standard_conforming_strings", "in_hot_standby", "default_transaction_read_only"),
)

PGBOUNCER = shutil.which("pgbouncer")


SETTINGS = """
[databases]
* = host=127.0.0.1 port={server}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {folder}/users.txt
pool_mode = transaction
"""


@contextlib.contextmanager
def pgbouncer(cluster: Cluster) -> Iterator[int]:
    """Run PgBouncer in front of a cluster, and yield its port."""
    assert PGBOUNCER is not None
    port, user = free_port(), NOBODY if os.geteuid() == 0 else None  # PgBouncer refuses to run as root
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        (folder / "users.txt").write_text(f'"postgres" "{PASSWORD}"\n')
        (folder / "pgbouncer.ini").write_text(SETTINGS.format(server=cluster.port, port=port, folder=folder))
        for path in (folder, *folder.iterdir()):
            os.chown(path, os.geteuid() if user is None else user, -1)
        log = stack.enter_context((folder / "pgbouncer.log").open("wb"))
        process = subprocess.Popen([PGBOUNCER, str(folder / "pgbouncer.ini")], stdout=log, stderr=log, user=user)
        stack.callback(process.wait, 20)
        stack.callback(process.kill)
        cluster.wait(cluster.url("postgres", port=port))
        yield port


class Pooler:
    """Forwards each transaction of a client over the connection that became free last.

    Args:
        url: the URL of the database.
        size: the number of connections to the database.

    Attributes:
        port: the loopback port that it listens at.
    """

    def __init__(self, url: str, size: int) -> None:
        self._connections = [psycopg.connect(url, autocommit=True) for _ in range(size)]
        self._servers = [socket.socket(fileno=os.dup(one.fileno())) for one in self._connections]
        self._free = deque(self._servers)
        for one in self._servers:
            one.settimeout(None)
        self._room = threading.Semaphore(size)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Close the listener and all connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for server in self._servers:
            server.close()
        for connection in self._connections:
            connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            _exactly(client, struct.unpack("!I", _exactly(client, 4))[0] - 4)
            client.sendall(self._welcome())
            while True:
                self._transaction(client)

    def _welcome(self) -> bytes:
        welcome = b"R" + struct.pack("!II", 8, 0)
        for name in _REPORTED:
            value = self._connections[0].info.parameter_status(name) or ""
            welcome += _message(b"S", f"{name}\0{value}\0".encode())
        return welcome + _message(b"K", bytes(8)) + _message(b"Z", b"I")

    def _transaction(self, client: socket.socket) -> None:
        first = _read(client)
        if first[:1] == b"X":
            raise ConnectionResetError
        with self._room:
            server = self._free.pop()
            try:
                server.sendall(first)
                state = self._answer(client, server) if first[:1] in b"QS" else b"T"
                while state != b"I":
                    more = _read(client)
                    server.sendall(more)
                    state = self._answer(client, server) if more[:1] in b"QS" else b"T"
            finally:
                self._free.append(server)

    def _answer(self, client: socket.socket, server: socket.socket) -> bytes:
        """Forward the server's messages, including those that arrived earlier, until it is ready."""
        while True:
            message = _read(server)
            client.sendall(message)
            if message[:1] == b"Z":
                return message[5:]


def _read(source: socket.socket) -> bytes:
    head = _exactly(source, 5)
    return head + _exactly(source, struct.unpack("!I", head[1:])[0] - 4)


def _exactly(source: socket.socket, size: int) -> bytes:
    data = source.recv(size, socket.MSG_WAITALL)
    if len(data) < size:
        raise ConnectionResetError
    return data


def _message(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("!I", len(content) + 4) + content


@contextlib.contextmanager
def smallest(cluster: Cluster, tables: str, user: str = "postgres") -> Iterator[int]:
    """Run the minimal pooler in front of a database, and yield its port."""
    with contextlib.closing(Pooler(cluster.url(tables, user), 4)) as pooler:
        yield pooler.port
