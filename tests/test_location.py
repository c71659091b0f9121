"""What a location names, and what of it may be printed."""

from __future__ import annotations

import pytest

from freegpt_auth import ConfigurationError
from freegpt_auth.location import is_url, url_needs


@pytest.mark.parametrize("location", ["api_tokens.json", "/a/b.json", "postgresql", "C:/x", "a:b@c", ""])
def test_what_is_no_url_is_a_path(location: str) -> None:
    """A path stays a path, whatever characters are in it."""
    assert not is_url(location)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_both_names_of_postgresql_are_known(scheme: str) -> None:
    """Hosting services give URLs of either kind, and both will do."""
    assert is_url(f"{scheme}://u@h/d")
    with url_needs(f"{scheme}://u@h/d"):
        pass


@pytest.mark.parametrize("scheme", ["mysql", "sqlite", "PostgreSQL", "postgresql+psycopg", "file", ""])
def test_another_scheme_names_no_store(scheme: str) -> None:
    """What no driver belongs to is said by its scheme alone: the rest may be a password."""
    with pytest.raises(ConfigurationError, match="names no store of this version") as caught:
        url_needs(f"{scheme}://u:hunter2@h").__enter__()
    assert str(caught.value).startswith(f"{scheme}://")
    assert "hunter2" not in str(caught.value)


def test_a_driver_that_is_missing_is_said() -> None:
    """Where the driver is not installed the operator reads the command that installs it, and no traceback."""
    missing = pytest.raises(ConfigurationError, match=r"run pip install 'freegpt-auth\[postgres\]'$")
    with missing as caught, url_needs("postgresql://h/d"):
        raise ImportError("no pq wrapper available")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_another_error_is_not_taken_for_a_missing_driver() -> None:
    """What goes wrong for another reason is not hidden behind advice that would not help."""
    with pytest.raises(ZeroDivisionError), url_needs("postgresql://h/d"):
        raise ZeroDivisionError
