"""Where tokens persist, and how a location names a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..location import is_url, url_needs
from ..settings import CACHE_LIMIT, LEASE

if TYPE_CHECKING:
    from .base import TokenStore


def open_store(location: str, *, lease: float = LEASE, cache_limit: int = CACHE_LIMIT) -> TokenStore:
    """Return the store that *location* names: the path of a token file, or the ``postgresql://`` URL of a database.

    Nothing is read or written before the store is asked for something.

    Args:
        location: the path or the URL.
        lease: seconds for which a process that cannot reach the database, or cannot read a token file that may have
            changed, goes on to accept the tokens that it knows.
        cache_limit: how many tokens of a database a process keeps in memory.

    Raises:
        ConfigurationError: *location* is a URL that names no store, cannot be read, or whose driver is not installed.
    """
    # Each imported when it is needed: a command imports no driver that it has no use for.
    if is_url(location):
        with url_needs(location):
            from .postgres import PostgresTokenStore  # noqa: PLC0415
        return PostgresTokenStore(location, lease=lease, cache_limit=cache_limit)
    from .file import FileTokenStore  # noqa: PLC0415

    return FileTokenStore(location, lease=lease)
