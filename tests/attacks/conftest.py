"""Fixtures of the attacks: their length, their figures, and fleets over a durable PostgreSQL."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.watch import USUAL, Watch, in_parallel

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from tests.helpers.fleet import Fleet, Host, StartFleet, StartHost, StartOperator
    from tests.helpers.postgresql import Cluster
    from tests.helpers.servers import Serve


Record = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--rounds``: the factor by which repeated and random attacks run longer."""
    parser.addoption("--rounds", type=int, default=1, help="factor by which repeated and random attacks run longer")


@pytest.fixture(scope="session")
def rounds(pytestconfig: pytest.Config) -> int:
    """Return the factor by which an attack runs longer than by default."""
    return int(pytestconfig.getoption("rounds"))


@pytest.fixture
def record(record_property: Callable[[str, object], None]) -> Record:
    """Return a function that records figures of an attack: ``record(cuts=8, longest=0.3)``."""

    def record_all(**figures: object) -> None:
        for name, value in figures.items():
            record_property(name.replace("_", " "), round(value, 3) if isinstance(value, float) else value)

    return record_all


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that the attacks recorded."""
    for report in terminalreporter.getreports("passed"):
        figures = ", ".join(f"{name}: {value}" for name, value in report.user_properties)
        if report.when == "call" and figures:
            terminalreporter.line(f"{report.nodeid.rpartition('/')[2]}: {figures}")


@pytest.fixture(scope="session")
def durable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run one PostgreSQL for all attacks that loses no acknowledged change."""
    from tests.helpers.postgresql import running  # noqa: PLC0415  some environments have no PostgreSQL

    with running(tmp_path_factory.mktemp("postgresql") / "data", track_commit_timestamp="on") as cluster:
        yield cluster


@pytest.fixture
def tables(durable: Cluster) -> str:
    """Return the name of a database for this test, with the schema."""
    from tests.helpers.fleet import create_database  # noqa: PLC0415

    return create_database(durable)


@pytest.fixture
def operator_at() -> Iterator[StartOperator]:
    """Return a function that starts an operator of the database at a URL."""
    from tests.helpers.fleet import Operator  # noqa: PLC0415

    with contextlib.ExitStack() as stack:
        yield lambda store, ahead=0.0: stack.enter_context(Operator(store, ahead))


@pytest.fixture
def host(tmp_path: Path, serve: Serve) -> Iterator[StartHost]:
    """Return a function that starts a server behind a proxy of its own, or at *url* without a proxy.

    With *away* the proxy refuses connections until the test accepts them; other keywords are environment variables.
    """
    from tests.helpers.fleet import APPLICATION, KEY, LEASE, Host  # noqa: PLC0415
    from tests.helpers.proxy import PLAIN, Proxy  # noqa: PLC0415

    (tmp_path / "app.py").write_text(APPLICATION)
    with contextlib.ExitStack() as stack:

        def start(
            cluster: Cluster,
            tables: str,
            *,
            arguments: tuple[str, ...] = (),
            url: str = "",
            script: Path | None = None,
            away: bool = False,
            **env: str,
        ) -> Host:
            proxy = None
            if not url:
                proxy = Proxy(cluster.port)
                stack.callback(proxy.close)
                url = cluster.url(tables, port=proxy.port) + PLAIN
                if away:
                    proxy.refuse()
            program = [] if script else ["app:app", "--no-access-log"]
            options = {"FREEGPT_AUTH_STORE": url, "FREEGPT_AUTH_LEASE": f"{LEASE:g}", "FREEGPT_API_KEY": KEY, **env}
            return Host(serve(*program, *arguments, script=script, **options), proxy)

        yield start


@pytest.fixture
def fleet(request: pytest.FixtureRequest, operator_at: StartOperator, host: StartHost) -> Iterator[StartFleet]:
    """Return a function that starts a fleet: one host for each mapping of options, in a database of its own.

    By default the database is in the cluster ``durable``, and every host is ready when the function returns.
    """
    from tests.helpers.fleet import Fleet, create_database, issue_tokens  # noqa: PLC0415

    with contextlib.ExitStack() as stack:

        def start(
            *hosts: Mapping[str, Any],
            cluster: Cluster | None = None,
            tables: str = "",
            url: str = "",
            more: int = 0,
            may_break: bool = False,
            expected: Mapping[str, int] = USUAL,
        ) -> Fleet:
            cluster = cluster or request.getfixturevalue("durable")
            tables = tables or create_database(cluster)
            operator = operator_at(url or cluster.url(tables))
            secrets, ids = issue_tokens(operator, more)
            running = in_parallel(lambda options: host(cluster, tables, **options), hosts)
            watch = Watch(running, secrets, may_break)
            stack.callback(watch.stop)
            watch.expect(expected)
            return Fleet(url or cluster.url(tables), operator, running, watch, ids)

        yield start
