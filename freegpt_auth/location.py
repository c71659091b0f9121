"""A location of tokens or usage: the path of a file, or the URL of a database. Pure."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

from .exceptions import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEMES = ("postgresql", "postgres")
"""Schemes of a database's URL."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")

_ADDRESS = re.compile(
    r"""
    ^[^/]*postgres\w*(?: : | // )                                  # a URL that lacks a slash or the colon
    | ^/{0,2}[^/:]+:.*@                                            # user:password@host
    | ^(?:host|hostaddr|port|dbname|user|passfile|service|sslmode)\s*=   # libpq's keywords and values
    | password\s*=
    """,
    re.VERBOSE | re.IGNORECASE,
)


def is_url(location: str, subject: str = "the store") -> bool:
    """Return whether *location* is the URL of a database; otherwise it is a path.

    Args:
        location: without white space at its ends.
        subject: its name in messages.

    Raises:
        ConfigurationError: it resembles the address of a database but is no ``postgresql://`` URL. As a path it would be
            logged with its password. The message repeats nothing but the scheme.
    """
    scheme, is_complete, _ = location.partition("://")
    if is_complete and scheme in SCHEMES:
        return True
    if is_complete and _SCHEME.fullmatch(scheme):
        raise ConfigurationError(
            f"{subject} begins with {scheme}://, which names no store of this version; "
            "give the path of a token file or a postgresql:// URL"
        )
    if is_complete or _ADDRESS.search(location):
        raise ConfigurationError(
            f"{subject} resembles the address of a database but is no URL of one; "
            "write a postgresql:// URL, or ./ before a path"
        )
    return False


def may_hold_password(location: str) -> bool:
    """Return whether *location* must not be repeated in a message."""
    return not {"@", "="}.isdisjoint(location) or "://" in location


@contextlib.contextmanager
def driver_required() -> Iterator[None]:
    """Explain a missing driver where it is imported.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        yield
    except ImportError:
        raise ConfigurationError(
            "a store in PostgreSQL needs a driver: run pip install 'freegpt-auth[postgres]'"
        ) from None
