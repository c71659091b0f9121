"""How often and when each token was used, recorded without slowing a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..location import driver_required, is_url

if TYPE_CHECKING:
    from .base import UsageStore


def open_usage(location: str) -> UsageStore:
    """Return where usage is kept: the path of a SQLite database, or the ``postgresql://`` URL of a store.

    Nothing is read or written before it is asked for something.

    Raises:
        ConfigurationError: *location* resembles the address of a database but is no URL of one, the URL cannot be read,
            or its driver is not installed.
    """
    # Each imported when it is needed: a command imports no driver that it has no use for.
    if is_url(location, "the usage database"):
        with driver_required():
            from .postgres import PostgresUsage  # noqa: PLC0415
        return PostgresUsage(location)
    from .sqlite import UsageDatabase  # noqa: PLC0415

    return UsageDatabase(location)
