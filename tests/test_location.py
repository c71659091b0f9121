"""A location: a path or a URL, and its parts that may be printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from freegpt_auth import ConfigurationError
from freegpt_auth.location import Location, driver_required, may_hold_password

ADDRESSES = [
    *("postgresql:/u@h/hunter2", "postgresql//u:hunter2@h", "Postgres:u:hunter2@h", "./postgresql://u:hunter2@h"),
    *("host=h password=hunter2", "host = h user=hunter2", "dbname=hunter2", "Server=h;Password=hunter2"),
    *("u:hunter2@h/d", "//u:hunter2@h/d", "mysql:/u:hunter2@h", "URL=postgresql://u:hunter2@h", "://hunter2"),
]
"""Mistyped addresses of databases."""


@pytest.mark.parametrize("text", ["api_tokens.json", "/a/b.json", "postgresql", "postgres/t.json", "C:/x", "./a:b@c"])
def test_path_is_no_url(text: str) -> None:
    """A path with any characters stays a path, and names one file from every directory."""
    location = Location.of(text)
    assert location == Location(text)
    assert location.can_be_open
    assert location.absolute() == Location(str(Path(text).absolute()))
    assert location.is_same_file(location.absolute())


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_both_schemes_of_postgresql(scheme: str) -> None:
    """Hosting services give URLs of either kind; a server over one is never open, and its password is never shown."""
    location = Location.of(f"{scheme}://u:hunter2@h/d?password=hunter2")
    assert location is Location.of(location) is location.absolute() is location.default_usage()
    assert not location.can_be_open
    assert not location.is_same_file(location)
    assert may_hold_password(f"{scheme}://h/d"), "a URL is not repeated at all"
    assert repr(location) == f"Location('{scheme}://…@h/d?password=…')"


@pytest.mark.parametrize("scheme", ["mysql", "sqlite", "PostgreSQL", "postgresql+psycopg", "file"])
def test_other_scheme_is_refused(scheme: str) -> None:
    """A URL without a driver is reported by its scheme alone: the rest may be a password."""
    with pytest.raises(ConfigurationError, match=r"^the store begins with \S+://, which names no store") as caught:
        Location.of(f"{scheme}://u:hunter2@h")
    assert f" {scheme}://" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("text", ADDRESSES)
def test_mistyped_address_is_refused(text: str) -> None:
    """A mistyped address is no path of a token file, which would be logged with its password."""
    with pytest.raises(ConfigurationError, match=r"^usage resembles the address of a database but") as caught:
        Location.of(text, "usage")
    assert "hunter2" not in str(caught.value)


def test_missing_driver_is_explained() -> None:
    """Where the driver is not installed the operator reads the command that installs it, and no traceback."""
    missing = pytest.raises(ConfigurationError, match=r"run pip install 'freegpt-auth\[postgres\]'$")
    with missing as caught, driver_required():
        raise ImportError("no pq wrapper available")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_other_error_of_a_driver_is_passed_on() -> None:
    """An error for another reason is not hidden behind advice that would not help."""
    with pytest.raises(ZeroDivisionError), driver_required():
        raise ZeroDivisionError
