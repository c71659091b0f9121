"""Stores of tokens and of their usage, one folder per engine; a location names the store."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TYPE_CHECKING

from ..exceptions import ConfigurationError
from ..location import Location, driver_required
from .base import CACHE_LIMIT, LEASE

if TYPE_CHECKING:
    from ..usage.base import UsageStore
    from .base import TokenStore


def open_store(
    location: Location | str, *, named: bool = False, lease: float = LEASE, cache_limit: int = CACHE_LIMIT
) -> TokenStore:
    """Return the store at *location*: a token file or a PostgreSQL database.

    Nothing is read or written before the first call of one of its methods.

    Args:
        location: the path or the URL.
        named: a server was given this location, so the folder of a token file must exist.
        lease: seconds for which known tokens are accepted while the database cannot be reached, or while a token file
            that may have changed cannot be read.
        cache_limit: number of tokens of a database that a process keeps in memory.

    Raises:
        ConfigurationError: *location* resembles the address of a database but is no URL of one, the URL cannot be read,
            its driver is not installed, or the folder of a *named* file does not exist.
    """
    place = Location.of(location)
    if place.is_database:  # each engine is imported on use: a command over a file needs no driver
        with driver_required():
            from .postgres import PostgresTokenStore  # noqa: PLC0415
        return PostgresTokenStore(place.text, lease=lease, cache_limit=cache_limit)
    from .file import FileTokenStore  # noqa: PLC0415

    if named:
        _check_folder(place.text)
    return FileTokenStore(place.text, lease=lease)


def open_usage(location: Location | str) -> UsageStore:
    """Return the usage store at *location*: a SQLite database or a PostgreSQL database with tokens.

    Nothing is read or written before the first call of one of its methods.

    Raises:
        ConfigurationError: *location* resembles the address of a database but is no URL of one, the URL cannot be read,
            or its driver is not installed.
    """
    place = Location.of(location, "the usage database")
    if place.is_database:
        with driver_required():
            from .postgres.usage import PostgresUsage  # noqa: PLC0415
        return PostgresUsage(place.text)
    from .file.usage import UsageDatabase  # noqa: PLC0415

    return UsageDatabase(place.text)


def _check_folder(path: str) -> None:
    try:
        is_folder = stat.S_ISDIR(Path(path).parent.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_folder = False
    except OSError:  # the store reports it, and recovers when the fault is over
        return
    if not is_folder:
        raise ConfigurationError(
            f"the folder of the token file {path!r} does not exist; create it, mount it, or correct the path"
        )
