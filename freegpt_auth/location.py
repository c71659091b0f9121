"""What a location names: the path of a token file, or the URL of a database. Pure."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from .exceptions import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEMES = ("postgresql", "postgres")
"""How the URL of a database begins."""


def is_url(location: str) -> bool:
    """Tell a URL from a path."""
    return "://" in location


@contextlib.contextmanager
def url_needs(location: str) -> Iterator[None]:
    """Say what is missing where the driver for a URL is imported.

    Raises:
        ConfigurationError: no driver belongs to it, or it is not installed.
    """
    scheme = location.partition("://")[0]
    if scheme not in SCHEMES:
        raise ConfigurationError(
            f"{scheme}:// names no store of this version; give the path of a token file or a postgresql:// URL"
        )
    try:
        yield
    except ImportError:
        raise ConfigurationError(
            "a store in PostgreSQL needs a driver: run pip install 'freegpt-auth[postgres]'"
        ) from None
