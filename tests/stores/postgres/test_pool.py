"""Connections to a database: where they lead, what is shown of that, how long anything on them may take, who gets which."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from freegpt_auth.exceptions import ConfigurationError, StoreUnavailableError
from freegpt_auth.stores.postgres import pool as pools
from freegpt_auth.stores.postgres.address import Address
from freegpt_auth.stores.postgres.connection import Connection
from freegpt_auth.stores.postgres.faults import reason_of
from freegpt_auth.stores.postgres.pool import Pool
from tests.helpers.postgresql import PASSWORD, Cluster, free_port, running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 30.0
"""Seconds after which a test fails that waits for what should have a limit of its own."""


@pytest.fixture
def address(database: str) -> Address:
    """Return where an empty database is."""
    return Address(database)


@pytest.fixture
def connection(address: Address) -> Iterator[Connection]:
    """Return a connection to an empty database."""
    connection = address.connect()
    yield connection
    connection.close()


@pytest.fixture
def pool(address: Address) -> Iterator[Pool]:
    """Return two connections to an empty database."""
    pool = Pool(address, 2)
    yield pool
    pool.renew()


@pytest.fixture(scope="module")
def freezing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run a server that may be stopped in the middle of anything."""
    with running(tmp_path_factory.mktemp("frozen") / "data", fsync="off") as cluster:
        yield cluster


def _pid(connection: Connection) -> int:
    """Return which connection this is, by the number of its process on the server."""
    return int(connection.one("SELECT pg_backend_pid()")[0])


# --- the URL


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://ann:secret@db.example:5432/tokens", "postgresql://ann@db.example:5432/tokens"),
        ("postgres://ann:secret@db/tokens?sslmode=require", "postgresql://ann@db/tokens"),
        ("postgresql://ann:p%40ss%2Fsecret@db/tokens", "postgresql://ann@db/tokens"),
        ("postgresql://a%40b:secret@db/tokens", "postgresql://a%40b@db/tokens"),
        ("postgresql://ann:secret@one:5432,two:5433/tokens", "postgresql://ann@one:5432,two:5433/tokens"),
        ("postgresql://ann:secret@one,two/tokens", "postgresql://ann@one,two/tokens"),
        ("postgresql://ann:secret@[::1]:5432/tokens", "postgresql://ann@[::1]:5432/tokens"),
        ("postgresql://db/tokens?user=ann@realm&password=secret", "postgresql://db/tokens"),
        ("postgresql:///tokens?host=/run/postgresql", "postgresql:///tokens"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    """What the log and the commands name is where the database is, and no part of the password."""
    address = Address(url)
    assert address.shown == shown
    assert "secret" not in f"{address.shown}{address!r}{address}"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://",
        "postgresql://ann:sec@ret@db/tokens",
        "postgresql://ann:sec/ret@db/tokens",
        "postgresql://ann:sec?ret@db/tokens",
        "postgresql://ann:sec#ret@db/tokens",
        "postgresql://ann:1234?ret@db/tokens",
        "postgresql://ann:1234#ret@db/tokens",
        "postgresql://ann:sec%zzret@db/tokens",
        "postgresql://ann:sec[ret@db/tokens",
        "postgresql://ann:secret",
        "postgresql://ann:secret/tokens",
        "postgresql://ann:secret@db/tokens?sslmode=require&nonsense=secret",
        "postgresql://one:5432,ann:secret/tokens",
        "host=db password=secret",
        "mysql://ann:secret@db/tokens",
        "",
    ],
)
def test_a_url_that_cannot_be_read_is_not_repeated(url: str) -> None:
    """A password that is not percent-encoded, or a URL without its host, is an error that says how to write it."""
    with pytest.raises(ConfigurationError, match="percent-encoding, %40 for @ and %2F for /") as caught:
        Address(url)
    assert not any(part in str(caught.value) for part in ("sec", "ret@", "1234", "zz"))
    assert caught.value.__cause__ is caught.value.__context__ is None


# --- connecting


def test_a_connection_is_what_its_user_needs(address: Address, connection: Connection) -> None:
    """It is known by its name, every instant is in UTC, all text is text, and each statement is in force at once."""
    settings = "current_setting('application_name'), current_setting('timezone'), current_setting('client_encoding')"
    assert connection.one(f"SELECT {settings}, now() AT TIME ZONE 'UTC' = now()::timestamp") == (
        *("freegpt_auth", "UTC", "UTF8"),
        True,
    )
    connection.run("CREATE TABLE public.here (number integer)")
    other = address.connect()
    assert other.run("SELECT * FROM public.here") == []
    other.close()


def test_what_the_url_says_comes_first(database: str) -> None:
    """An operator may give any parameter that libpq knows, in the place of this library's own."""
    address = Address(f"{database}?application_name=mine&options=-c%20work_mem%3D5MB")
    connection = address.connect()
    assert connection.one("SELECT current_setting('application_name'), current_setting('work_mem')") == ("mine", "5MB")
    connection.close()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda url: url.replace(PASSWORD, "another-password"), "password authentication failed"),
        (lambda url: url.rpartition("/")[0] + "/nowhere", 'database "nowhere" does not exist'),
        (lambda url: url.rpartition(":")[0] + f":{free_port()}/x", "connection refused"),
        (lambda url: url + "?sslmode=require", "server does not support SSL"),
    ],
)
def test_an_error_is_one_line_without_the_password(
    database: str, wrong: Callable[[str], str], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is wrong with a connection, what is said of it can be printed, with every error that led to it."""
    with pytest.raises(psycopg.OperationalError) as caught:
        Address(wrong(database)).connect()
    assert reason.lower() in reason_of(caught.value).lower()
    assert "\n" not in reason_of(caught.value)
    told = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + caplog.text
    assert not any(password in told for password in (PASSWORD, "another-password"))


def test_no_connection_shows_its_password(connection: Connection, pool: Pool) -> None:
    """What a debugger or a careless log line shows of these objects is no secret."""
    pool.run(_pid)
    assert PASSWORD not in repr([connection, connection._driver, pool, pool._idle, pool._idle[0], vars(connection), vars(pool)])


def test_the_server_that_can_be_written_to_is_found(database: str, cluster: Any) -> None:
    """Of several hosts the one is taken that is there and is no standby; if none is, that is an error."""
    name = database.rpartition("/")[2]
    rest = f"127.0.0.1:{cluster.port}/{name}"
    connection = Address(f"postgresql://postgres:{PASSWORD}@127.0.0.1:{free_port()},{rest}").connect()
    assert connection.one("SELECT current_database()") == (name,)
    connection.close()
    cluster.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    with pytest.raises(psycopg.OperationalError, match="read-only"):
        Address(database).connect()
    Address(f"{database}?target_session_attrs=any").connect().close()


def test_a_connection_that_cannot_be_set_up_is_not_left_open(
    address: Address, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that loses a connection as soon as it is there does not fill up with those that nobody has."""

    def fail(*_: object) -> None:
        raise psycopg.OperationalError("gone")

    closed: list[Connection] = []
    close = Connection.close
    monkeypatch.setattr(Connection, "run", fail)
    monkeypatch.setattr(Connection, "close", lambda connection: (closed.append(connection), close(connection)))
    with pytest.raises(psycopg.OperationalError, match="gone"):
        address.connect()
    assert [connection._driver.closed for connection in closed] == [True]
    assert cluster.sql("SELECT 1") == [(1,)]


# --- using one


def test_a_transaction_is_done_whole_or_not_at_all(connection: Connection) -> None:
    """What fails in the middle leaves nothing, and whatever the database's defaults are, what is read is up to date."""
    connection.run("CREATE TABLE public.here (number integer)")
    connection.run("SET default_transaction_isolation TO 'serializable'")
    with contextlib.suppress(psycopg.errors.DivisionByZero), connection.transaction():
        connection.run("INSERT INTO public.here VALUES (1)")
        connection.run("SELECT 1 / 0")
    with connection.transaction():
        connection.run("INSERT INTO public.here VALUES (%s)", (2,))
        assert connection.one("SELECT current_setting('transaction_isolation'), current_setting('search_path')") == (
            "read committed",
            "pg_catalog",
        )
    assert connection.run("SELECT number FROM public.here") == [(2,)]


def test_limits_of_a_long_transaction_end_with_it(address: Address) -> None:
    """What follows ``allow_long_statements`` over the same connection, as a command's wait for the servers, has the usual limits."""
    with contextlib.closing(address.connect(1.0)) as connection:
        with connection.transaction():
            connection.allow_long_statements()
            connection.run("SELECT pg_sleep(1.5)")
        assert connection.one("SELECT current_setting('statement_timeout')") == ("900ms",)
        connection.run("SET statement_timeout TO 0")
        with pytest.raises(psycopg.OperationalError, match="no answer within 1 s"):
            connection.run("SELECT pg_sleep(30)")


def test_rows_are_read_and_sent_in_batches(connection: Connection) -> None:
    """A large table goes through a process a few rows at a time, in both directions."""
    connection.script("CREATE TABLE public.here (number integer, name text); INSERT INTO public.here VALUES (0, NULL)")
    connection.copy("COPY public.here (number, name) FROM STDIN", ((number, f"tab\t{number}\n") for number in range(1, 10)))
    with connection.transaction():
        batches = list(connection.batches("SELECT number, name FROM public.here ORDER BY number", 4))
    assert [len(rows) for rows in batches] == [4, 4, 2]
    assert [row for rows in batches for row in rows] == [(0, None), *((n, f"tab\t{n}\n") for n in range(1, 10))]


def test_notifications_are_heard_at_once_and_together(connection: Connection, address: Address) -> None:
    """Whoever waits is told at once, and of many that came meanwhile in one go; none is told twice."""
    connection.run('LISTEN "here"')
    other = address.connect()
    with ThreadPoolExecutor(1) as threads:
        began = time.monotonic()
        heard = threads.submit(connection.notifications, PATIENCE)
        other.run("SELECT pg_notify('here', '')")
        assert heard.result() == ["here"]
        assert time.monotonic() - began < PATIENCE / 2
    other.run("SELECT pg_notify('here', number::text) FROM generate_series(1, 20) number")
    connection.run("SELECT 1")
    assert connection.notifications(PATIENCE) == ["here"] * 20
    assert connection.notifications(0.01) == []
    other.close()


def test_closing_never_fails(connection: Connection, cluster: Any) -> None:
    """A connection that the server has ended, or that was closed before, is closed without an error."""
    cluster.sql(f"SELECT pg_terminate_backend({_pid(connection)})")
    with pytest.raises(psycopg.OperationalError):
        connection.run("SELECT 1")
    connection.close()
    connection.close()


def test_closing_is_silent_where_the_driver_fails() -> None:
    """Whatever the driver says to it, a connection that is given up is given up."""

    class Failing:
        """A connection that cannot be closed."""

        def close(self) -> None:
            """Fail."""
            raise psycopg.OperationalError

    Connection(Failing()).close()  # type: ignore[arg-type]


def _copy(connection: Connection) -> None:
    connection.copy("COPY public.here (number) FROM STDIN", ((number,) for number in range(9)))


USES: dict[str, Callable[[Connection], object]] = {
    "run": lambda connection: connection.run("SELECT 1"),
    "one": lambda connection: connection.one("SELECT 1"),
    "script": lambda connection: connection.script("SELECT 1; SELECT 2"),
    "batches": lambda connection: list(connection.batches("SELECT generate_series(1, 9)", 2)),
    "transaction": lambda connection: connection.transaction().__enter__(),
    "copy": _copy,
}


@pytest.mark.parametrize("use", USES)
def test_every_wait_for_a_server_that_hangs_has_its_limit(freezing: Cluster, use: str) -> None:
    """A server, or a network, that says nothing any more holds nobody up for longer than the limit."""
    freezing.sql("CREATE TABLE IF NOT EXISTS here (number integer)")
    connection = Address(freezing.url("postgres")).connect(0.2)
    connection.run("BEGIN")
    with ThreadPoolExecutor(1) as threads:
        freezing.freeze()
        try:
            used = threads.submit(USES[use], connection)
            with pytest.raises(psycopg.OperationalError, match="timeout"):
                used.result(PATIENCE)
            threads.submit(connection.close).result(PATIENCE)
        finally:
            freezing.freeze(signal.SIGCONT)


def test_connecting_and_listening_have_their_limits(freezing: Cluster) -> None:
    """A server that takes a connection and says nothing is given up, and who listens to it goes on after his time."""
    address = Address(freezing.url("postgres"))
    connection = address.connect()
    with ThreadPoolExecutor(1) as threads:
        freezing.freeze()
        try:
            assert threads.submit(connection.notifications, 0.1).result(PATIENCE) == []
            with pytest.raises(psycopg.OperationalError, match="timeout"):
                threads.submit(address.connect).result(PATIENCE)
        finally:
            freezing.freeze(signal.SIGCONT)
    connection.close()


# --- sharing a few


def test_connections_are_used_again(pool: Pool) -> None:
    """One after the other is answered over the same connection; two at once over two."""
    first = pool.run(_pid)
    assert pool.run(_pid) == first
    assert pool.run(lambda connection: (_pid(connection), pool.run(_pid)))[0] == first
    assert len(pool._idle) == 2


def test_one_that_was_interrupted_is_not_lent_again(pool: Pool) -> None:
    """Nobody reads the answer to what another asked and did not wait for."""
    seen: list[int] = []

    def interrupted(connection: Connection) -> None:
        seen.append(_pid(connection))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.run(interrupted)
    with pytest.raises(psycopg.errors.DivisionByZero):
        pool.run(lambda connection: (seen.append(_pid(connection)), connection.run("SELECT 1 / 0")))
    assert pool.run(_pid) not in seen
    assert len(set(seen)) == 2


def test_an_idle_connection_that_died_costs_nobody_an_answer(pool: Pool, cluster: Any) -> None:
    """After a restart, or a time without questions, the first who asks is answered over a new connection."""
    dead = pool.run(lambda connection: (_pid(connection), pool.run(_pid)))
    for pid in dead:
        cluster.sql(f"SELECT pg_terminate_backend({pid})")
    assert pool.run(_pid) not in dead


def test_a_question_is_asked_twice_at_most(pool: Pool) -> None:
    """What fails over a new connection too is an error; what fails for another reason is not asked again."""
    asked: list[int] = []

    def fail(connection: Connection) -> None:
        asked.append(_pid(connection))
        raise psycopg.OperationalError("gone")

    pool.run(_pid)
    with pytest.raises(psycopg.OperationalError, match="gone"):
        pool.run(fail)
    assert len(set(asked)) == len(asked) == 2
    pool.run(_pid)
    with pytest.raises(psycopg.errors.DivisionByZero):
        pool.run(lambda connection: (asked.append(_pid(connection)), connection.run("SELECT 1 / 0")))
    assert len(asked) == 3


def test_who_comes_when_all_are_in_use_waits_no_longer_than_the_limit(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More questions than connections wait in turn; after the limit they are told that it is slow, and why."""
    hold, held = threading.Event(), threading.Barrier(3)

    def wait(connection: Connection) -> int:
        held.wait(PATIENCE)
        hold.wait(PATIENCE)
        return _pid(connection)

    with ThreadPoolExecutor(3) as threads:
        busy = [threads.submit(pool.run, wait) for _ in range(2)]
        held.wait(PATIENCE)
        with monkeypatch.context() as short:
            short.setattr(pools, "TIME_LIMIT", 0.05)
            with pytest.raises(StoreUnavailableError, match="is slow: all connections") as caught:
                pool.run(_pid)
        assert PASSWORD not in str(caught.value)
        late = threads.submit(pool.run, _pid)
        hold.set()
        assert late.result(PATIENCE) in {each.result(PATIENCE) for each in busy}


def test_a_failure_leaves_room_for_the_next(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often connecting or asking fails, as many may ask afterwards as before."""
    pool = Pool(address, 1)
    monkeypatch.setattr(pools, "TIME_LIMIT", 0.05)
    with monkeypatch.context() as broken:
        broken.setattr(address, "connect", lambda: (_ for _ in ()).throw(psycopg.OperationalError("gone")))
        for _ in range(3):
            with pytest.raises(psycopg.OperationalError):
                pool.run(_pid)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            pool.run(lambda _: 1 / 0)
    assert pool.run(_pid)
    pool.renew()


def test_after_renew_nobody_asks_over_an_old_connection(pool: Pool) -> None:
    """Once the database may be another server, connections that were idle, in use or on their way are given up."""
    idle = pool.run(_pid)
    pool.renew()
    assert len(pool._idle) == 0
    in_use = pool.run(lambda connection: (_pid(connection), pool.renew())[0])
    taken: list[int] = []
    take = pool._take

    def take_just_before() -> Connection | None:
        connection = take()
        pool._take = take  # type: ignore[method-assign]
        pool.renew()
        return connection

    fresh = pool.run(_pid)
    assert len({idle, in_use, fresh}) == 3
    pool._take = take_just_before  # type: ignore[method-assign]
    taken.append(pool.run(_pid))
    assert taken == [fresh]
    assert pool.run(_pid) != fresh


def test_threads_that_ask_and_renew_at_once_harm_nobody(pool: Pool) -> None:
    """Whoever asks is answered, while others ask and the connections are renewed."""

    def ask(number: int) -> int:
        if number % 5 == 0:
            pool.renew()
        return int(pool.run(lambda connection: connection.one("SELECT %s::int", (number,)))[0])

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(ask, range(200))) == list(range(200))
    assert len(pool._idle) <= 2
