"""What a request presented: which carriers are read, what is taken from them, and what the application still sees."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from freegpt_auth.bearer import SUBPROTOCOL, VALUE_LIMIT, presented, without_secret
from freegpt_auth.exceptions import MalformedCredentialsError

AUTHORIZATION = b"authorization"
NOT_BLANK = [b"\xa0", b"\x85", b"\x1c", b"\x1d", b"\x1e", b"\x1f", b"\x0b", b"\x0c"]


def http(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    """Return the scope of a request with these headers."""
    return {"type": "http", "headers": list(headers)}


def websocket(*subprotocols: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> dict[str, Any]:
    """Return the scope of a handshake that offers these subprotocols, as a server makes it."""
    offer = [(b"sec-websocket-protocol", ", ".join(subprotocols).encode("latin-1", "replace"))] if subprotocols else []
    return {"type": "websocket", "headers": [*headers, *offer], "subprotocols": list(subprotocols)}


@pytest.mark.parametrize(
    "value",
    [
        b"Bearer sk-1",
        b"bearer sk-1",
        b"BEARER sk-1",
        b"bEaReR sk-1",
        b"Bearer    sk-1",
        b"Bearer \t sk-1",
        b"  Bearer sk-1  ",
        b"\tBearer sk-1\t",
        b" \t Bearer sk-1 \t ",
    ],
)
def test_scheme_in_any_case_and_optional_white_space(value: bytes) -> None:
    """A client may write the scheme in any case and put spaces and tabs where HTTP allows them."""
    assert presented(http((AUTHORIZATION, value))) == [b"sk-1"]


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b" ",
        b"Bearer",
        b"Bearer ",
        b"Bearer \t ",
        b"sk-1",
        b"Basic c2stMQ==",
        b"Token sk-1",
        b"Bearersk-1",
        b"Bearer\tsk-1",
        b"Bearer:sk-1",
        b"Bearer=sk-1",
        b"XBearer sk-1",
    ],
)
def test_what_is_not_the_bearer_scheme_presents_nothing(value: bytes) -> None:
    """Another scheme, or none, is told that a token is missing, not that it is wrong."""
    assert presented(http((AUTHORIZATION, value))) == []


@pytest.mark.parametrize("blank", NOT_BLANK)
@pytest.mark.parametrize("template", [b"Bearer%bsk-1", b"%bBearer sk-1"])
def test_no_other_white_space_stands_before_or_after_the_scheme(blank: bytes, template: bytes) -> None:
    """A byte that only Python takes for white space does not make a valid header of an invalid one."""
    assert presented(http((AUTHORIZATION, template % blank))) == []


@pytest.mark.parametrize("blank", NOT_BLANK)
@pytest.mark.parametrize("template", [b"%bsk-1", b"sk-1%b"])
@pytest.mark.parametrize(("carrier", "scheme"), [(AUTHORIZATION, b"Bearer "), (b"x-api-key", b""), (b"api-key", b"")])
def test_no_other_white_space_is_stripped(blank: bytes, template: bytes, carrier: bytes, scheme: bytes) -> None:
    """Only space and tab are stripped; every other byte belongs to the secret and makes it another one."""
    value = template % blank
    assert presented(http((carrier, scheme + value))) == [value]


@pytest.mark.parametrize("carrier", [b"x-api-key", b"api-key"])
def test_key_headers_carry_a_bare_secret(carrier: bytes) -> None:
    """The headers of Anthropic's and Azure's clients are read, without a scheme."""
    assert presented(http((carrier, b" sk-1\t"))) == [b"sk-1"]
    assert presented(http((carrier, b" \t"))) == []


def test_every_carrier_is_read_in_the_order_sent() -> None:
    """A client that fills several carriers has each of them tried."""
    headers = ((b"api-key", b"a"), (AUTHORIZATION, b"Bearer b"), (b"accept", b"*/*"), (b"x-api-key", b"c"))
    assert presented(http(*headers)) == [b"a", b"b", b"c"]
    assert presented(http(*reversed(headers))) == [b"c", b"b", b"a"]


@pytest.mark.parametrize(
    "name",
    [b"cookie", b"proxy-authorization", b"x-authorization", b"x-api-token", b"openai-api-key", b"x-goog-api-key"],
)
def test_no_other_header_is_read(name: bytes) -> None:
    """A secret in a header that ends in logs, or that means something else, is not a credential."""
    assert presented(http((name, b"sk-1"), (name, b"Bearer sk-1"))) == []


@pytest.mark.parametrize(
    ("carrier", "first", "second"),
    [
        (AUTHORIZATION, b"Bearer sk-1", b"Bearer sk-2"),
        (AUTHORIZATION, b"Bearer sk-1", b"Bearer sk-1"),
        (AUTHORIZATION, b"Basic eA==", b"Bearer sk-1"),
        (AUTHORIZATION, b"Bearer sk-1", b""),
        (b"x-api-key", b"sk-1", b"sk-2"),
        (b"api-key", b"sk-1", b"sk-1"),
    ],
)
def test_a_carrier_that_comes_twice_is_malformed(carrier: bytes, first: bytes, second: bytes) -> None:
    """A proxy and this library can never disagree about which of two credentials counts: neither does."""
    headers = ((carrier, first), (b"accept", b"*/*"), (carrier, second))
    with pytest.raises(MalformedCredentialsError, match="sent more than once") as caught:
        presented(http(*headers))
    assert "sk-" not in str(caught.value)


def test_comma_joined_credentials_are_one_secret_that_no_token_has() -> None:
    """Two headers that a proxy joined into one are not taken apart again."""
    assert presented(http((AUTHORIZATION, b"Bearer sk-1, Bearer sk-2"))) == [b"sk-1, Bearer sk-2"]


@pytest.mark.parametrize(("carrier", "scheme"), [(AUTHORIZATION, b"Bearer "), (b"x-api-key", b""), (b"api-key", b"")])
def test_values_over_the_limit_are_dropped(carrier: bytes, scheme: bytes) -> None:
    """A secret of 4 KB is still read; of a longer one nothing is kept."""
    assert presented(http((carrier, scheme + b"a" * VALUE_LIMIT))) == [b"a" * VALUE_LIMIT]
    assert presented(http((carrier, scheme + b"a" * (VALUE_LIMIT + 1)))) == [b""]


def test_bytes_that_are_no_text_are_kept_as_they_are() -> None:
    """A secret is compared byte by byte, whatever encoding a client had in mind."""
    assert presented(http((AUTHORIZATION, b"Bearer \xff\xfe\x80"))) == [b"\xff\xfe\x80"]


def test_the_subprotocol_carries_a_secret_in_a_websocket_only() -> None:
    """A browser, which can set no header on a WebSocket, can send its token as a subprotocol."""
    assert presented(websocket("realtime", SUBPROTOCOL + "sk-1")) == [b"sk-1"]
    assert presented({**websocket(SUBPROTOCOL + "sk-1"), "type": "http"}) == []


def test_subprotocols_and_headers_of_a_websocket_are_both_read() -> None:
    """A client may send a header beside the subprotocol; both are tried."""
    scope = websocket(SUBPROTOCOL + "b", headers=((AUTHORIZATION, b"Bearer a"),))
    assert presented(scope) == [b"a", b"b"]


def test_a_websocket_without_subprotocols_presents_nothing() -> None:
    """A handshake without a token is told that it is missing; servers may leave the key out of the scope."""
    assert presented(websocket()) == []
    assert presented({"type": "websocket", "headers": []}) == []
    assert presented(websocket("realtime", SUBPROTOCOL)) == []


def test_two_secret_subprotocols_are_malformed() -> None:
    """As with headers, two secrets in one carrier are one too many, and neither is repeated."""
    with pytest.raises(MalformedCredentialsError, match="sent more than once") as caught:
        presented(websocket(SUBPROTOCOL + "sk-1", SUBPROTOCOL + "sk-2"))
    assert "sk-" not in str(caught.value)


def test_a_subprotocol_over_the_limit_is_dropped() -> None:
    """The limit holds for subprotocols too."""
    assert presented(websocket(SUBPROTOCOL + "a" * VALUE_LIMIT)) == [b"a" * VALUE_LIMIT]
    assert presented(websocket(SUBPROTOCOL + "a" * (VALUE_LIMIT + 1))) == [b""]


@pytest.mark.parametrize("secret", ["sk-\udcff", "sk-\u20ac", "sk-\xe9"])
def test_a_subprotocol_outside_ascii_is_wrong_and_no_error(secret: str) -> None:
    """A byte outside ASCII, which some servers decode to a lone surrogate, is refused like any wrong token."""
    scope = websocket(SUBPROTOCOL + secret)
    secrets = presented(scope)
    assert len(secrets) == 1
    assert without_secret(scope)["subprotocols"] == []


@pytest.mark.parametrize("other", ["chat-\udcff", "chat-\u20ac", "chat-\xe9"])
def test_other_subprotocols_outside_ascii_reach_the_application(other: str) -> None:
    """A subprotocol that is none of ours is passed on whatever is in it."""
    assert without_secret(websocket(other, SUBPROTOCOL + "sk-1"))["subprotocols"] == [other]


def test_the_application_never_sees_the_secret_subprotocol() -> None:
    """An application that logs its scope, or accepts the first subprotocol offered, gives nothing away."""
    scope = websocket("realtime", SUBPROTOCOL + "sk-1", "v1", headers=((b"host", b"x"),))
    seen = without_secret(scope)
    assert seen["subprotocols"] == ["realtime", "v1"]
    assert seen["headers"] == [(b"host", b"x"), (b"sec-websocket-protocol", b"realtime, v1")]
    assert "sk-1" not in repr(seen)


def test_a_header_without_subprotocols_is_removed() -> None:
    """When the secret was the only subprotocol, the application sees a handshake that offered none."""
    seen = without_secret(websocket(SUBPROTOCOL + "sk-1", headers=((b"host", b"x"),)))
    assert seen["subprotocols"] == []
    assert seen["headers"] == [(b"host", b"x")]


@pytest.mark.parametrize("scope", [websocket("realtime"), websocket(), {"type": "websocket", "headers": []}])
def test_a_scope_without_secret_stays_the_same(scope: dict[str, Any]) -> None:
    """A handshake that carries no secret reaches the application untouched."""
    before = dict(scope)
    assert without_secret(scope) is scope
    assert scope == before


@settings(max_examples=100, deadline=None)
@given(value=st.binary(max_size=64), blanks=st.tuples(*[st.text(" \t", max_size=3)] * 3))
def test_a_bearer_secret_is_what_was_sent_less_space_and_tab(value: bytes, blanks: tuple[str, str, str]) -> None:
    """Whatever bytes a secret has, they arrive unchanged, and only spaces and tabs round them are lost."""
    before, between, after = (blank.encode() for blank in blanks)
    secret = value.strip(b" \t")
    header = before + b"Bearer " + between + value + after
    assert presented(http((AUTHORIZATION, header))) == [secret] * bool(secret)
