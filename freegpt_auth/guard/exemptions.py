"""Requests that need no credentials: public paths and CORS preflights. Pure."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Container

_DAPHNE = "daphne.server"
_ROOT_PATH_HEADER = b"daphne-root-path"


def route_path(scope: Any) -> str:
    """Return the path below the mount point, as Starlette's router sees it."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and (path == root or path.startswith(root + "/")):
        return path[len(root) :]
    return path


def is_public(scope: Any, paths: Container[str]) -> bool:
    """Return whether the path of a request is one of the public *paths*.

    No path is public below a root path that the client may have chosen. daphne reads the root path from the request
    header ``Daphne-Root-Path`` and hides that header: behind daphne no path is public below a root path of the server.
    A mount point is not one: Starlette keeps the server's root path in ``app_root_path``.
    """
    if route_path(scope) not in paths:
        return False
    root = scope.get("root_path", "")
    if not root:
        return True
    by_server = scope.get("app_root_path", root)
    return not (by_server and _DAPHNE in sys.modules) and all(name != _ROOT_PATH_HEADER for name, _ in scope["headers"])


def is_preflight(scope: Any) -> bool:
    """Return whether a request is a CORS preflight, which browsers send without credentials (Fetch standard)."""
    if scope["type"] != "http" or scope["method"] != "OPTIONS":
        return False
    names = {name for name, _ in scope["headers"]}
    return b"origin" in names and b"access-control-request-method" in names
