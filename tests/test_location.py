"""A location: a path or a URL, and its parts that may be printed."""

from __future__ import annotations

import pytest

from freegpt_auth import ConfigurationError
from freegpt_auth.location import driver_required, is_url

ADDRESSES = [
    *("postgresql:/u@h/hunter2", "postgresql//u:hunter2@h", "Postgres:u:hunter2@h", "./postgresql://u:hunter2@h"),
    *("host=h password=hunter2", "host = h user=hunter2", "dbname=hunter2", "Server=h;Password=hunter2"),
    *("u:hunter2@h/d", "//u:hunter2@h/d", "mysql:/u:hunter2@h", "URL=postgresql://u:hunter2@h", "://hunter2"),
]
"""Mistyped addresses of databases."""


@pytest.mark.parametrize(
    "location", ["api_tokens.json", "/a/b.json", "postgresql", "postgres/t.json", "C:/x", "./a:b@c"]
)
def test_path_is_no_url(location: str) -> None:
    """A path stays a path, whatever characters are in it."""
    assert not is_url(location)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_both_schemes_of_postgresql(scheme: str) -> None:
    """Hosting services give URLs of either kind, and both will do."""
    assert is_url(f"{scheme}://u@h/d")


@pytest.mark.parametrize("scheme", ["mysql", "sqlite", "PostgreSQL", "postgresql+psycopg", "file"])
def test_other_scheme_is_refused(scheme: str) -> None:
    """A URL without a driver is reported by its scheme alone: the rest may be a password."""
    with pytest.raises(ConfigurationError, match=r"^the store begins with \S+://, which names no store") as caught:
        is_url(f"{scheme}://u:hunter2@h")
    assert f" {scheme}://" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("location", ADDRESSES)
def test_mistyped_address_is_refused(location: str) -> None:
    """A mistyped address is no path of a token file, which would be logged with its password."""
    with pytest.raises(ConfigurationError, match=r"^usage resembles the address of a database but") as caught:
        is_url(location, "usage")
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
