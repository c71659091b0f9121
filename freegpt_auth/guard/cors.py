"""CORS headers of a denial (Fetch standard, "CORS protocol"), for a guard outside the CORS middleware. Pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ..exceptions import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

ANY = "*"
"""The origin that stands for all. Safe: a page must add a bearer token itself, and a denial holds nothing private."""

EXPOSED = (
    "WWW-Authenticate, Retry-After, x-ratelimit-limit-requests, x-ratelimit-limit-tokens, "
    "x-ratelimit-remaining-requests, x-ratelimit-remaining-tokens, x-ratelimit-reset-requests, x-ratelimit-reset-tokens"
)
"""Headers of a denial that a page may read. Browsers accept whole names or ``*``, no prefixes."""

_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::(\d{1,5}))?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def checked_origins(origins: Iterable[str]) -> frozenset[str]:
    """Return *origins* as a set, for :func:`headers_for`.

    Raises:
        ConfigurationError: an origin is not in the form that browsers send (RFC 6454, section 6.2) and matches none.
    """
    if isinstance(origins, str):
        raise ConfigurationError(f"cors_origins must be a list of origins, not one string; write [{origins!r}]")
    checked = frozenset(origins)
    for origin in checked - {ANY}:
        match = _ORIGIN.fullmatch(origin)
        if match is None or (match[2] is not None and match[2] == _DEFAULT_PORTS.get(match[1])):
            raise ConfigurationError(
                f"the CORS origin {origin!r} is none that a browser sends; write scheme://host or scheme://host:port, "
                "in lower case, without a path and without the scheme's own port, or * alone for every origin"
            )
    if ANY in checked and len(checked) > 1:
        raise ConfigurationError("the CORS origins are * and others; write * alone, or only the others")
    return checked


def headers_for(scope: Any, origins: Container[str]) -> list[tuple[bytes, bytes]]:
    """Return the headers that let a page of one of the *origins* read the response to the request of *scope*."""
    if ANY in origins:
        return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", EXPOSED.encode())]
    vary = (b"vary", b"Origin")
    origin = next((value for name, value in scope["headers"] if name == b"origin"), b"")
    if origin.decode("latin-1") not in origins:
        return [vary]
    return [
        (b"access-control-allow-origin", origin),
        vary,
        (b"access-control-expose-headers", EXPOSED.encode()),
    ]
