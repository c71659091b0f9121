"""A location of tokens or usage: a file path or a database URL. Impure: ``absolute`` and ``is_same_file``."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
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


@dataclass(frozen=True, repr=False)
class Location:
    """The path of a file or the URL of a database, made once where its text is read. It shows no password.

    Attributes:
        text: the path or the URL, with its password.
        is_database: the text is a URL.
    """

    text: str
    is_database: bool = False

    @classmethod
    def of(cls, text: str | Location, subject: str = "the store") -> Location:
        """Return the location that *text* gives.

        Args:
            text: without white space at its ends.
            subject: its name in messages.

        Raises:
            ConfigurationError: it resembles the address of a database but is no ``postgresql://`` URL. As a path it
                would be logged with its password. The message repeats nothing but the scheme.
        """
        return text if isinstance(text, Location) else cls(text, _is_url(text, subject))

    def __repr__(self) -> str:
        return f"Location({masked(self.text)!r})"

    @property
    def can_be_open(self) -> bool:
        """Return whether a server over this store may start in open mode."""
        return not self.is_database

    def absolute(self) -> Location:
        """Return a location that stays the same when the working directory changes."""
        return self if self.is_database else Location(os.path.abspath(self.text))

    def is_same_file(self, other: Location) -> bool:
        """Return whether both are paths of one file, through links too."""
        return not (self.is_database or other.is_database) and os.path.realpath(self.text) == os.path.realpath(
            other.text
        )

    def default_usage(self) -> Location:
        """Return the default location of the usage of these tokens: the same database, or a file beside the token file.

        Raises:
            ConfigurationError: it is the path of a folder.
        """
        if self.is_database:
            return self
        try:
            return Location(str(Path(self.text).with_suffix(".usage.db")))
        except ValueError:
            raise ConfigurationError(f"{self.text} is a folder; name a token file") from None


def masked(text: str) -> str:
    """Return *text* without the passwords of URLs in it."""
    return re.sub(r"(?i)(password=)[^&\s]+", r"\1…", re.sub(r"://[^/@\s:]*:[^\s]*@", "://…@", text))


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


def _is_url(text: str, subject: str) -> bool:
    scheme, is_complete, _ = text.partition("://")
    if is_complete and scheme in SCHEMES:
        return True
    if is_complete and _SCHEME.fullmatch(scheme):
        raise ConfigurationError(
            f"{subject} begins with {scheme}://, which names no store of this version; "
            "give the path of a token file or a postgresql:// URL"
        )
    if is_complete or _ADDRESS.search(text):
        raise ConfigurationError(
            f"{subject} resembles the address of a database but is no URL of one; "
            "write a postgresql:// URL, or ./ before a path"
        )
    return False
