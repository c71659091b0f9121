"""Hosts in network namespaces of their own, whose packets to the database vanish without an error."""

from __future__ import annotations

import contextlib
import os
import subprocess
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.helpers.fleet import create_database
from tests.helpers.postgresql import PASSWORD, running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.attacks.conftest import Record
    from tests.helpers.fleet import StartFleet

VANISH = "02:00:00:00:00:99"
"""A hardware address that no interface has: packets to it vanish."""

# The server reaches the database from its namespace, and its clients by a socket that was opened outside.
LAUNCH = """
import os, socket, sys
*_, host, _, port = sys.argv
server = socket.create_server((host, int(port)), backlog=100)
server.set_inheritable(True)
command = ["ip", "netns", "exec", os.environ["NAMESPACE"], sys.executable, "-m", "uvicorn", "app:app"]
os.execvp("ip", [*command, "--no-access-log", "--fd", str(server.fileno())])
"""


class Namespace:
    """A network namespace and a virtual wire to it.

    Attributes:
        name: the name of the namespace.
        here: the address of this end of the wire.
        there: the address of the other end.
    """

    def __init__(self, number: int) -> None:
        self.name = f"freegpt-{os.getpid()}-{number}"
        self.here, self.there = f"10.231.{number}.1", f"10.231.{number}.2"
        self._near, self._far = f"fg{os.getpid() % 10**6}a{number}", f"fg{os.getpid() % 10**6}b{number}"

    def make(self) -> None:
        """Make the namespace and the wire."""
        _ip(f"netns add {self.name}")
        _ip(f"link add {self._near} type veth peer name {self._far} netns {self.name}")
        _ip(f"addr add {self.here}/24 dev {self._near}")
        _ip(f"link set {self._near} up")
        _ip(f"-n {self.name} addr add {self.there}/24 dev {self._far}")
        _ip(f"-n {self.name} link set {self._far} up")

    def lose(self, *, there: bool, here: bool) -> None:
        """Let the packets to that end vanish, those to this end, or both."""
        if there:
            _ip(f"neigh replace {self.there} lladdr {VANISH} dev {self._near} nud permanent")
        if here:
            _ip(f"-n {self.name} neigh replace {self.here} lladdr {VANISH} dev {self._far} nud permanent")

    def mend(self) -> None:
        """Deliver all packets again."""
        _ip(f"neigh flush dev {self._near} nud permanent")
        _ip(f"-n {self.name} neigh flush dev {self._far} nud permanent")

    def remove(self) -> None:
        """Remove the namespace, and with it the wire."""
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip(f"netns del {self.name}")


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True, text=True)


@pytest.fixture
def namespaces() -> Iterator[list[Namespace]]:
    """Make two network namespaces, if the system allows that."""
    both = [Namespace(1), Namespace(2)]
    with contextlib.ExitStack() as stack:
        for one in both:
            stack.callback(one.remove)
            try:
                one.make()
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', '') or error}".strip())
        yield both


@pytest.mark.slow
def test_host_without_packets_closes_after_lease(
    tmp_path: Path, namespaces: list[Namespace], fleet: StartFleet, rounds: int, record: Record
) -> None:
    """The host detects the loss, closes after its lease and recovers by itself; the other host does not notice."""
    (tmp_path / "launch.py").write_text(LAUNCH)
    listen = ",".join(["127.0.0.1", *(one.here for one in namespaces)])
    with running(tmp_path / "data", listen_addresses=listen) as cluster:
        with (cluster.folder / "pg_hba.conf").open("a") as rules:
            rules.writelines(f"host all all {one.there}/32 scram-sha-256\n" for one in namespaces)
        cluster.sql("SELECT pg_reload_conf()")
        tables = create_database(cluster)
        hosts = [
            {
                "url": f"postgresql://postgres:{PASSWORD}@{one.here}:{cluster.port}/{tables}",
                "script": tmp_path / "launch.py",
                "NAMESPACE": one.name,
            }
            for one in namespaces
        ]
        ours = fleet(*hosts, cluster=cluster, tables=tables)
        first, times = namespaces[0], []
        for there, here in ((True, True), (True, False), (False, True)) * rounds:
            times.append(ours.isolate(partial(first.lose, there=there, here=here), first.mend, (0,)))
        ours.end()
        record(back_after_at_most=max(back for _, back in times), slowest_answer=ours.watch.slowest())
