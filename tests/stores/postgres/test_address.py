"""The location of a database: its URL, the server that it leads to, and errors without the password."""

from __future__ import annotations

import contextlib
import traceback
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from freegpt_auth.exceptions import ConfigurationError
from freegpt_auth.stores.postgres.address import Address
from freegpt_auth.stores.postgres.connection import Connection
from freegpt_auth.stores.postgres.faults import reason_of
from tests.helpers.ports import free_port
from tests.helpers.postgresql import PASSWORD
from tests.stores.postgres.common import execute, name_of

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("ann:secret@db.example:5432/tokens", "ann@db.example:5432/tokens"),
        ("ann:secret@db/tokens?sslmode=require", "ann@db/tokens"),
        ("ann:p%40ss%2Fsecret@db/tokens", "ann@db/tokens"),
        ("a%40b:secret@db/tokens", "a%40b@db/tokens"),
        ("ann:secret@one:5432,two:5433/tokens", "ann@one:5432,two:5433/tokens"),
        ("ann:secret@one,two/tokens", "ann@one,two/tokens"),
        ("ann:secret@[::1]:5432/tokens", "ann@[::1]:5432/tokens"),
        ("db/tokens?user=ann@realm&password=secret", "db/tokens"),
        ("/tokens?host=/run/postgresql", "/tokens"),
    ],
)
@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_shown_url_has_no_password(scheme: str, given: str, shown: str) -> None:
    """Logs and commands name the database without any part of the password."""
    address = Address(f"{scheme}://{given}")
    assert address.shown == f"postgresql://{shown}"
    assert "secret" not in f"{address.shown}{address!r}{address}"


UNREADABLE = """
    postgresql:// mysql://ann:secret@db/tokens
    postgresql://ann:sec@ret@db/tokens postgresql://ann:sec/ret@db/tokens postgresql://ann:sec?ret@db/tokens
    postgresql://ann:sec#ret@db/tokens postgresql://ann:1234?ret@db/tokens postgresql://ann:1234#ret@db/tokens
    postgresql://ann:sec%zzret@db/tokens postgresql://ann:sec[ret@db/tokens postgresql://one:5432,ann:secret/tokens
    postgresql://ann:secret postgresql://ann:secret/tokens
    postgresql://ann:secret@db/tokens?sslmode=require&nonsense=secret
"""


@pytest.mark.parametrize("url", ["", "host=db password=secret", *UNREADABLE.split()])
def test_unreadable_url_is_not_repeated(url: str) -> None:
    """A URL that cannot be read, or has no host, is an error that shows the right form and no part of the URL."""
    with pytest.raises(ConfigurationError, match="percent-encoding, %40 for @ and %2F for /") as caught:
        Address(url)
    assert not any(part in str(caught.value) for part in ("sec", "ret@", "1234", "zz"))
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_connection_has_our_settings(database: str) -> None:
    """A session has our program name, UTC and UTF-8, and commits each statement."""
    names = ("application_name", "timezone", "client_encoding")
    with contextlib.closing(Address(database).connect()) as connection:
        values = [connection.one("SELECT current_setting(%s)", (name,))[0] for name in names]
        connection.run("CREATE TABLE public.here (number integer)")
        execute(database, "SELECT * FROM public.here")
    assert values == ["freegpt_auth", "UTC", "UTF8"]


def test_parameters_of_the_url_take_precedence(database: str) -> None:
    """An operator may override our defaults with any parameter of libpq."""
    url = f"{database}?application_name=mine&options=-c%20work_mem%3D5MB"
    with contextlib.closing(Address(url).connect()) as connection:
        values = connection.one("SELECT current_setting('application_name'), current_setting('work_mem')")
    assert values == ("mine", "5MB")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda url: url.replace(PASSWORD, "another-password"), "password authentication failed"),
        (lambda url: url.rpartition("/")[0] + "/nowhere", 'database "nowhere" does not exist'),
        (lambda url: url.rpartition(":")[0] + f":{free_port()}/x", "connection refused"),
        (lambda url: url + "?sslmode=require", "server does not support SSL"),
    ],
)
def test_connection_error_has_no_password(database: str, wrong: Callable[[str], str], reason: str) -> None:
    """The error of a failed connection is one line, and no part of its traceback holds the password."""
    with pytest.raises(psycopg.OperationalError) as caught:
        Address(wrong(database)).connect()
    assert reason.lower() in reason_of(caught.value).lower()
    assert "\n" not in reason_of(caught.value)
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert not any(password in shown for password in (PASSWORD, "another-password"))


def test_primary_is_found_among_several_hosts(database: str, cluster: Any) -> None:
    """Of several hosts the reachable primary is used; without one, connecting fails."""
    rest = f"127.0.0.1:{cluster.port}/{name_of(database)}"
    connection = Address(f"postgresql://postgres:{PASSWORD}@127.0.0.1:{free_port()},{rest}").connect()
    assert connection.one("SELECT current_database()") == (name_of(database),)
    connection.close()
    cluster.sql(f"ALTER DATABASE {name_of(database)} SET default_transaction_read_only = on")
    with pytest.raises(psycopg.OperationalError, match="read-only"):
        Address(database).connect()
    Address(f"{database}?target_session_attrs=any").connect().close()


def test_failed_setup_closes_the_connection(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is lost during its setup is closed: the server does not fill up with idle sessions."""
    closed: list[Connection] = []

    def fail(connection: Connection, *_: object) -> None:
        closed.append(connection)
        raise psycopg.OperationalError("gone")

    with monkeypatch.context() as broken:
        broken.setattr(Connection, "run", fail)
        with pytest.raises(psycopg.OperationalError, match="gone"):
            Address(database).connect()
    with pytest.raises(psycopg.OperationalError, match="closed"):
        closed[0].run("SELECT 1")
