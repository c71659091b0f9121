"""A fleet: an operator that runs commands, hosts over one database, and clients that watch every host."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import psycopg

from freegpt_auth.stores.postgres import PostgresTokenStore
from freegpt_auth.stores.postgres.follower import CERTAINTY
from freegpt_auth.tokens import generate_secret
from tests.helpers.applications import HELLO
from tests.helpers.programs import Program
from tests.helpers.watch import BOUND, CLOSED, USUAL, Watch, wait_until

if TYPE_CHECKING:
    from tests.helpers.postgresql import Cluster
    from tests.helpers.proxy import Proxy
    from tests.helpers.servers import Server

LEASE = 5.0
"""Lease of the hosts, in seconds, unless a test sets another."""

POLL = 1.0
"""Longest time in seconds until a host without notifications sees a change."""

SLACK = 1.5
"""Seconds by which a loaded machine may delay an immediate action."""

# The clock of this host is wrong by AHEAD seconds.
APPLICATION = f"""
{HELLO}
import logging, os, time
from freegpt_auth import BearerTokenMiddleware

right = time.time
time.time = lambda: right() + float(os.environ.get("AHEAD", "0"))

logging.basicConfig(level=logging.INFO, format="%(process)d %(levelname)s %(message)s")
logging.getLogger("freegpt_auth").addFilter(lambda record: not record.msg.startswith("refused"))

app = BearerTokenMiddleware(hello, usage_interval=float(os.environ.get("INTERVAL", "0.2")))
"""
KEY = "a-key-from-the-environment"
_LINE = re.compile(r"^(\d+) (WARNING|ERROR) (.*)$", re.MULTILINE)


class Done(NamedTuple):
    """One command: its exit status, its output, and its begin and end."""

    status: int
    out: str
    err: str
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        """The duration of the command."""
        return self.ended - self.began


# Not multiprocessing: its child would have to import this module, which only pytest finds.
_OPERATOR = """
import contextlib, io, json, os, sys, time
from freegpt_auth import cli

right = time.time
os.environ["FREEGPT_AUTH_STORE"], ahead = json.loads(sys.stdin.readline())
time.time = lambda: right() + ahead
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    began = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(json.loads(line))
        except SystemExit as end:
            status = end.code or 0
    print(json.dumps([status, out.getvalue(), err.getvalue(), began, time.monotonic()]), flush=True)
"""


class Operator(Program):
    """Runs commands one after the other, in one process: no interpreter starts for each.

    Args:
        store: the URL of the database.
        ahead: seconds by which the clock of the operator's host is wrong.
    """

    def __init__(self, store: str, ahead: float = 0.0) -> None:
        super().__init__(_OPERATOR)
        self._turn = threading.Lock()
        self.send([store, ahead])

    def run(self, *arguments: str) -> Done:
        """Run ``python -m freegpt_auth`` with these arguments."""
        with self._turn:
            self.send(arguments)
            return Done(*self.receive())

    def create(self, name: str, *options: str) -> tuple[str, str]:
        """Create a token, and return its id and secret."""
        done = self.run("create", name, "--json", *options)
        assert done.status == 0, done
        issued = json.loads(done.out)
        return issued["id"], issued["token"]

    def revoke(self, reference: str, attempts: int = 1) -> Done:
        """Revoke a token; repeat a command that fails, at most *attempts* times in all."""
        for _ in range(attempts):
            done = self.run("revoke", reference)
            if done.status == 0:
                return done
        raise AssertionError(done)


@dataclass
class Host:
    """A server, and the proxy between it and the database if it has one."""

    server: Server
    link: Proxy | None = None

    @property
    def proxy(self) -> Proxy:
        """The proxy between the server and the database."""
        assert self.link is not None
        return self.link

    def warnings(self) -> list[str]:
        """Return the warnings and errors that the server logged."""
        return [line for lines in self.warnings_by_process().values() for line in lines]

    def warnings_by_process(self) -> dict[str, list[str]]:
        """Return the warnings and errors that each process of the server logged."""
        found: dict[str, list[str]] = {}
        for process, level, message in _LINE.findall(self.server.log.read_text()):
            found.setdefault(process, []).append(f"{level} {message}")
        return found


@dataclass
class Fleet:
    """Hosts over one database, an operator, and clients that watch every host.

    Attributes:
        url: the URL of the database.
        operator: the operator, whose link to the database is intact.
        hosts: the hosts.
        watch: the clients.
        ids: the ids of the tokens ``valid`` and ``revoked``.
    """

    url: str
    operator: Operator
    hosts: list[Host]
    watch: Watch
    ids: dict[str, str]

    def issue_fading(self) -> str:
        """Replace the token ``fading`` by a new one, wait until every host accepts it, and return its id."""
        token_id, secret = self.operator.create("fading")
        self.watch.remove("fading")
        self.watch.add("fading", secret)
        self.watch.expect({"fading": 200})
        return token_id

    def isolate(self, cut: Callable[[], None], mend: Callable[[], None], isolated: tuple[int, ...]) -> list[float]:
        """Cut hosts off from the database for longer than the lease, and check every answer.

        Until the lease is over known tokens work, and unknown ones soon get 503 instead of 401, because they may be
        new. Then every token is answered 503. A token that is revoked meanwhile is refused by the other hosts at once,
        and by all hosts after *mend*; a token that is created meanwhile works then.

        Args:
            cut: cuts the hosts off.
            mend: ends that.
            isolated: the numbers of these hosts, first one that caches every token.

        Returns:
            the seconds until the hosts were closed, and from *mend* until they were as usual.
        """
        closed, others = {**CLOSED, "fading": 503}, set(range(len(self.hosts))) - set(isolated)
        token_id = self.issue_fading()
        cut()
        began = time.monotonic()
        done = self.operator.revoke(token_id)
        self.watch.expect(closed, isolated)
        closed_after = time.monotonic() - began
        closed_at = self.watch.first("valid", 503, isolated[0], began)
        assert closed_at > began + LEASE - POLL - SLACK
        self.watch.check({"wrong": 503}, began + CERTAINTY + SLACK, isolated)
        self.watch.check({"valid": 503, "fading": 503, "revoked": 503}, began + LEASE + 0.05, isolated)
        self.watch.check({**USUAL, "fading": 401}, done.ended, others)
        self.watch.hold(closed, POLL, isolated)
        _, new = self.operator.create("new")
        assert {self.hosts[each].server.get("/", new) for each in isolated} == {503}
        mend()
        back_after = self.watch.expect({**USUAL, "fading": 401})
        assert {each.server.get("/", new) for each in self.hosts} == {200}
        return [closed_after, back_after]

    def end(self, bound: float = BOUND) -> None:
        """Stop the clients; check all answers, and that the database counted each accepted use once."""
        self.watch.end(bound)
        self.check_usage()

    def check_usage(self) -> None:
        """Check that the database counts each accepted use of ``valid`` once."""
        wait_until(lambda: usage_of(self.url, self.ids["valid"]) == len(self.watch.accepted("valid")))


StartHost = Callable[..., Host]
StartOperator = Callable[..., Operator]
StartFleet = Callable[..., Fleet]


def create_database(cluster: Cluster) -> str:
    """Create a database with the schema, and return its name."""
    name = f"fleet_{time.monotonic_ns()}"
    cluster.sql(f"CREATE DATABASE {name}")
    PostgresTokenStore(cluster.url(name)).migrate()
    return name


def issue_tokens(operator: Operator, more: int = 0) -> tuple[dict[str, str | None], dict[str, str]]:
    """Create a token of each kind, and *more* unused ones; return the secrets that clients present, and the ids."""
    ids: dict[str, str] = {}
    secrets: dict[str, str | None] = {"key": KEY, "nothing": None, "wrong": generate_secret()}
    for name in ("valid", "revoked"):
        ids[name], secrets[name] = operator.create(name)
    for number in range(more):
        operator.create(f"more-{number}")
    operator.revoke(ids["revoked"])
    return secrets, ids


def usage_of(url: str, token_id: str) -> int:
    """Return the number of uses of a token in the database."""
    with psycopg.connect(url, autocommit=True, target_session_attrs="read-write") as connection:
        row = connection.execute("SELECT use_count FROM freegpt_auth.usage WHERE token_id = %s", [token_id]).fetchone()
        return int(row[0]) if row else 0
