"""Where tokens persist, and how a location names a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..exceptions import ConfigurationError
from .file import FileTokenStore

if TYPE_CHECKING:
    from .base import TokenStore


def open_store(location: str) -> TokenStore:
    """Return the store that *location* names: the path of a token file.

    Nothing is read or written before the store is asked for something.

    Raises:
        ConfigurationError: *location* is a URL; this version knows token files only.
    """
    scheme, separator, _ = location.partition("://")
    if separator:
        raise ConfigurationError(f"{scheme}:// names no store of this version; give the path of a token file")
    return FileTokenStore(location)
