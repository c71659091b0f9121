"""What a request presented: headers and WebSocket subprotocols in, secrets out. Pure; it knows no tokens.

Four carriers are read, one value each, and no fixed order between them is right: of two well-known clients one sends
its token in ``Authorization`` and something else in ``x-api-key``, the other does the opposite. Query strings, bodies and
cookies are never read: they end in logs and caches (RFC 6750, section 5.3).
"""

from __future__ import annotations

from typing import Any

from .exceptions import MalformedCredentialsError

SUBPROTOCOL = "openai-insecure-api-key."
"""What a browser puts before its secret, since it can set no header on a WebSocket."""

VALUE_LIMIT = 4096
"""Bytes of the longest credential that is looked at."""

_CARRIERS = frozenset({b"authorization", b"x-api-key", b"api-key"})
_SCHEME = b"bearer "
_BLANK = b" \t"  # OWS of RFC 9110, 5.6.3; a plain strip() would also eat \x0b, \x0c, \x1c-\x1f


def presented(scope: Any) -> list[bytes]:
    """Return the secrets that a request presents, none if it presents none.

    A value of over 4 KB is presented as ``b""``, which is no token's secret: it need not be hashed to be refused.

    Raises:
        MalformedCredentialsError: one carrier comes more than once.
    """
    secrets: list[bytes] = []
    found: list[bytes] = []
    for name, value in scope["headers"]:
        if name in _CARRIERS:
            if name in found:
                raise MalformedCredentialsError(f"the {name.decode()} header is sent more than once")
            found.append(name)
            secret = _credentials(value) if name == b"authorization" else value.strip(_BLANK)
            if secret:
                secrets.append(secret if len(secret) <= VALUE_LIMIT else b"")
    if scope["type"] == "websocket":
        secrets += _subprotocol_secrets(scope)
    return secrets


def without_secret(scope: Any) -> Any:
    """Return a WebSocket's scope as the application may see it: without the subprotocol that carries a secret."""
    offered = _offered(scope)
    kept = [protocol for protocol in offered if not protocol.startswith(SUBPROTOCOL)]
    if len(kept) == len(offered):
        return scope
    name = b"sec-websocket-protocol"
    headers = [(key, value) for key, value in scope["headers"] if key != name]
    if kept:
        headers.append((name, ", ".join(kept).encode("latin-1", "replace")))
    return {**scope, "subprotocols": kept, "headers": headers}


def _credentials(value: bytes) -> bytes:
    """Return what follows the scheme, in any case and behind one or more spaces (RFC 9110, 11.1 and 11.4)."""
    stripped = value.strip(_BLANK)
    return stripped[len(_SCHEME) :].lstrip(_BLANK) if stripped[: len(_SCHEME)].lower() == _SCHEME else b""


def _offered(scope: Any) -> list[str]:
    """Return the subprotocols one by one; uvicorn 0.50 hands on the header's value in one piece (RFC 6455, 11.3.4)."""
    return [offer.strip() for value in scope.get("subprotocols", ()) for offer in value.split(",")]


def _subprotocol_secrets(scope: Any) -> list[bytes]:
    values = [offer[len(SUBPROTOCOL) :] for offer in _offered(scope) if offer.startswith(SUBPROTOCOL)]
    if len(values) > 1:
        raise MalformedCredentialsError(f"the subprotocol {SUBPROTOCOL}… is sent more than once")
    # A header holds bytes; what a server made of those outside ASCII is not to be guessed.
    return [value.encode() if value.isascii() and len(value) <= VALUE_LIMIT else b"" for value in values if value]
