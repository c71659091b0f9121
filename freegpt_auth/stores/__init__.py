"""Stores of tokens and of their usage, one folder per engine; a location names the store."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TYPE_CHECKING

from ..exceptions import ConfigurationError
from ..location import driver_required, is_url
from .base import CACHE_LIMIT, LEASE

if TYPE_CHECKING:
    from ..usage.base import UsageStore
    from .base import TokenStore


def open_store(
    location: str, *, named: bool = False, lease: float = LEASE, cache_limit: int = CACHE_LIMIT
) -> TokenStore:
    """Return the store that *location* names: the path of a token file, or the ``postgresql://`` URL of a database.

    Nothing is read or written before the store is asked for something.

    Args:
        location: the path or the URL.
        named: a server was given this location, so the folder of a token file must exist.
        lease: seconds for which a process that cannot reach the database, or cannot read a token file that may have
            changed, goes on to accept the tokens that it knows.
        cache_limit: how many tokens of a database a process keeps in memory.

    Raises:
        ConfigurationError: *location* resembles the address of a database but is no URL of one, the URL cannot be read,
            its driver is not installed, or the folder of a *named* file does not exist.
    """
    # Each imported when it is needed: a command imports no driver that it has no use for.
    if is_url(location):
        with driver_required():
            from .postgres import PostgresTokenStore  # noqa: PLC0415
        return PostgresTokenStore(location, lease=lease, cache_limit=cache_limit)
    from .file import FileTokenStore  # noqa: PLC0415

    if named:
        _check_folder(location)
    return FileTokenStore(location, lease=lease)


def open_usage(location: str) -> UsageStore:
    """Return the usage store at *location*: the path of a SQLite database, or the ``postgresql://`` URL of a token store.

    Nothing is read or written before the first call of one of its methods.

    Raises:
        ConfigurationError: *location* resembles the address of a database but is no URL of one, the URL cannot be read,
            or its driver is not installed.
    """
    if is_url(location, "the usage database"):
        with driver_required():
            from .postgres.usage import PostgresUsage  # noqa: PLC0415
        return PostgresUsage(location)
    from .file.usage import UsageDatabase  # noqa: PLC0415

    return UsageDatabase(location)


def _check_folder(path: str) -> None:
    try:
        is_folder = stat.S_ISDIR(Path(path).parent.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_folder = False
    except OSError:  # the store meets it too, and recovers when it is over
        return
    if not is_folder:
        raise ConfigurationError(
            f"the folder of the token file {path!r} does not exist; create it, mount it, or correct the path"
        )
