"""What a request presented: headers and WebSocket subprotocols in, digests of secrets out. Pure; it knows no tokens.

A secret is digested where it is read, so that it is hashed once, and so that nothing that runs after it holds it: neither
a verifier nor the traceback of one that fails. Once it is verified, :func:`withdraw` removes it from the scope.

Four carriers are read, one value each, and no fixed order between them is right: of two well-known clients one sends
its token in ``Authorization`` and something else in ``x-api-key``, the other does the opposite. Query strings, bodies and
cookies are never read: they end in logs and caches (RFC 6750, section 5.3).
"""

from __future__ import annotations

import re
from hashlib import sha256
from operator import length_hint
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .exceptions import MalformedCredentialsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SUBPROTOCOL = "openai-insecure-api-key."
"""What a browser puts before its secret, since it can set no header on a WebSocket."""

VALUE_LIMIT = 4096
"""Bytes of the longest credential that is looked at."""

NOT_PLAIN = (b"", 0)
"""No digest, and no place."""

Fault = Literal["prefixed", "quoted"]
"""A mistake that shows without a look-up: the scheme stands in the secret, or quotation marks round it."""

_CARRIERS = frozenset({b"authorization", b"x-api-key", b"api-key"})
_OFFERS = b"sec-websocket-protocol"
_PLAIN_SCHEME = b"Bearer "
_SCHEME = b"bearer "
_BLANK = b" \t"  # OWS of RFC 9110, 5.6.3; a plain strip() would also eat \x0b, \x0c, \x1c-\x1f
_QUOTES = b"\"'"
_JOINED = re.compile(rb",[ \t]*(?:bearer|basic)[ \t]", re.IGNORECASE)


class Credential(NamedTuple):
    """One secret that a request presents, without the secret.

    Attributes:
        digest: its SHA-256 digest; ``b""`` for one that need not be looked up to be refused.
        fault: the mistake in it, if it has one.
        place: the index of its header; ``None`` for a subprotocol.
    """

    digest: bytes
    fault: Fault | None
    place: int | None


def plain(headers: Iterable[tuple[bytes, bytes]]) -> tuple[bytes, int]:
    """Return digest and place of the one secret that the headers present as nearly every client does.

    The place is an index from the end of the list. :data:`NOT_PLAIN` says nothing about the headers; ask
    :func:`presented`, which takes half as long again.
    """
    if type(headers) is not list:
        return NOT_PLAIN
    carrier = secret = b""
    left = 0
    scan = iter(headers)
    for name, value in scan:
        if name in _CARRIERS:
            if carrier:
                return NOT_PLAIN
            carrier, secret, left = name, value, length_hint(scan)  # counting the headers would cost more
    if carrier == b"authorization":
        value = secret
        secret = value.removeprefix(_PLAIN_SCHEME)
        if secret is value:
            return NOT_PLAIN
    if 0 < len(secret) <= VALUE_LIMIT and b" " not in secret and secret.strip(b"\t\"'") == secret:
        return sha256(secret).digest(), -1 - left
    return NOT_PLAIN


def presented(scope: Any) -> list[Credential]:
    """Return the credentials of a request in the order sent, none if it presents none.

    Raises:
        MalformedCredentialsError: one carrier comes more than once.
    """
    found: dict[bytes, Credential | None] = {}
    for place, (name, value) in enumerate(_listed(scope, "headers")):
        if name in _CARRIERS:
            if name in found or (name == b"authorization" and _JOINED.search(value)):
                raise MalformedCredentialsError(f"the {name.decode()} header is sent more than once")
            found[name] = _credential(_after_scheme(value) if name == b"authorization" else value.strip(_BLANK), place)
    if scope["type"] == "websocket":
        found[_OFFERS] = _offered_credential(scope)
    return [credential for credential in found.values() if credential is not None]


def withdraw(scope: Any, is_valid: Callable[[bytes], bool]) -> None:
    """Remove from *scope* each credential whose digest *is_valid*; whatever else the request presents stays.

    The list of headers is changed in place: layers outside that share it (error trackers, tracing) lose the secret too.
    """
    for credential in reversed(presented(scope)):  # from the end: the places before stay right
        if is_valid(credential.digest):
            if credential.place is None:
                _withdraw_subprotocol(scope)
            else:
                del scope["headers"][credential.place]


def _listed(scope: Any, key: str) -> list[Any]:
    """Return an entry of *scope* as a list that can be changed: ASGI promises no more than an iterable."""
    entry = scope.get(key, ())
    if not isinstance(entry, list):
        entry = scope[key] = list(entry)
    return entry


def _credential(secret: bytes, place: int | None) -> Credential | None:
    if not secret:
        return None
    fault: Fault | None = None
    if secret[: len(_SCHEME)].lower() == _SCHEME:
        fault = "prefixed"
    elif len(secret) > 1 and secret[0] == secret[-1] and secret[0] in _QUOTES:
        fault = "quoted"
    unhashed = fault is not None or len(secret) > VALUE_LIMIT
    return Credential(b"" if unhashed else sha256(secret).digest(), fault, place)


def _after_scheme(value: bytes) -> bytes:
    """Return the secret behind the scheme, in any case and behind one or more spaces (RFC 9110, 11.1 and 11.4)."""
    stripped = value.strip(_BLANK)
    return stripped[len(_SCHEME) :].lstrip(_BLANK) if stripped[: len(_SCHEME)].lower() == _SCHEME else b""


def _offers(scope: Any) -> list[str]:
    """Return the subprotocols one by one; uvicorn 0.50 hands on the header's value in one piece (RFC 6455, 11.3.4)."""
    return [offer.strip(" \t") for value in _listed(scope, "subprotocols") for offer in value.split(",")]


def _offered_credential(scope: Any) -> Credential | None:
    values = [offer[len(SUBPROTOCOL) :] for offer in _offers(scope) if offer.startswith(SUBPROTOCOL)]
    if len(values) > 1:
        raise MalformedCredentialsError(f"the subprotocol {SUBPROTOCOL}… is sent more than once")
    for value in values:
        # A header holds bytes; what a server made of those outside ASCII is not to be guessed.
        return _credential(value.encode(), None) if value.isascii() else Credential(b"", None, None)
    return None


def _withdraw_subprotocol(scope: Any) -> None:
    """Remove the subprotocol that carries a secret from the offers and from the header that they stood in."""
    # What is behind other white space is no credential, but may be somebody's secret all the same.
    kept = scope["subprotocols"][:] = [each for each in _offers(scope) if not each.strip().startswith(SUBPROTOCOL)]
    headers = scope["headers"]
    headers[:] = [header for header in headers if header[0] != _OFFERS]
    if kept:
        headers.append((_OFFERS, ", ".join(kept).encode("latin-1", "replace")))
