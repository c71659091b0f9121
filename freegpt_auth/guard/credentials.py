"""The credentials of a request: headers and WebSocket subprotocols in, digests of secrets out. Pure.

A secret is digested where it is read: it is hashed once, and no later code holds it, neither a token source nor the
traceback of a faulty one. After its verification, :func:`withdraw` removes it from the scope.

Four carriers are read, one value each, in no order of preference: of two well-known clients one sends its token in
``Authorization`` and another secret in ``x-api-key``, the other does the opposite. Query strings, bodies and cookies
are never read: they end in logs and caches (RFC 6750, section 5.3).
"""

from __future__ import annotations

import re
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from ..tokens import VALUE_LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable

SUBPROTOCOL = "openai-insecure-api-key."
"""Prefix of a secret in a subprotocol: a browser can set no header on a WebSocket."""

NOT_PLAIN = (b"", 0)
"""No digest, and no place."""

Fault = Literal["malformed", "prefixed", "quoted"]
"""A mistake seen without a look-up: a carrier is sent twice, or a secret has the scheme in it or quotes round it."""

_CARRIERS = frozenset({b"authorization", b"x-api-key", b"api-key"})
_OFFERS = b"sec-websocket-protocol"
_PLAIN_SCHEME = b"Bearer "
_SCHEME = b"bearer "
_SPACE, _COMMA = b" ,"
_BLANK = b" \t"  # OWS of RFC 9110, 5.6.3; strip() without arguments would also remove \x0b, \x0c, \x1c-\x1f
_WRAPPING = b"\t\"'"
_QUOTES = frozenset(b"\"'")
_UNREADABLE = bytes(VALUE_LIMIT + 1)  # too long to be a secret
_JOINED = re.compile(rb",[ \t]*(?:bearer|basic) ", re.IGNORECASE)


class Presented(msgspec.Struct, frozen=True):  # made in a third of the time of a named tuple
    """The credentials of one request.

    Attributes:
        digests: of the secrets, in the order sent. A secret over 4 KB or with a mistake is ``b""``: it is refused
            unhashed.
        fault: the first mistake.
    """

    digests: list[bytes]
    fault: Fault | None = None


def plain(scope: Any) -> tuple[bytes, int]:
    """Return digest and place of the only secret of a request, if it is sent as nearly every client does.

    The place is an index from the end of the list of headers. Any other request is :data:`NOT_PLAIN`. The form of the
    secret is left to :func:`presented`: the digest of an accepted one shows that it has the right form.
    """
    headers = scope["headers"]
    if type(headers) is not list or scope.get("subprotocols"):
        return NOT_PLAIN
    carrier = value = b""
    left = 0
    scan: Any = iter(headers)
    for header in scan:
        if header[0] in _CARRIERS:
            if carrier:
                return NOT_PLAIN
            carrier, value = header
            left = scan.__length_hint__()  # counting the headers would take a tenth longer
    secret = value.removeprefix(_PLAIN_SCHEME)
    if (secret is value) is not (carrier == b"authorization") and 0 < len(secret) <= VALUE_LIMIT:
        return sha256(secret).digest(), -1 - left
    return NOT_PLAIN


def presented(scope: Any, digest: bytes = b"", place: int = 0) -> Presented:
    """Return the credentials of a request; *digest* and *place* of :func:`plain` spare a second reading.

    If one carrier is sent more than once, there are no digests but a fault.
    """
    if digest:
        secret = scope["headers"][place][1].removeprefix(_PLAIN_SCHEME)
        if _SPACE not in secret and secret.strip(_WRAPPING) == secret:
            return Presented([digest])
    secrets = _header_secrets(scope)
    offered = _offered_secrets(scope) if scope["type"] == "websocket" else []
    if secrets is None or len(offered) > 1:
        return Presented([], "malformed")
    secrets += offered
    digests: list[bytes] = []
    fault: Fault | None = None
    for secret in filter(None, secrets):
        mistake = _fault(secret)
        fault = fault or mistake
        digests.append(b"" if mistake else _digest(secret))
    return Presented(digests, fault)


def withdraw(scope: Any, is_valid: Callable[[bytes], bool]) -> None:
    """Remove from *scope* each credential whose digest *is_valid*; other credentials stay.

    The list of headers is changed in place: layers outside that share it (error trackers, tracing) lose the secret too.
    """
    headers = _listed(scope, "headers")
    carried = [(place, _digest(_secret(*header))) for place, header in enumerate(headers) if header[0] in _CARRIERS]
    for place, digest in reversed(carried):  # from the end: the places before stay right
        if is_valid(digest):
            del headers[place]
    if scope["type"] == "websocket" and any(map(is_valid, map(_digest, _offered_secrets(scope)))):
        _withdraw_subprotocol(scope)


def _listed(scope: Any, key: str) -> list[Any]:
    """Return an entry of *scope* as a list that can be changed: ASGI promises no more than an iterable."""
    entry = scope.get(key, ())
    if not isinstance(entry, list):
        entry = scope[key] = list(entry)
    return entry


def _header_secrets(scope: Any) -> list[bytes] | None:
    """Return the secrets in headers; ``None`` if one carrier is sent twice."""
    secrets: list[bytes] = []
    found: set[bytes] = set()
    for name, value in _listed(scope, "headers"):
        if name in _CARRIERS:
            if name in found or (name == b"authorization" and _COMMA in value and _JOINED.search(value)):
                return None
            found.add(name)
            secrets.append(_secret(name, value))
    return secrets


def _secret(name: bytes, value: bytes) -> bytes:
    """Return the secret in a header, after the scheme in any case and one or more spaces (RFC 9110, 11.1 and 11.4)."""
    stripped = value.strip(_BLANK)
    if name != b"authorization":
        return stripped
    return stripped[len(_SCHEME) :].lstrip(_BLANK) if stripped[: len(_SCHEME)].lower() == _SCHEME else b""


def _digest(secret: bytes) -> bytes:
    return sha256(secret).digest() if len(secret) <= VALUE_LIMIT else b""


def _fault(secret: bytes) -> Fault | None:
    if _SPACE in secret and secret[: len(_SCHEME)].lower() == _SCHEME:
        return "prefixed"
    return "quoted" if secret[0] in _QUOTES and secret[0] == secret[-1] and len(secret) > 1 else None


def _offers(scope: Any) -> list[str]:
    """Return the subprotocols one by one; uvicorn 0.50 passes the header's value undivided (RFC 6455, 11.3.4)."""
    return [offer.strip(" \t") for value in _listed(scope, "subprotocols") for offer in value.split(",")]


def _offered_secrets(scope: Any) -> list[bytes]:
    values = [offer[len(SUBPROTOCOL) :] for offer in _offers(scope) if offer.startswith(SUBPROTOCOL)]
    # A header holds bytes, and servers decode those outside ASCII in different ways.
    return [value.encode() if value.isascii() else _UNREADABLE for value in values]


def _withdraw_subprotocol(scope: Any) -> None:
    """Remove the subprotocol that carries a secret from the offers and from their header."""
    # Behind other white space a secret is no credential, and is removed all the same.
    kept = scope["subprotocols"][:] = [each for each in _offers(scope) if not each.strip().startswith(SUBPROTOCOL)]
    headers = scope["headers"]
    headers[:] = [header for header in headers if header[0] != _OFFERS]
    if kept:
        headers.append((_OFFERS, ", ".join(kept).encode("latin-1", "replace")))
