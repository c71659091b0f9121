"""The credentials of a request: the carriers, their secrets, and the headers left for the application."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import pytest

from freegpt_auth.guard.credentials import NOT_PLAIN, SUBPROTOCOL, Presented, plain, presented, withdraw
from freegpt_auth.tokens import VALUE_LIMIT

CARRIERS = {b"authorization": b"Bearer ", b"x-api-key": b"", b"api-key": b""}
MALFORMED = Presented([], "malformed")


def http(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    """Return the scope of a request with these headers."""
    return {"type": "http", "headers": list(headers)}


def websocket(*subprotocols: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> dict[str, Any]:
    """Return the scope of a handshake that offers these subprotocols, as a server makes it."""
    offer = [(b"sec-websocket-protocol", ", ".join(subprotocols).encode("latin-1", "replace"))] if subprotocols else []
    return {"type": "websocket", "headers": [*headers, *offer], "subprotocols": list(subprotocols)}


def read(scope: dict[str, Any]) -> list[bytes]:
    """Return the digests of the presented secrets; check that the quick reading finds the same or nothing."""
    credentials = presented(scope)
    assert credentials.fault != "malformed"
    if scope["type"] == "http":
        digest, place = plain(scope)
        assert presented(scope, digest, place) == credentials
        assert not digest or scope["headers"][place][0] in CARRIERS
    return credentials.digests


def left(scope: dict[str, Any], *secrets: bytes) -> dict[str, Any]:
    """Return *scope* without the credentials that hold one of these secrets."""
    withdraw(scope, lambda digest: digest in digests(*secrets))
    return scope


def digests(*secrets: bytes) -> list[bytes]:
    """Return the result of :func:`read` for these secrets."""
    return [sha256(secret).digest() for secret in secrets]


@pytest.mark.parametrize(
    ("secrets", "values"),
    [
        ([b"sk-1"], [b"Bearer sk-1", b"bEaReR sk-1", b"Bearer    sk-1", b"Bearer \t sk-1", b" \t Bearer sk-1 \t "]),
        ([], [b"", b" ", b"Bearer", b"Bearer \t ", b"sk-1", b"Basic c2stMQ=="]),
        ([], [b"Bearersk-1", b"Bearer\tsk-1", b"XBearer sk-1"]),
    ],
)
def test_scheme_in_any_case_and_optional_white_space(secrets: list[bytes], values: list[bytes]) -> None:
    """A client may put spaces and tabs where HTTP allows them; another scheme, or none, presents nothing."""
    assert [read(http((b"authorization", value))) for value in values] == [digests(*secrets)] * len(values)


@pytest.mark.parametrize("around", [[], [(b"accept", b"*/*"), (b"user-agent", b"x-api-key")]])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_plain_requests_are_read_at_once(carrier: bytes, around: list[tuple[bytes, bytes]]) -> None:
    """The usual form of credentials is read once: a second reading would slow every request."""
    for secret in (b"s", b"sk-1", b"a" * VALUE_LIMIT):
        headers = [*around, (carrier, CARRIERS[carrier] + secret), *around]
        digest, place = plain(http(*headers))
        assert (digest, headers[place][0]) == (sha256(secret).digest(), carrier)
        assert plain(http(*headers, (b"x-api-key", b"b"))) == plain({"headers": tuple(headers)}) == NOT_PLAIN


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        *[(b"Bearer sk-1", "prefixed"), (b"bEARER   sk-1", "prefixed"), (b"Bearer 'sk-1'", "prefixed")],
        *[(b'"sk-1"', "quoted"), (b"'sk-1'", "quoted")],
        *[(value, None) for value in (b"'sk-1\"", b"'sk-1", b"'", b"Bearersk-1")],
    ],
)
def test_mistakes_show_without_a_look_up(value: bytes, fault: str | None) -> None:
    """The scheme inside a secret and quotation marks round it are named, and the secret is not even hashed."""
    scopes = [http((carrier, scheme + value)) for carrier, scheme in CARRIERS.items()]
    for scope in [*scopes, websocket(SUBPROTOCOL + value.decode())]:
        assert presented(scope).fault == fault
        assert (read(scope) == [b""]) is (fault is not None)


@pytest.mark.parametrize("other", [b"Bearer sk-2", b"bEARER  sk-2", b"Basic eA=="])
def test_joined_authorization_is_malformed(other: bytes) -> None:
    """A proxy that joins two Authorization headers with a comma changes nothing: two credentials are malformed."""
    for first, second in ((b"Bearer sk-1", other), (other, b"Bearer sk-1")):
        for comma in (b",", b", ", b" ,\t"):
            assert presented(http((b"authorization", first + comma + second))) == MALFORMED
            assert read(http((b"x-api-key", b"sk-1" + comma + second)))


@pytest.mark.parametrize("blank", [b"\xa0", b"\x85", b"\x1c", b"\x1d", b"\x1e", b"\x1f", b"\x0b", b"\x0c"])
def test_no_other_white_space_is_stripped(blank: bytes) -> None:
    """Only space and tab are stripped; every other byte belongs to the secret and makes it another one."""
    for value in (b"Bearer%bsk-1" % blank, b"%bBearer sk-1" % blank):
        assert read(http((b"authorization", value))) == []
    for carrier, scheme in CARRIERS.items():
        for secret in (blank + b"sk-1", b"sk-1" + blank):
            assert read(http((carrier, scheme + secret))) == digests(secret)


def test_every_carrier_is_read_in_the_order_sent() -> None:
    """A client that fills several carriers has each of them tried, and no header that ends in logs or means another."""
    headers = ((b"api-key", b"a"), (b"authorization", b"Bearer b"), (b"accept", b"*/*"), (b"x-api-key", b"c"))
    others = (b"cookie", b"proxy-authorization", b"x-authorization", b"x-goog-api-key")
    assert read(http(*headers, *((name, b"Bearer sk-1") for name in others))) == digests(b"a", b"b", b"c")
    assert read(websocket(SUBPROTOCOL + "d", headers=headers[::-1])) == digests(b"c", b"b", b"a", b"d")


@pytest.mark.parametrize(
    "scope",
    [
        http((b"authorization", b"Bearer sk-1"), (b"accept", b"*/*"), (b"authorization", b"Bearer sk-1")),
        http((b"authorization", b"Basic eA=="), (b"authorization", b"Bearer sk-1")),
        http((b"authorization", b"Bearer sk-1"), (b"authorization", b"")),
        http((b"x-api-key", b"sk-1"), (b"x-api-key", b"sk-2")),
        http((b"api-key", b"sk-1"), (b"api-key", b"sk-1")),
        websocket(SUBPROTOCOL + "sk-1", SUBPROTOCOL + "sk-2"),
    ],
)
def test_a_carrier_that_comes_twice_is_malformed(scope: dict[str, Any]) -> None:
    """A proxy and this library can never disagree about which of two credentials counts: neither does."""
    assert plain(scope) == NOT_PLAIN
    assert presented(scope) == MALFORMED


def test_values_over_the_limit_are_dropped() -> None:
    """A secret of 4 KB is still read; of a longer one nothing is kept."""
    for size, kept in ((VALUE_LIMIT, digests(b"a" * VALUE_LIMIT)), (VALUE_LIMIT + 1, [b""])):
        for carrier, scheme in CARRIERS.items():
            assert read(http((carrier, scheme + b"a" * size))) == kept
        assert read(websocket(SUBPROTOCOL + "a" * size)) == kept


def test_subprotocols_count_in_websockets_only() -> None:
    """A browser, which can set no header on a WebSocket, can send its token as a subprotocol."""
    assert read(websocket("realtime", SUBPROTOCOL + "sk-1")) == digests(b"sk-1")
    assert read({**websocket(SUBPROTOCOL + "sk-1"), "type": "http"}) == []
    assert read(websocket("realtime", SUBPROTOCOL)) == []
    assert read({**websocket(), "subprotocols": [f"v1, {SUBPROTOCOL}sk-1,realtime"]}) == digests(b"sk-1")


@pytest.mark.parametrize("text", ["-\udcff", "-\u20ac", "-\xe9"])
def test_subprotocols_outside_ascii(text: str) -> None:
    """Bytes outside ASCII, which some servers decode to lone surrogates, make a wrong token and are no error."""
    assert read(websocket("chat" + text, SUBPROTOCOL + "sk" + text)) == [b""]


HOST = (b"host", b"x")


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        (websocket(SUBPROTOCOL + "sk-1", headers=(HOST,)), websocket(headers=(HOST,))),
        (websocket("v1", SUBPROTOCOL + "sk-1", "v2", headers=(HOST,)), websocket("v1", "v2", headers=(HOST,))),
        ({**websocket(), "subprotocols": [f"v1, {SUBPROTOCOL}sk-1,v2"]}, websocket("v1", "v2")),
        (websocket("chat-\udcff", SUBPROTOCOL + "sk-1"), websocket("chat-\udcff")),
        *[(websocket(*others), websocket(*others)) for others in ([], ["v1"], ["v1", SUBPROTOCOL + "sk-2"])],
    ],
)
def test_verified_subprotocol_is_withdrawn(scope: dict[str, Any], expected: dict[str, Any]) -> None:
    """An application sees no verified secret, also of a server that hands on the header as it came; others stay."""
    outside = scope["headers"], scope["subprotocols"]
    assert left(scope, b"sk-1") == expected
    assert outside == (scope["headers"], scope["subprotocols"])


@pytest.mark.parametrize("scope", [{"type": "websocket", "headers": iter(())}, http()])
def test_scopes_without_subprotocols_are_read(scope: dict[str, Any]) -> None:
    """A handshake without the optional entry presents nothing."""
    assert read(left(scope)) == []


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_verified_headers_are_withdrawn(kind: Any) -> None:
    """Headers with a verified secret are removed, all others stay in order, for every iterable that a server sends."""
    headers = [(b"api-key", b"sk-1"), (b"host", b"x"), (b"authorization", b"Bearer sk-2"), (b"x-api-key", b"sk-1")]
    scope = {"type": "http", "headers": kind(headers)}
    outside = scope["headers"]
    assert left(scope, b"sk-1")["headers"] == headers[1:3]
    assert (scope["headers"] is outside) is (kind is list)
