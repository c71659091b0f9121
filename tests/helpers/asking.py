"""Asks a server, as any client does."""

from __future__ import annotations

import urllib.error
import urllib.request


def status(url: str, token: str | None = None) -> int:
    """Return the status code that a GET answers.

    Raises:
        OSError: there is no answer.
    """
    request = urllib.request.Request(url)
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
