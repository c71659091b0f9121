"""Hosts in network namespaces of their own, whose packets to the database vanish on the way: nobody is told of anything."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.fleet import CLOSED, USUAL, Host, make_tables, people, together, until, usage_of
from tests.helpers.postgresql import PASSWORD, running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.helpers.fleet import Record

pytestmark = [pytest.mark.database, pytest.mark.slow]

LEASE = 5.0
POLL = 1.0
NOBODYS = "02:00:00:00:00:99"
"""The hardware address to which packets are sent that are to vanish."""

# The server talks to the database from its namespace, and to its clients over a socket that was opened outside.
LAUNCH = """
import os, socket, sys
*_, host, _, port = sys.argv
server = socket.create_server((host, int(port)), backlog=100)
server.set_inheritable(True)
command = ["ip", "netns", "exec", os.environ["NAMESPACE"], sys.executable, "-m", "uvicorn", "app:app", "--no-access-log"]
os.execvp("ip", [*command, "--fd", str(server.fileno())])
"""


class Namespace:
    """One network namespace, and the wire from it to this one.

    Args:
        number: tells it from others.

    Attributes:
        name: its name.
        here: the address of this end of the wire.
        there: the address of the other end.
    """

    def __init__(self, number: int) -> None:
        self.name = f"freegpt-{os.getpid()}-{number}"
        self.here, self.there = f"10.231.{number}.1", f"10.231.{number}.2"
        self._near, self._far = f"fg{os.getpid() % 10**6}a{number}", f"fg{os.getpid() % 10**6}b{number}"

    def make(self) -> None:
        """Make both."""
        _ip("netns", "add", self.name)
        _ip("link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", self.name)
        _ip("addr", "add", f"{self.here}/24", "dev", self._near)
        _ip("link", "set", self._near, "up")
        _ip("-n", self.name, "addr", "add", f"{self.there}/24", "dev", self._far)
        _ip("-n", self.name, "link", "set", self._far, "up")

    def lose(self, *, there: bool, here: bool) -> None:
        """Let the packets that go there vanish, and those that come here."""
        if there:
            _ip("neigh", "replace", self.there, "lladdr", NOBODYS, "dev", self._near, "nud", "permanent")
        if here:
            _ip("-n", self.name, "neigh", "replace", self.here, "lladdr", NOBODYS, "dev", self._far, "nud", "permanent")

    def mend(self) -> None:
        """Let all packets arrive again."""
        _ip("neigh", "flush", "dev", self._near, "nud", "permanent")
        _ip("-n", self.name, "neigh", "flush", "dev", self._far, "nud", "permanent")

    def remove(self) -> None:
        """Remove both."""
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", self._near)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("netns", "del", self.name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def namespaces() -> Iterator[list[Namespace]]:
    """Make two network namespaces, if that is allowed here."""
    both = [Namespace(1), Namespace(2)]
    with contextlib.ExitStack() as stack:
        for one in both:
            stack.callback(one.remove)
            try:
                one.make()
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', '') or error}".strip())
        yield both


@pytest.fixture
def wired(tmp_path: Path, namespaces: list[Namespace], host: Any) -> Iterator[tuple[Any, str, list[Host]]]:
    """Run a database, and a server in each namespace; yield the first, the name of its tables, and the hosts."""
    (tmp_path / "launch.py").write_text(LAUNCH)
    listen = ",".join(["127.0.0.1", *(one.here for one in namespaces)])
    with running(tmp_path / "data", listen_addresses=listen) as cluster:
        with (cluster.folder / "pg_hba.conf").open("a") as rules:
            rules.writelines(f"host all all {one.there}/32 scram-sha-256\n" for one in namespaces)
        cluster.sql("SELECT pg_reload_conf()")
        tables, script = make_tables(cluster), tmp_path / "launch.py"

        def start(one: Namespace) -> Host:
            url = f"postgresql://postgres:{PASSWORD}@{one.here}:{cluster.port}/{tables}"
            started: Host = host(cluster, tables, url=url, script=script, NAMESPACE=one.name)
            return started

        yield cluster, tables, together(start, namespaces)


def test_a_host_whose_packets_vanish_accepts_nothing_beyond_its_lease(
    wired: tuple[Any, str, list[Host]],
    namespaces: list[Namespace],
    office: Any,
    watched: Any,
    rounds: int,
    record_property: Record,
) -> None:
    """It finds out by itself, is closed after its lease, and is as new when packets arrive again; the other one goes on."""
    cluster, tables, hosts = wired
    operator = office(cluster.url(tables))
    secrets, ids = people(operator)
    watch, took, back = watched(hosts, secrets), [], []
    for there, here in ((True, True), (True, False), (False, True)) * rounds:
        token_id, fading = operator.create("fading")
        watch.forget("fading")
        watch.add("fading", fading)
        watch.expect({**USUAL, "fading": 200})
        namespaces[0].lose(there=there, here=here)
        cut = time.monotonic()
        done = operator.revoke(token_id)
        took.append(done.ended - done.began)
        watch.expect({**CLOSED, "fading": 503}, [0])
        watch.see({"valid": 503, "fading": 503, "revoked": 503}, cut + LEASE + 0.05, [0])
        watch.see({**USUAL, "fading": 401}, done.ended, [1])
        watch.hold({**CLOSED, "fading": 503}, POLL, [0])
        namespaces[0].mend()
        back.append(watch.expect({**USUAL, "fading": 401}))
    watch.end()
    until(lambda: usage_of(cluster.url(tables), ids["valid"]) == watch.accepted("valid"))
    record_property("revoke took at most", round(max(took), 2))
    record_property("back after at most", round(max(back), 2))
    record_property("slowest answer", round(watch.slowest(), 2))
