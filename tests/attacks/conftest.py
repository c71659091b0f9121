"""What the attacks share: how long they go on, what they tell of it, and the hosts of a fleet."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--rounds``: by which factor what is left to chance, or to endurance, goes on for longer."""
    parser.addoption("--rounds", type=int, default=1, help="how many times as long as by default attacks go on")


@pytest.fixture(scope="session")
def rounds(pytestconfig: pytest.Config) -> int:
    """Return how many times as long as by default an attack goes on."""
    return int(pytestconfig.getoption("rounds"))


@pytest.fixture(scope="module")
def durable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Run one PostgreSQL for a module, which loses nothing that it has acknowledged."""
    from tests.helpers.postgresql import running  # noqa: PLC0415

    with running(tmp_path_factory.mktemp("postgresql") / "data", track_commit_timestamp="on") as cluster:
        yield cluster


@pytest.fixture
def tables(durable: Any) -> str:
    """Return the name of a database of this test's own, with the schema in it."""
    from tests.helpers.fleet import make_tables  # noqa: PLC0415

    return make_tables(durable)


@pytest.fixture
def office() -> Iterator[Callable[..., Any]]:
    """Return a function that seats an operator at the URL of a database."""
    from tests.helpers.fleet import Operator  # noqa: PLC0415

    with contextlib.ExitStack() as stack:

        def seat(store: str, ahead: float = 0.0) -> Any:
            operator = Operator(store, ahead)
            stack.callback(operator.close)
            return operator

        yield seat


@pytest.fixture
def host(tmp_path: Path, serve: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Return a function that starts a host: a server, behind a proxy of its own unless it is given a whole URL."""
    from tests.helpers.fleet import APPLICATION, KEY, Host  # noqa: PLC0415
    from tests.helpers.proxy import PLAIN, Proxy  # noqa: PLC0415

    (tmp_path / "app.py").write_text(APPLICATION)
    with contextlib.ExitStack() as stack:

        def start(
            cluster: Any,
            tables: str,
            *arguments: str,
            url: str = "",
            script: Any = None,
            away: bool = False,
            **env: str,
        ) -> Any:
            proxy = None
            if not url:
                proxy = Proxy(cluster.port)
                stack.callback(proxy.close)
                url = cluster.url(tables, port=proxy.port) + PLAIN
                if away:
                    proxy.refuse()
            program = [] if script else ["app:app", "--no-access-log"]
            options = {"FREEGPT_AUTH_STORE": url, "FREEGPT_AUTH_LEASE": "5", "FREEGPT_API_KEY": KEY, **env}
            return Host(serve(*program, *arguments, script=script, **options), proxy)

        yield start


@pytest.fixture
def watched() -> Iterator[Callable[..., Any]]:
    """Return a function that sends clients to hosts, who leave at the latest when the test is over."""
    from tests.helpers.fleet import Watch  # noqa: PLC0415

    with contextlib.ExitStack() as stack:

        def watch(*arguments: Any, **options: Any) -> Any:
            clients = Watch(*arguments, **options)
            stack.callback(clients.leave)
            return clients

        yield watch


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what each attack recorded: how many rounds, requests, faults, seconds."""
    for report in terminalreporter.getreports("passed"):
        figures = ", ".join(f"{name}: {value}" for name, value in report.user_properties)
        if report.when == "call" and figures:
            terminalreporter.line(f"{report.nodeid.rpartition('/')[2]}: {figures}")
