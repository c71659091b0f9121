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
from typing import TYPE_CHECKING, Any, Literal

from ..exceptions import MalformedCredentialsError
from ..tokens import VALUE_LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable

SUBPROTOCOL = "openai-insecure-api-key."
"""What a browser puts before its secret, since it can set no header on a WebSocket."""

NOT_PLAIN = (b"", 0)
"""No digest, and no place."""

Fault = Literal["prefixed", "quoted"]
"""A mistake that shows without a look-up: the scheme stands in the secret, or quotation marks round it."""

_CARRIERS = frozenset({b"authorization", b"x-api-key", b"api-key"})
_OFFERS = b"sec-websocket-protocol"
_PLAIN_SCHEME = b"Bearer "
_SCHEME = b"bearer "
_SPACE, _COMMA = b" ,"
_BLANK = b" \t"  # OWS of RFC 9110, 5.6.3; a plain strip() would also eat \x0b, \x0c, \x1c-\x1f
_WRAPPING = b"\t\"'"
_QUOTES = frozenset(b"\"'")
_NOT_TO_BE_GUESSED = bytes(VALUE_LIMIT + 1)
_JOINED = re.compile(rb",[ \t]*(?:bearer|basic) ", re.IGNORECASE)


def plain(scope: Any) -> tuple[bytes, int]:
    """Return digest and place of the one secret that a request presents as nearly every client does.

    The place is an index from the end of the list of headers. :data:`NOT_PLAIN` says nothing about the request; ask
    :func:`presented`, which takes half as long again.
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
    if (
        (secret is value) is not (carrier == b"authorization")
        and 0 < len(secret) <= VALUE_LIMIT
        and _SPACE not in secret
        and secret.strip(_WRAPPING) is secret  # CPython returns the same object; a copy would only take the long way
    ):
        return sha256(secret).digest(), -1 - left
    return NOT_PLAIN


def presented(scope: Any) -> tuple[list[bytes], Fault | None]:
    """Return the digests of the secrets that a request presents in the order sent, and the first mistake in one of them.

    A secret of over 4 KB, or with a mistake, is ``b""``, which is no digest: it need not be hashed to be refused.

    Raises:
        MalformedCredentialsError: one carrier comes more than once.
    """
    secrets = _header_secrets(scope)
    if scope["type"] == "websocket":
        offered = _offered_secrets(scope)
        if len(offered) > 1:
            raise MalformedCredentialsError(f"the subprotocol {SUBPROTOCOL}… is sent more than once")
        secrets += offered
    digests: list[bytes] = []
    fault: Fault | None = None
    for secret in filter(None, secrets):
        mistake = _fault(secret)
        fault = fault or mistake
        digests.append(b"" if mistake else _digest(secret))
    return digests, fault


def withdraw(scope: Any, is_valid: Callable[[bytes], bool]) -> None:
    """Remove from *scope* each credential whose digest *is_valid*; whatever else the request presents stays.

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


def _header_secrets(scope: Any) -> list[bytes]:
    secrets: list[bytes] = []
    found: set[bytes] = set()
    for name, value in _listed(scope, "headers"):
        if name in _CARRIERS:
            if name in found or (name == b"authorization" and _COMMA in value and _JOINED.search(value)):
                raise MalformedCredentialsError(f"the {name.decode()} header is sent more than once")
            found.add(name)
            secrets.append(_secret(name, value))
    return secrets


def _secret(name: bytes, value: bytes) -> bytes:
    """Return the secret in a header: behind the scheme, in any case and after one or more spaces (RFC 9110, 11.1 and 11.4)."""
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
    """Return the subprotocols one by one; uvicorn 0.50 hands on the header's value in one piece (RFC 6455, 11.3.4)."""
    return [offer.strip(" \t") for value in _listed(scope, "subprotocols") for offer in value.split(",")]


def _offered_secrets(scope: Any) -> list[bytes]:
    values = [offer[len(SUBPROTOCOL) :] for offer in _offers(scope) if offer.startswith(SUBPROTOCOL)]
    # A header holds bytes; what a server made of those outside ASCII is not to be guessed.
    return [value.encode() if value.isascii() else _NOT_TO_BE_GUESSED for value in values]


def _withdraw_subprotocol(scope: Any) -> None:
    """Remove the subprotocol that carries a secret from the offers and from the header that they stood in."""
    # What is behind other white space is no credential, but may be somebody's secret all the same.
    kept = scope["subprotocols"][:] = [each for each in _offers(scope) if not each.strip().startswith(SUBPROTOCOL)]
    headers = scope["headers"]
    headers[:] = [header for header in headers if header[0] != _OFFERS]
    if kept:
        headers.append((_OFFERS, ", ".join(kept).encode("latin-1", "replace")))
