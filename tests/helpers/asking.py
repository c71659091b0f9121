"""One HTTP request, as any client sends it."""

from __future__ import annotations

import urllib.error
import urllib.request


def status(url: str, token: str | None = None) -> int:
    """Send a GET, with *token* as bearer token if given, and return the status code.

    Raises:
        OSError: the server did not answer.
    """
    headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def is_up(url: str, token: str | None = None) -> bool:
    """Return whether a server answers at all."""
    try:
        return bool(status(url, token))
    except OSError:
        return False
