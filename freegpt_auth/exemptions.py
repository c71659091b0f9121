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
    """Return whether a request asks for one of the public *paths*.

    Never by a root path that the client may have chosen: daphne takes it from the header ``Daphne-Root-Path`` and hides the
    header, so behind daphne a root path from the server makes no path public. One from a mount point does: Starlette
    keeps the server's own beside it, in ``app_root_path``.
    """
    path = route_path(scope)
    if path not in paths:
        return False
    if path == scope["path"]:
        return True
    by_server = scope.get("app_root_path", scope["root_path"])
    return not (by_server and _DAPHNE in sys.modules) and all(name != _ROOT_PATH_HEADER for name, _ in scope["headers"])


def is_preflight(scope: Any) -> bool:
    """Return whether a browser asks to send the real request; by the Fetch standard it asks without credentials."""
    if scope["type"] != "http" or scope["method"] != "OPTIONS":
        return False
    names = {name for name, _ in scope["headers"]}
    return b"origin" in names and b"access-control-request-method" in names
