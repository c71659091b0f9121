"""What a request presented: headers and WebSocket subprotocols in, digests of secrets out. Pure; it knows no tokens.

A secret is digested where it is read, so that it is hashed once, and so that nothing that runs after it holds it: neither
a verifier nor the traceback of one that fails.

Four carriers are read, one value each, and no fixed order between them is right: of two well-known clients one sends
its token in ``Authorization`` and something else in ``x-api-key``, the other does the opposite. Query strings, bodies and
cookies are never read: they end in logs and caches (RFC 6750, section 5.3).
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Any

from .exceptions import MalformedCredentialsError

if TYPE_CHECKING:
    from collections.abc import Iterable

SUBPROTOCOL = "openai-insecure-api-key."
"""What a browser puts before its secret, since it can set no header on a WebSocket."""

VALUE_LIMIT = 4096
"""Bytes of the longest credential that is looked at."""

_CARRIERS = frozenset({b"authorization", b"x-api-key", b"api-key"})
_SCHEME = b"bearer "
_START = len(_SCHEME)
_SPACE = ord(" ")
_BLANK = b" \t"  # OWS of RFC 9110, 5.6.3; a plain strip() would also eat \x0b, \x0c, \x1c-\x1f


def plain_digest(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """Return the digest of the one secret that the headers present as nearly every client does.

    ``None`` says nothing about them; ask :func:`presented`, which takes half as long again.
    """
    carrier = value = b""
    for name, content in headers:
        if name in _CARRIERS:
            if carrier:
                return None
            carrier, value = name, content
    if (
        carrier == b"authorization"
        and _START < len(value) <= VALUE_LIMIT
        and value[:_START] == b"Bearer "
        and value[_START] > _SPACE < value[-1]
    ):
        return sha256(value[_START:]).digest()
    return None


def presented(scope: Any) -> list[bytes]:
    """Return the digests of the secrets that a request presents, none if it presents none.

    For a value of over 4 KB that is ``b""``, which is no digest: it need not be hashed to be refused.

    Raises:
        MalformedCredentialsError: one carrier comes more than once.
    """
    digests: list[bytes] = []
    found: set[bytes] = set()
    for name, value in scope["headers"]:
        if name in _CARRIERS:
            if name in found:
                raise MalformedCredentialsError(f"the {name.decode()} header is sent more than once")
            found.add(name)
            secret = _credentials(value) if name == b"authorization" else value.strip(_BLANK)
            if secret:
                digests.append(_digest(secret))
    if scope["type"] == "websocket":
        digests += _subprotocol_digests(scope)
    return digests


def _digest(secret: bytes) -> bytes:
    return sha256(secret).digest() if len(secret) <= VALUE_LIMIT else b""


def _credentials(value: bytes) -> bytes:
    """Return what follows the scheme, in any case and behind one or more spaces (RFC 9110, 11.1 and 11.4)."""
    stripped = value.strip(_BLANK)
    return stripped[len(_SCHEME) :].lstrip(_BLANK) if stripped[: len(_SCHEME)].lower() == _SCHEME else b""


def without_secret(scope: Any) -> Any:
    """Return a WebSocket's scope as the application may see it: without the subprotocol that carries a secret."""
    offered = _offered(scope)
    # What is behind other white space is no credential, but may be somebody's secret all the same.
    kept = [protocol for protocol in offered if not protocol.strip().startswith(SUBPROTOCOL)]
    if len(kept) == len(offered):
        return scope
    name = b"sec-websocket-protocol"
    headers = [(key, value) for key, value in scope["headers"] if key != name]
    if kept:
        headers.append((name, ", ".join(kept).encode("latin-1", "replace")))
    return {**scope, "subprotocols": kept, "headers": headers}


def _offered(scope: Any) -> list[str]:
    """Return the subprotocols one by one; uvicorn 0.50 hands on the header's value in one piece (RFC 6455, 11.3.4)."""
    return [offer.strip(" \t") for value in scope.get("subprotocols", ()) for offer in value.split(",")]


def _subprotocol_digests(scope: Any) -> list[bytes]:
    values = [offer[len(SUBPROTOCOL) :] for offer in _offered(scope) if offer.startswith(SUBPROTOCOL)]
    if len(values) > 1:
        raise MalformedCredentialsError(f"the subprotocol {SUBPROTOCOL}… is sent more than once")
    # A header holds bytes; what a server made of those outside ASCII is not to be guessed.
    return [_digest(value.encode()) if value.isascii() else b"" for value in values if value]
