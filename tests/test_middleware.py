"""The middleware as servers, clients and applications meet it: every row of the wire format, every mode, every edge."""

from __future__ import annotations

import inspect
import json
import logging
import threading
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import fastapi
import pytest
from anyio import to_thread
from hypothesis import HealthCheck, given, settings, strategies as st
from starlette.applications import Starlette
from starlette.authentication import UnauthenticatedUser, requires
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse

from freegpt_auth import (
    UNRESOLVED,
    AuthMode,
    BearerTokenMiddleware,
    ConfigurationError,
    FileTokenStore,
    MemoryTokenStore,
    Survey,
    middleware,
)
from freegpt_auth.bearer import SUBPROTOCOL
from freegpt_auth.denials import RETRY_AFTER
from freegpt_auth.stores import disk, file
from freegpt_auth.tokens import digest_of, issue
from freegpt_auth.usage_database import read_usage

if TYPE_CHECKING:
    from starlette.websockets import WebSocket

Ask = Callable[..., Awaitable[Any]]
Keep = Callable[..., Any]
Headers = list[tuple[bytes, bytes]]

KEY = "the-environment-key"
TOKEN_FILE = "api_tokens.json"
CHALLENGE = 'Bearer realm="freegpt_auth"'
NEVER: Any = None
"""An application that no request may reach: a call of it is an error."""
EXTENSIONS = {"websocket.http.response": {}}


def bearer(secret: str) -> Headers:
    """Return the headers of a client that presents a secret."""
    return [(b"authorization", f"Bearer {secret}".encode())]


async def plain(_scope: Any, _receive: Any, send: Any) -> None:
    """Answer 200 to every request, as an application does that knows nothing of authentication."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"plain"})


@pytest.fixture
def store() -> MemoryTokenStore:
    """Return a store in memory, which is configured even while it is empty."""
    return MemoryTokenStore()


@pytest.fixture
def secret(store: MemoryTokenStore, keep: Keep) -> str:
    """Return the secret of a token in the store."""
    return str(keep(store)[1])


@pytest.fixture
def guarded(hello: Any, store: MemoryTokenStore) -> BearerTokenMiddleware:
    """Return an application behind the middleware."""
    return BearerTokenMiddleware(hello, store=store)


# What is presented, and what is answered


@pytest.mark.anyio
@pytest.mark.parametrize(
    "value", [None, b"", b"Bearer", b"Bearer  ", b"Basic dXNlcjpzZWNyZXQ=", b"Token %s", b"%s", b"Bearer\xa0%s"]
)
async def test_nothing_presented(ask: Ask, guarded: Any, secret: str, value: bytes | None) -> None:
    """Without a bearer token, in any other scheme or without one, a client is told how to send it."""
    headers = [] if value is None else [(b"authorization", value.replace(b"%s", secret.encode()))]
    answer = await ask(guarded, headers=headers)
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == CHALLENGE
    assert "didn't provide an API key" in answer.error["message"]


@pytest.mark.anyio
async def test_invalid_has_one_face(
    ask: Ask, guarded: Any, store: MemoryTokenStore, keep: Keep, caplog: pytest.LogCaptureFixture
) -> None:
    """Unknown, mistyped, revoked and expired are one answer, byte by byte; the log alone knows which it was."""
    caplog.set_level(logging.INFO, "freegpt_auth")
    now = datetime.now(UTC)
    _, live = keep(store, "live")
    revoked, revoked_secret = keep(store, "revoked")
    store.revoke(revoked.id, now)
    expired, expired_secret = keep(store, "expired", now - timedelta(seconds=1))
    mistyped = live[:-1] + ("a" if live[-1] != "a" else "b")
    secrets = [issue("unknown", now=now)[1], mistyped, revoked_secret, expired_secret]
    caplog.clear()
    answers = [await ask(guarded, headers=bearer(secret)) for secret in secrets]
    assert [answer.messages for answer in answers] == [answers[0].messages] * 4
    assert answers[0].status == 401
    assert answers[0].headers["www-authenticate"] == f'{CHALLENGE}, error="invalid_token"'
    assert [(record.reason, record.token_id) for record in caplog.records] == [
        ("unknown", None),
        ("unknown", None),
        ("revoked", revoked.id),
        ("expired", expired.id),
    ]
    assert f"revoked ({revoked.id})" in caplog.records[2].getMessage()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("values", "status", "error"),
    [
        ([b"Bearer %s", b"Bearer %s"], 400, "invalid_request"),
        ([b"Bearer %s", b"Basic eA=="], 400, "invalid_request"),
        ([b"Bearer %s, Bearer %s"], 401, "invalid_token"),
        ([b"Bearer %s,%s"], 401, "invalid_token"),
        ([b"Bearer %s x"], 401, "invalid_token"),
        ([b"Bearer \xff\xfe"], 401, "invalid_token"),
        ([b"Bearer %s\xe9"], 401, "invalid_token"),
        ([b'Bearer "%s"'], 401, "invalid_token"),
    ],
)
async def test_ambiguous_credentials(  # noqa: PLR0917
    ask: Ask, guarded: Any, secret: str, values: list[bytes], status: int, error: str
) -> None:
    """A request whose credentials can be read in two ways is refused, though a valid token is among them."""
    headers = [(b"authorization", value.replace(b"%s", secret.encode())) for value in values]
    answer = await ask(guarded, headers=headers)
    assert answer.status == status
    assert answer.headers["www-authenticate"] == f'{CHALLENGE}, error="{error}"'


@pytest.mark.anyio
@pytest.mark.parametrize(
    "value", [b"Bearer %s", b"bearer %s", b"BEARER %s", b"Bearer   %s", b"Bearer \t%s", b"\t Bearer %s \t"]
)
async def test_the_scheme_in_any_case(ask: Ask, guarded: Any, secret: str, value: bytes) -> None:
    """A client passes however it writes the scheme, with as many spaces and tabs as HTTP allows."""
    answer = await ask(guarded, headers=[(b"authorization", value % secret.encode())])
    assert answer.status == 200
    assert json.loads(answer.body)["user"] == "a-token"


CARRIERS = [(b"authorization", b"Bearer "), (b"x-api-key", b""), (b"api-key", b"")]


@pytest.mark.anyio
@pytest.mark.parametrize("right", CARRIERS)
@pytest.mark.parametrize("wrong", CARRIERS)
async def test_any_carrier_verifies_in_either_order(
    ask: Ask, guarded: Any, secret: str, right: tuple[bytes, bytes], wrong: tuple[bytes, bytes]
) -> None:
    """A client that sends its token in one carrier and something else in another passes."""
    headers = [(wrong[0], wrong[1] + b"sk-something-else"), (right[0], right[1] + secret.encode())]
    for both in (headers, headers[::-1]):
        assert (await ask(guarded, headers=both)).status == (400 if right == wrong else 200)
    assert (await ask(guarded, headers=headers[1:])).status == 200
    assert (await ask(guarded, headers=headers[:1])).status == 401


@pytest.mark.anyio
async def test_query_body_and_cookie_are_never_read(ask: Ask, guarded: Any, secret: str) -> None:
    """A valid token where it would end in logs and caches does not let a request pass."""
    answer = await ask(
        guarded,
        method="POST",
        query_string=f"access_token={secret}&api_key={secret}&key={secret}".encode(),
        headers=[(b"cookie", f"access_token={secret}; authorization=Bearer {secret}".encode())],
        incoming=[{"type": "http.request", "body": json.dumps({"access_token": secret, "api_key": secret}).encode()}],
    )
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == CHALLENGE


def test_a_browser_can_ask_before_it_sends_a_token(store: MemoryTokenStore, secret: str) -> None:
    """A preflight, which by the standard carries no token, is answered by the application's own CORS rules."""
    application = Starlette(
        routes=[Route("/v1/models", lambda _request: JSONResponse([]))],
        middleware=[
            Middleware(BearerTokenMiddleware, store=store),
            Middleware(CORSMiddleware, allow_origins=["https://ui.test"], allow_headers=["authorization"]),
        ],
    )
    client = TestClient(application)
    preflight = {"origin": "https://ui.test", "access-control-request-method": "GET"}
    answer = client.options("/v1/models", headers=preflight)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://ui.test"
    assert client.get("/v1/models", headers={"origin": "https://ui.test"}).status_code == 401
    assert client.get("/v1/models", headers={"authorization": f"Bearer {secret}"}).status_code == 200


PREFLIGHT = [(b"origin", b"https://ui.test"), (b"access-control-request-method", b"POST")]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("OPTIONS", PREFLIGHT, 200),
        ("OPTIONS", [*PREFLIGHT, *bearer("sk-wrong")], 200),
        ("OPTIONS", [], 401),
        ("OPTIONS", PREFLIGHT[:1], 401),
        ("OPTIONS", PREFLIGHT[1:], 401),
        ("GET", PREFLIGHT, 401),
        ("POST", PREFLIGHT, 401),
        ("options", PREFLIGHT, 401),
    ],
)
async def test_only_a_preflight_passes(ask: Ask, method: str, headers: Headers, status: int) -> None:
    """An ordinary OPTIONS, or another method dressed up as a preflight, needs a token."""
    answer = await ask(BearerTokenMiddleware(plain, store=MemoryTokenStore()), method=method, headers=headers)
    assert answer.status == status
    assert isinstance(answer.scope.get("user"), UnauthenticatedUser) is (status == 200)


@pytest.mark.anyio
async def test_a_websocket_is_no_preflight(ask: Ask) -> None:
    """A handshake with the headers of a preflight is still a handshake."""
    guarded = BearerTokenMiddleware(NEVER, store=MemoryTokenStore())
    answer = await ask(guarded, type="websocket", method="OPTIONS", headers=PREFLIGHT)
    assert answer.messages == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.anyio
async def test_head_is_refused_with_headers_only(ask: Ask, guarded: Any) -> None:
    """A refused HEAD has the headers of the refused GET and no body."""
    head, get = await ask(guarded, method="HEAD"), await ask(guarded)
    assert head.body == b""
    assert (head.status, head.headers) == (get.status, get.headers)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["lifespan2", "webtransport", "", "HTTP"])
async def test_an_unknown_scope_type_is_an_error(ask: Ask, store: MemoryTokenStore, secret: str, kind: str) -> None:
    """A type that is not known is not guarded, so it is never passed on, not even with a valid token."""
    with pytest.raises(NotImplementedError, match="does not know how to guard"):
        await ask(BearerTokenMiddleware(NEVER, store=store), type=kind, headers=bearer(secret))


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["webtransport", "HTTP"])
async def test_an_unknown_scope_type_is_an_error_in_open_mode_too(ask: Ask, kind: str) -> None:
    """What is not known is not passed on, whatever the mode."""
    with pytest.raises(NotImplementedError):
        await ask(BearerTokenMiddleware(NEVER), type=kind)


LIVE_TOKEN, LIVE = issue("live", now=datetime.now(UTC))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.tuples(
        st.one_of(st.just(b""), st.binary(max_size=3), st.sampled_from([b" ", b"\t", b"\xa0", b"\x85", b"\x0b"])),
        st.sampled_from([b"Bearer", b"bearer", b"Bearer\x1c", b"Bearer\xa0", b"Basic", b""]),
        st.one_of(st.sampled_from([b" ", b"  ", b" \t"]), st.binary(max_size=2)),
        st.sampled_from([LIVE.encode(), LIVE.upper().encode(), LIVE.encode()[:-1], b"sk-"]),
        st.one_of(st.just(b""), st.binary(max_size=3), st.sampled_from([b" ", b"\x1f", b"\x0c", b"\x85", b"\x00"])),
    ),
    name=st.sampled_from([b"authorization", b"x-api-key", b"api-key"]),
)
def test_nothing_but_the_exact_secret_is_accepted(ask: Ask, pieces: tuple[bytes, ...], name: bytes) -> None:
    """Of all header values, those pass that are a live secret behind its scheme, less spaces and tabs; no others."""
    value = b"".join(pieces)
    store = MemoryTokenStore()
    store.add(digest_of(LIVE), LIVE_TOKEN)
    guarded = BearerTokenMiddleware(plain, store=store)
    answer = anyio.run(lambda: ask(guarded, headers=[(name, value)]))
    expected = value.strip(b" \t")
    if name == b"authorization":
        scheme, _, expected = expected.partition(b" ")
        expected = expected.lstrip(b" \t") * (scheme.lower() == b"bearer")
    assert (answer.status == 200) is (expected == LIVE.encode())


@pytest.mark.anyio
@pytest.mark.parametrize(("name", "scheme"), CARRIERS)
async def test_a_value_over_4_kb_is_refused_unhashed(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, name: bytes, scheme: bytes
) -> None:
    """A huge header costs nothing but its refusal."""
    hashed: list[bytes] = []
    sha256 = middleware.Authenticator._decide.__globals__["sha256"]
    monkeypatch.setitem(
        middleware.Authenticator._decide.__globals__, "sha256", lambda value: (hashed.append(value), sha256(value))[1]
    )
    guarded = BearerTokenMiddleware(NEVER, store=MemoryTokenStore())
    answer = await ask(guarded, headers=[(name, scheme + b"a" * 60_000)])
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == f'{CHALLENGE}, error="invalid_token"'
    await ask(guarded, headers=[(name, scheme + b"a" * 4096)])
    assert max(map(len, hashed)) == 4096


# The answer


@pytest.mark.anyio
async def test_the_error_is_the_one_that_clients_know(ask: Ask, guarded: Any) -> None:
    """OpenAI's clients raise their own authentication error."""
    answer = await ask(guarded, headers=bearer("sk-wrong"), method="POST")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-length"] == str(len(answer.body))
    assert answer.error["code"] == "invalid_api_key"


@pytest.mark.anyio
@pytest.mark.parametrize(
    "where", [{}, {"root_path": "/llm", "path": "/llm/v1/messages"}, {"root_path": "/llm", "path": "/v1/messages"}]
)
async def test_anthropic_clients_get_their_own_form(ask: Ask, guarded: Any, where: dict[str, str]) -> None:
    """On /v1/messages, below a mount point too, the refusal is one that Anthropic's clients read."""
    answer = await ask(guarded, **{"path": "/v1/messages", "headers": [(b"x-api-key", b"sk-wrong")], **where})
    assert answer.status == 401
    assert json.loads(answer.body)["type"] == "error"
    assert answer.error["type"] == "authentication_error"


@pytest.mark.anyio
async def test_a_broken_store_is_503_and_the_environment_key_works(
    ask: Ask, hello: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While tokens cannot be read clients are asked to try again soon, and the operator's key goes on working."""
    monkeypatch.setenv("FREEGPT_API_KEY", KEY)
    await anyio.Path(TOKEN_FILE).write_text("{ broken")
    guarded = BearerTokenMiddleware(hello, usage="off")
    answer = await ask(guarded, headers=bearer("sk-perhaps-valid"))
    assert answer.status == 503
    assert answer.headers["retry-after"] == str(RETRY_AFTER)
    assert answer.error["code"] == "service_unavailable"
    assert (await ask(guarded)).status == 401
    for headers in (bearer(KEY), [*bearer("sk-perhaps-valid"), (b"x-api-key", KEY.encode())]):
        answer = await ask(guarded, headers=headers)
        assert json.loads(answer.body) == {
            "user": "environment",
            "identity": "environment",
            "scopes": ["authenticated"],
        }


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("extensions", [{}, EXTENSIONS])
async def test_the_secret_is_never_echoed(
    ask: Ask, caplog: pytest.LogCaptureFixture, kind: str, extensions: dict[str, Any]
) -> None:
    """No part of what a client presented comes back to it or goes to the log."""
    caplog.set_level(logging.DEBUG)
    guarded = BearerTokenMiddleware(NEVER, store=MemoryTokenStore())
    text = "SeCrEtSeCrEt"
    for headers in (
        bearer(text),
        [(b"x-api-key", text.encode())],
        bearer(text) * 2,
        [(b"authorization", text.encode())],
    ):
        answer = await ask(
            guarded, type=kind, headers=headers, extensions=extensions, subprotocols=[SUBPROTOCOL + text]
        )
        assert "SeCr" not in repr(answer.messages)
    assert "refused" in caplog.text
    assert "SeCr" not in caplog.text + repr([vars(record) for record in caplog.records])


# The unread body


@pytest.fixture
def upload() -> Callable[..., Awaitable[list[str]]]:
    """Return a function that refuses an upload and returns what happened, in order."""

    async def run(app: Any, receive: Callable[[], Awaitable[Any]]) -> list[str]:
        events: list[str] = []

        async def listen() -> Any:
            events.append("receive")
            return await receive()

        async def send(message: Any) -> None:
            more = message.get("more_body")
            events.append(f"start {message['status']}" if more is None else f"{len(message['body']) > 0} {more}")

        scope = {"type": "http", "method": "POST", "path": "/v1/files", "headers": []}
        with anyio.fail_after(5):
            await app(scope, listen, send)
        return events

    return run


ANSWERED = ["start 401", "True True"]
ENDED = ["False False"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "last", [{"type": "http.request", "body": b"end"}, {"type": "http.request"}, {"type": "http.disconnect"}]
)
async def test_an_upload_is_answered_at_once_and_then_dropped(upload: Any, guarded: Any, last: Any) -> None:
    """A client that is still uploading has its whole answer before a byte of it is read, and no reset afterwards."""
    messages = [{"type": "http.request", "body": b"x" * 1000, "more_body": True}] * 3 + [last]

    async def receive() -> Any:
        return messages.pop(0)

    assert await upload(guarded, receive) == [*ANSWERED, *["receive"] * 4, *ENDED]
    assert messages == []


@pytest.mark.anyio
async def test_an_endless_upload_is_given_up(upload: Any, guarded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can keep a server busy with the body of a refused request."""
    monkeypatch.setattr(middleware, "BODY_LIMIT", 10_000)

    async def receive() -> Any:
        await anyio.lowlevel.checkpoint()
        return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

    assert await upload(guarded, receive) == [*ANSWERED, *["receive"] * 10, *ENDED]


@pytest.mark.anyio
async def test_a_stalled_upload_is_given_up(upload: Any, guarded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends nothing more does not hold its connection for ever."""
    monkeypatch.setattr(middleware, "BODY_TIMEOUT", 0.05)
    assert await upload(guarded, anyio.sleep_forever) == [*ANSWERED, "receive", *ENDED]


def test_the_limits_are_those_of_the_guide() -> None:
    """A refused upload is received for at most 64 MiB or 5 seconds."""
    assert middleware.BODY_LIMIT == 64 * 1024 * 1024
    assert middleware.BODY_TIMEOUT == 5.0


# WebSockets


def websocket_app(store: Any) -> TestClient:
    """Return a client of an application that tells a WebSocket's caller who it is and what the application sees."""

    async def echo(websocket: WebSocket) -> None:
        offered = websocket.scope["subprotocols"]
        await websocket.accept(subprotocol=offered[0] if offered else None)
        header = websocket.headers.get("sec-websocket-protocol")
        await websocket.send_json([websocket.user.display_name, offered, header])
        await websocket.close()

    routes = [WebSocketRoute("/v1/realtime", echo)]
    return TestClient(Starlette(routes=routes, middleware=[Middleware(BearerTokenMiddleware, store=store)]))


@pytest.mark.parametrize("others", [[], ["realtime"], ["realtime", "openai-beta.realtime-v1"]])
def test_the_key_subprotocol_is_taken_out(store: MemoryTokenStore, secret: str, others: list[str]) -> None:
    """A browser's token in a subprotocol lets it in; the application neither sees it nor can echo it."""
    subprotocols = [*others[:1], SUBPROTOCOL + secret, *others[1:]]
    with websocket_app(store).websocket_connect("/v1/realtime", subprotocols=subprotocols) as session:
        assert session.accepted_subprotocol == (others[0] if others else None)
        assert session.receive_json() == ["a-token", others, ", ".join(others) or None]


@pytest.mark.parametrize("name", ["authorization", "x-api-key", "api-key"])
def test_a_websocket_is_let_in_by_a_header(store: MemoryTokenStore, secret: str, name: str) -> None:
    """A WebSocket client that can set headers uses the same ones as any other."""
    headers = {name: f"Bearer {secret}" if name == "authorization" else secret}
    with websocket_app(store).websocket_connect("/v1/realtime", headers=headers) as session:
        assert session.receive_json() == ["a-token", [], None]


@pytest.mark.parametrize("subprotocols", [[], ["realtime"], [SUBPROTOCOL + "sk-wrong"], [SUBPROTOCOL + ""]])
def test_a_websocket_is_refused_before_the_upgrade(store: MemoryTokenStore, subprotocols: list[str]) -> None:
    """A refused WebSocket client reads a real 401 with its reason, where the server can send one."""
    session = websocket_app(store).websocket_connect("/v1/realtime", subprotocols=subprotocols)
    with pytest.raises(WebSocketDenialResponse) as caught:
        session.__enter__()
    assert caught.value.status_code == 401
    assert caught.value.headers["www-authenticate"].startswith(CHALLENGE)
    assert caught.value.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.anyio
@pytest.mark.parametrize("extensions", [{}, None, {"other": {}}])
async def test_a_websocket_is_closed_where_no_response_can_be_sent(
    ask: Ask, store: MemoryTokenStore, extensions: dict[str, Any] | None
) -> None:
    """On a server without the extension the handshake is closed with 1008, policy violation."""
    guarded = BearerTokenMiddleware(NEVER, store=store)
    answer = await ask(guarded, type="websocket", extensions=extensions)
    assert answer.messages == [{"type": "websocket.close", "code": 1008}]
    assert (await ask(guarded, type="websocket")).messages == answer.messages


@pytest.mark.anyio
async def test_two_secret_subprotocols_are_a_400(ask: Ask, store: MemoryTokenStore, secret: str) -> None:
    """Two tokens in one carrier are refused, though one of them is valid."""
    guarded = BearerTokenMiddleware(NEVER, store=store)
    subprotocols = [SUBPROTOCOL + secret, SUBPROTOCOL + "sk-2"]
    answer = await ask(guarded, type="websocket", extensions=EXTENSIONS, subprotocols=subprotocols)
    assert [message["type"] for message in answer.messages] == [
        "websocket.http.response.start",
        "websocket.http.response.body",
    ]
    assert answer.status == 400
    assert answer.messages[1]["more_body"] is False


# The modes


@pytest.mark.anyio
async def test_open_mode_does_not_look_at_credentials(ask: Ask, caplog: pytest.LogCaptureFixture) -> None:
    """Clients of an open server send all kinds of keys; every one of them passes, as nobody."""
    guarded = BearerTokenMiddleware(plain)
    assert "open mode" in caplog.text
    for headers in ([], bearer("DUMMY_KEY"), bearer("a") * 2, bearer("x" * 9000), [(b"authorization", b"\xff\x00")]):
        answer = await ask(guarded, headers=headers)
        assert answer.status == 200
        assert isinstance(answer.scope["user"], UnauthenticatedUser)
        assert answer.scope["auth"].scopes == []


@pytest.mark.anyio
async def test_environment_mode(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an environment key and no tokens, that key works and nothing else."""
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    guarded = BearerTokenMiddleware(plain)
    assert (await ask(guarded, headers=bearer(KEY))).status == 200
    for headers in ([], bearer(KEY + "x"), bearer(KEY[:-1]), bearer(KEY.upper())):
        assert (await ask(guarded, headers=headers)).status == 401


@pytest.mark.anyio
async def test_only_one_environment_key_is_accepted(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both variables are set, FREEGPT_API_KEY is the key and OPENAI_API_KEY is not."""
    monkeypatch.setenv("FREEGPT_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-the-key-of-the-upstream")
    guarded = BearerTokenMiddleware(plain)
    assert (await ask(guarded, headers=bearer(KEY))).status == 200
    assert (await ask(guarded, headers=bearer("sk-the-key-of-the-upstream"))).status == 401


@pytest.mark.anyio
async def test_the_environment_key_from_a_file(ask: Ask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A Docker secret is the environment key."""
    (tmp_path / "docker-secret").write_text(f"{KEY}\n")
    monkeypatch.setenv("FREEGPT_API_KEY_FILE", "docker-secret")
    guarded = BearerTokenMiddleware(plain)
    assert (await ask(guarded, headers=bearer(KEY))).status == 200
    assert (await ask(guarded, headers=bearer("docker-secret"))).status == 401


@pytest.mark.parametrize("name", ["FREEGPT_API_KEY", "OPENAI_API_KEY", "FREEGPT_API_KEY_FILE"])
def test_a_key_that_is_set_but_empty_stops_the_server(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A typing error in a compose file stops the server instead of opening it."""
    monkeypatch.setenv(name, " ")
    with pytest.raises(ConfigurationError, match=name):
        BearerTokenMiddleware(plain)


def test_required_stops_an_open_server(monkeypatch: pytest.MonkeyPatch, keep: Keep) -> None:
    """A server that must be protected does not start unprotected; an argument wins over its variable."""
    with pytest.raises(ConfigurationError, match="authentication is required"):
        BearerTokenMiddleware(plain, required=True)
    monkeypatch.setenv("FREEGPT_AUTH_REQUIRED", "1")
    with pytest.raises(ConfigurationError, match="authentication is required"):
        BearerTokenMiddleware(plain)
    BearerTokenMiddleware(plain, required=False)
    keep(FileTokenStore(TOKEN_FILE))
    BearerTokenMiddleware(plain, usage="off")


@pytest.mark.anyio
@pytest.mark.parametrize("with_key", [True, False])
async def test_token_file_mode(
    ask: Ask, keep: Keep, monkeypatch: pytest.MonkeyPatch, hello: Any, *, with_key: bool
) -> None:
    """With a token file every active token works, and the environment key only if it is set."""
    if with_key:
        monkeypatch.setenv("FREEGPT_API_KEY", KEY)
    _, first = keep(FileTokenStore(TOKEN_FILE), "first")
    token, second = keep(FileTokenStore(TOKEN_FILE), "second")
    guarded = BearerTokenMiddleware(hello, usage="off")
    assert (await ask(guarded, headers=bearer(first))).status == 200
    answer = await ask(guarded, headers=bearer(second))
    assert json.loads(answer.body) == {"user": "second", "identity": token.id, "scopes": ["authenticated"]}
    assert (await ask(guarded, headers=bearer(KEY))).status == (200 if with_key else 401)
    assert (await ask(guarded)).status == 401


@pytest.mark.anyio
async def test_open_closes_when_tokens_appear_and_never_opens_again(
    ask: Ask, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token closes a serving open server at once and for good, also after its file is gone."""
    monkeypatch.setattr(file, "FRESHNESS", 0.0)  # each request looks at the file
    guarded = BearerTokenMiddleware(plain, usage="off")
    assert (await ask(guarded)).status == 200
    await anyio.Path(TOKEN_FILE).write_text("{}")
    assert (await ask(guarded)).status == 200  # an empty object says nothing
    await anyio.Path(TOKEN_FILE).unlink()
    _, secret = keep(FileTokenStore(TOKEN_FILE))
    assert (await ask(guarded)).status == 401
    assert (await ask(guarded, headers=bearer(secret))).status == 200
    await anyio.Path(TOKEN_FILE).unlink()
    assert (await ask(guarded, headers=bearer(secret))).status == 401
    assert (await ask(guarded)).status == 401
    await anyio.Path(TOKEN_FILE).write_text("{}")
    assert (await ask(guarded)).status == 401


@pytest.mark.anyio
async def test_a_server_that_closes_meanwhile_refuses(
    ask: Ask, store: MemoryTokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that was on its way in when another one found the first token is refused."""
    guarded = BearerTokenMiddleware(NEVER, store=store)
    authenticator = guarded._authenticator
    authenticator.mode = AuthMode.OPEN
    # What another request's thread does, between this one's first look at the mode and its second.
    monkeypatch.setattr(authenticator, "peek_open", authenticator.resolve_open)
    assert (await ask(guarded)).status == 401
    assert authenticator.mode is AuthMode.TOKEN_FILE


@pytest.mark.anyio
async def test_tokens_that_appear_in_environment_mode_work_at_once(
    ask: Ask, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token made while a server runs on its key alone needs no restart, and the key goes on working."""
    monkeypatch.setenv("FREEGPT_API_KEY", KEY)
    guarded = BearerTokenMiddleware(plain, usage="off")
    _, secret = keep(FileTokenStore(TOKEN_FILE))
    assert (await ask(guarded, headers=bearer(secret))).status == 200
    assert (await ask(guarded, headers=bearer(KEY))).status == 200
    assert (await ask(guarded)).status == 401


@pytest.mark.anyio
async def test_a_revoked_token_is_refused_when_revoke_has_returned(ask: Ask, keep: Keep) -> None:
    """Once the operator's command is back, the token is refused; its neighbour is not."""
    store = FileTokenStore(TOKEN_FILE)
    token, secret = keep(store)
    _, neighbour = keep(store)
    guarded = BearerTokenMiddleware(plain, usage="off")
    assert (await ask(guarded, headers=bearer(secret))).status == 200
    store.revoke(token.id, datetime.now(UTC))
    assert (await ask(guarded, headers=bearer(secret))).status == 401
    assert (await ask(guarded, headers=bearer(neighbour))).status == 200


@pytest.mark.anyio
@pytest.mark.parametrize("as_path", [True, False])
async def test_the_store_is_named_by_argument_or_variable(
    ask: Ask, keep: Keep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, as_path: bool
) -> None:
    """Tokens are where the argument says, else where FREEGPT_AUTH_STORE says."""
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    _, secret = keep(FileTokenStore(first))
    _, other = keep(FileTokenStore(second))
    monkeypatch.setenv("FREEGPT_AUTH_STORE", str(second))
    by_argument = BearerTokenMiddleware(plain, store=first if as_path else str(first), usage="off")
    by_variable = BearerTokenMiddleware(plain, usage="off")
    assert [(await ask(by_argument, headers=bearer(s))).status for s in (secret, other)] == [200, 401]
    assert [(await ask(by_variable, headers=bearer(s))).status for s in (secret, other)] == [401, 200]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "root_path", "status"),
    [
        ("/health", "", 200),
        ("/health/", "", 401),
        ("/healthsecret", "", 401),
        ("/health/../v1/models", "", 401),
        ("//health", "", 401),
        ("/HEALTH", "", 401),
        ("/Health", "", 401),
        ("/v1/health", "", 401),
        ("health", "", 401),
        ("", "", 401),
        ("/", "", 401),
        ("/health%2f", "", 401),
        ("/health\x00", "", 401),
        ("/health;x", "", 401),
        ("/health?x", "", 401),
        ("/api/health", "/api", 200),
        ("/health", "/api", 200),
        ("/api/health/", "/api", 401),
        ("/apihealth", "/api", 401),
        ("/apix/health", "/api", 401),
        ("/api/api/health", "/api", 401),
        ("/api", "/api", 401),
        ("/api/health", "", 401),
    ],
)
async def test_public_paths_are_exact(ask: Ask, path: str, root_path: str, status: int) -> None:
    """A public path opens itself and no other, with or without a mount point."""
    guarded = BearerTokenMiddleware(plain, store=MemoryTokenStore(), public_paths=["/health"])
    assert (await ask(guarded, path=path, root_path=root_path)).status == status
    assert (await ask(guarded, path="/health")).status == 200  # servers may leave root_path out


@pytest.mark.anyio
async def test_no_header_makes_a_path_public(ask: Ask) -> None:
    """The path that counts is the one that is served, whatever a client says in its headers."""
    guarded = BearerTokenMiddleware(NEVER, store=MemoryTokenStore(), public_paths=["/health"])
    names = [b"host", b"x-original-url", b"x-rewrite-url", b"x-forwarded-prefix", b"x-forwarded-path", b"referer"]
    answer = await ask(guarded, headers=[(name, b"/health") for name in names], query_string=b"path=/health")
    assert answer.status == 401


@pytest.mark.anyio
async def test_a_public_path_needs_no_token_and_knows_nobody(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, store: MemoryTokenStore, secret: str
) -> None:
    """On a public path credentials are not looked at, neither good nor bad ones."""
    monkeypatch.setenv("FREEGPT_AUTH_PUBLIC_PATHS", "/health, /metrics")
    guarded = BearerTokenMiddleware(plain, store=store)
    for headers in ([], bearer(secret), bearer("sk-wrong"), bearer("a") * 2):
        answer = await ask(guarded, path="/metrics", headers=headers)
        assert answer.status == 200
        assert isinstance(answer.scope["user"], UnauthenticatedUser)


# The log


def test_the_start_is_one_line(monkeypatch: pytest.MonkeyPatch, keep: Keep, caplog: pytest.LogCaptureFixture) -> None:
    """A server says once how it starts, never with its key."""
    caplog.set_level(logging.INFO, "freegpt_auth")
    monkeypatch.setenv("FREEGPT_API_KEY", KEY)
    _, secret = keep(FileTokenStore(TOKEN_FILE))
    BearerTokenMiddleware(plain, usage="off")
    [record] = caplog.records
    assert record.getMessage() == (
        f"token-file mode: 1 active tokens from {Path(TOKEN_FILE).absolute()}, "
        "and the environment key from FREEGPT_API_KEY"
    )
    assert KEY not in caplog.text
    assert secret not in caplog.text


@pytest.mark.anyio
async def test_a_refusal_is_logged_with_its_fields(
    ask: Ask, store: MemoryTokenStore, keep: Keep, caplog: pytest.LogCaptureFixture
) -> None:
    """An operator can filter refusals by client, path, reason and token id, and read them in one line."""
    caplog.set_level(logging.INFO, "freegpt_auth")
    guarded = BearerTokenMiddleware(NEVER, store=store)
    token, secret = keep(store)
    store.revoke(token.id, datetime.now(UTC))
    caplog.clear()
    await ask(guarded, path="/v1/models", headers=bearer(secret), client=("192.0.2.7", 1))
    await ask(guarded, path="/v1/a\n\x1b[31mforged", client=None)
    first, second = caplog.records
    assert (first.name, first.levelname) == ("freegpt_auth", "INFO")
    assert first.getMessage() == f"refused 192.0.2.7 /v1/models: revoked ({token.id})"
    assert (first.client, first.path, first.reason, first.token_id) == (
        "192.0.2.7",
        "/v1/models",
        "revoked",
        token.id,
    )
    assert second.getMessage() == r"refused unknown /v1/a\n\x1b[31mforged: missing"
    assert (second.client, second.reason, second.token_id) == ("unknown", "missing", None)


@pytest.mark.anyio
@pytest.mark.parametrize("address", ["192.0.2.7\x9b31m", "192.0.2.7\x85forged", "192.0.2.7\r\nforged"])
async def test_a_forwarded_address_cannot_forge_a_log_line(
    ask: Ask, store: MemoryTokenStore, caplog: pytest.LogCaptureFixture, address: str
) -> None:
    """A client address, which behind a proxy is any text from X-Forwarded-For, is escaped as the path is."""
    caplog.set_level(logging.INFO, "freegpt_auth")
    await ask(BearerTokenMiddleware(NEVER, store=store), client=(address, 0))
    assert caplog.records[-1].getMessage().isprintable()


# Lifespan and usage


@pytest.mark.anyio
@pytest.mark.parametrize("ending", ["lifespan.shutdown.complete", "lifespan.shutdown.failed"])
async def test_usage_is_written_before_the_shutdown_is_complete(ask: Ask, keep: Keep, ending: str) -> None:
    """The last uses before a graceful stop are on disk when the server learns that it may exit."""
    token, secret = keep(FileTokenStore(TOKEN_FILE))
    written: list[tuple[str, int]] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await plain(scope, receive, send)
            return
        assert (await receive())["type"] == "lifespan.startup"
        await send({"type": "lifespan.startup.complete"})
        assert (await receive())["type"] == "lifespan.shutdown"
        await send({"type": ending})

    async def send(message: Any) -> None:
        usage = await to_thread.run_sync(read_usage, "api_tokens.usage.db")
        written.append((message["type"], usage[token.id].use_count if usage else 0))

    guarded = BearerTokenMiddleware(application)
    for headers in (bearer(secret), bearer(secret), bearer("sk-wrong")):
        await ask(guarded, headers=headers)
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive() -> Any:
        return messages.pop(0)

    await guarded({"type": "lifespan"}, receive, send)
    assert written == [("lifespan.startup.complete", 0), (ending, 2)]


@pytest.mark.anyio
async def test_only_accepted_tokens_are_counted(
    ask: Ask, keep: Keep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Refused requests, the environment key and public paths write nothing anywhere."""
    monkeypatch.setenv("FREEGPT_API_KEY", KEY)
    monkeypatch.setenv("FREEGPT_AUTH_USAGE", str(tmp_path / "counts.db"))
    token, secret = keep(FileTokenStore(TOKEN_FILE))
    guarded = BearerTokenMiddleware(plain, public_paths=["/health"])
    for path, headers in [("/", []), ("/", bearer("sk-wrong")), ("/", bearer(KEY)), ("/health", bearer(secret))]:
        await ask(guarded, path=path, headers=headers)
    await to_thread.run_sync(guarded._usage.flush)
    assert not (tmp_path / "counts.db").exists()
    await ask(guarded, headers=bearer(secret))
    await to_thread.run_sync(guarded._usage.flush)
    usage = await to_thread.run_sync(read_usage, "counts.db")
    assert {key: value.use_count for key, value in usage.items()} == {token.id: 1}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "api_tokens.usage.db"),
        ({"store": "mine.json"}, "mine.usage.db"),
        ({"usage": "counts.db"}, "counts.db"),
        ({"usage": "off"}, None),
        ({"store": MemoryTokenStore()}, None),
        ({"store": MemoryTokenStore(), "usage": "counts.db"}, "counts.db"),
    ],
)
def test_where_usage_goes(tmp_path: Path, arguments: dict[str, Any], expected: str | None) -> None:
    """Usage is beside the token file, where it was put, or off; with a verifier of one's own it is off."""
    recorder = BearerTokenMiddleware(plain, **arguments)._usage
    assert (recorder and recorder.path) == (expected and str(tmp_path / expected))


def test_how_often_usage_is_written() -> None:
    """The interval is the operator's to choose."""
    recorder = BearerTokenMiddleware(plain, usage_interval=0.5)._usage
    assert recorder is not None
    assert recorder._interval == 0.5


def test_a_lifespan_is_passed_on(store: MemoryTokenStore, secret: str) -> None:
    """The application's own start-up and shutdown run, and its state reaches its requests."""
    seen: list[str] = []

    @asynccontextmanager
    async def lifespan(_app: Any) -> Any:
        seen.append("up")
        yield {"model": "loaded"}
        seen.append("down")

    routes = [Route("/", lambda request: JSONResponse(request.state.model))]
    guarded = BearerTokenMiddleware(Starlette(routes=routes, lifespan=lifespan), store=store)
    with TestClient(guarded, headers={"authorization": f"Bearer {secret}"}) as client:
        assert seen == ["up"]
        assert client.get("/").json() == "loaded"
    assert seen == ["up", "down"]


@pytest.mark.anyio
async def test_an_error_in_the_lifespan_stays_what_it_is(ask: Ask) -> None:
    """A server sees the application's own error, in no group and under no other name."""

    async def application(_scope: Any, _receive: Any, _send: Any) -> None:
        raise LookupError("no model")

    with pytest.raises(LookupError, match="no model"):
        await ask(BearerTokenMiddleware(application), type="lifespan")


@pytest.mark.anyio
async def test_nothing_depends_on_the_lifespan(ask: Ask, keep: Keep) -> None:
    """Under a server that sends no lifespan, tokens work and their usage is still written."""
    token, secret = keep(FileTokenStore(TOKEN_FILE))
    guarded = BearerTokenMiddleware(plain)
    assert (await ask(guarded, headers=bearer(secret))).status == 200
    await to_thread.run_sync(guarded._usage.flush)
    assert list(await to_thread.run_sync(read_usage, guarded._usage.path)) == [token.id]


# Threads and concurrency


class Slow:
    """A verifier that knows nothing by heart, and remembers which threads it was asked from."""

    def __init__(self, digest: bytes, token: Any) -> None:
        self.known = {digest: token}
        self.threads: set[int] = set()

    def peek(self, _digest: bytes) -> Any:
        """Never know."""
        return UNRESOLVED

    def resolve(self, digest: bytes) -> Any:
        """Look it up."""
        self.threads.add(threading.get_ident())
        return self.known.get(digest)

    def survey(self) -> Survey:
        """Say that there are tokens."""
        return Survey(configured=True, active=1, source="a slow store")


@pytest.mark.anyio
async def test_what_memory_cannot_tell_is_resolved_in_a_thread(ask: Ask) -> None:
    """A store that blocks does not hold up the event loop."""
    slow = Slow(digest_of(LIVE), LIVE_TOKEN)
    guarded = BearerTokenMiddleware(plain, store=slow)
    assert (await ask(guarded, headers=bearer(LIVE))).status == 200
    assert (await ask(guarded, headers=bearer("sk-wrong"))).status == 401
    assert slow.threads
    assert threading.get_ident() not in slow.threads


@pytest.mark.anyio
async def test_one_reading_serves_many_requests(ask: Ask, keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the file has changed, fifty requests at once wait for one reading of it, and all are decided on it."""
    store = FileTokenStore(TOKEN_FILE)
    keep(store)
    guarded = BearerTokenMiddleware(plain, usage="off")
    _, secret = keep(store)
    readings: list[str] = []
    read_file = disk.read_file

    def counted(path: str) -> Any:
        readings.append(path)
        return read_file(path)

    monkeypatch.setattr(disk, "read_file", counted)
    statuses: list[int] = []

    async def one(headers: Headers) -> None:
        statuses.append((await ask(guarded, headers=headers)).status)

    async with anyio.create_task_group() as group:
        for _ in range(25):
            group.start_soon(one, bearer(secret))
            group.start_soon(one, bearer("sk-wrong"))
    assert sorted(statuses) == [200] * 25 + [401] * 25
    assert len(readings) == 1


@pytest.mark.anyio
async def test_authentication_works_while_the_application_holds_all_threads(ask: Ask) -> None:
    """An application that keeps every worker thread busy does not hold up who may enter."""
    guarded = BearerTokenMiddleware(plain, store=Slow(digest_of(LIVE), LIVE_TOKEN))
    threads = to_thread.current_default_thread_limiter()
    release = threading.Event()
    async with anyio.create_task_group() as group:
        for _ in range(int(threads.total_tokens)):
            group.start_soon(to_thread.run_sync, release.wait)
        while threads.available_tokens:
            await anyio.lowlevel.checkpoint()
        try:
            with anyio.fail_after(5):
                statuses = [(await ask(guarded, headers=bearer(secret))).status for secret in (LIVE, "sk-wrong")]
        finally:
            release.set()
    assert statuses == [200, 401]


@pytest.mark.anyio
async def test_one_middleware_serves_several_event_loops(ask: Ask, anyio_backend: str) -> None:
    """A test client, or a server with a loop for each thread, may share one middleware."""
    guarded = BearerTokenMiddleware(plain, store=Slow(digest_of(LIVE), LIVE_TOKEN))

    def elsewhere() -> int:
        return int(anyio.run(lambda: ask(guarded, headers=bearer(LIVE)), backend=anyio_backend).status)

    assert (await ask(guarded, headers=bearer(LIVE))).status == 200
    assert await to_thread.run_sync(elsewhere) == 200


# What the application sees


@pytest.mark.anyio
async def test_streams_are_not_buffered(store: MemoryTokenStore, secret: str) -> None:
    """Each chunk is on its way before the next one is made."""
    sent: list[bytes] = []
    seen: list[int] = []

    async def chunks() -> Any:
        for number in range(5):
            seen.append(len(sent))
            yield f"data: {number}\n\n".encode()

    async def send(message: Any) -> None:
        sent.append(message.get("body", b"start"))

    guarded = BearerTokenMiddleware(StreamingResponse(chunks()), store=store)
    scope = {"type": "http", "asgi": {"spec_version": "2.4"}, "method": "POST", "path": "/", "headers": bearer(secret)}
    await guarded(scope, anyio.sleep_forever, send)
    assert seen == [1, 2, 3, 4, 5]


@pytest.mark.anyio
async def test_the_disconnect_reaches_the_application(ask: Ask, store: MemoryTokenStore, secret: str) -> None:
    """An application learns at once that its client has gone, and can stop generating."""
    gone: list[bool] = []

    async def application(scope: Any, receive: Any, _send: Any) -> None:
        request = Request(scope, receive)
        assert await request.body() == b"prompt"
        gone.append(await request.is_disconnected())

    await ask(
        BearerTokenMiddleware(application, store=store),
        headers=bearer(secret),
        incoming=[{"type": "http.request", "body": b"prompt"}, {"type": "http.disconnect"}],
    )
    assert gone == [True]


def who(request: Request) -> JSONResponse:
    """Tell a caller what Starlette's conventions say about it."""
    return JSONResponse([request.user.is_authenticated, request.user.display_name, request.auth.scopes])


@requires("authenticated")
def members(request: Request) -> JSONResponse:
    """Answer to authenticated callers."""
    return JSONResponse(request.user.identity)


@requires(["authenticated", "admin"])
def admins(request: Request) -> JSONResponse:
    """Answer to callers with a scope."""
    return JSONResponse(request.user.identity)


ROUTES = [Route("/who", who), Route("/members", members), Route("/admins", admins)]


def test_starlettes_conventions_work(store: MemoryTokenStore) -> None:
    """request.user, request.auth.scopes and @requires work as Starlette's guide says."""
    for name, scopes in [("reader", ("read",)), ("boss", ("read", "admin"))]:
        token, _ = issue(name, now=datetime.now(UTC))
        fields = {field: getattr(token, field) for field in ("id", "name", "prefix", "created_at")}
        store.add(digest_of(f"sk-{name}"), type(token)(**fields, scopes=scopes))
    client = TestClient(Starlette(routes=ROUTES, middleware=[Middleware(BearerTokenMiddleware, store=store)]))
    reader, boss = {"authorization": "Bearer sk-reader"}, {"authorization": "Bearer sk-boss"}
    assert client.get("/who", headers=reader).json() == [True, "reader", ["authenticated", "read"]]
    assert client.get("/members", headers=reader).status_code == 200
    assert client.get("/admins", headers=reader).status_code == 403
    assert client.get("/admins", headers=boss).status_code == 200
    assert client.get("/members").status_code == 401


def test_starlettes_conventions_work_on_an_open_server() -> None:
    """On an open server nobody is authenticated, and what requires it stays shut."""
    client = TestClient(Starlette(routes=ROUTES, middleware=[Middleware(BearerTokenMiddleware)]))
    assert client.get("/who", headers={"authorization": "Bearer DUMMY"}).json() == [False, "", []]
    assert client.get("/members").status_code == 403


def test_fastapi(store: MemoryTokenStore, secret: str) -> None:
    """One line protects a FastAPI application, its documentation and its unknown paths included."""
    application = fastapi.FastAPI()
    application.add_middleware(BearerTokenMiddleware, store=store)

    @application.post("/v1/chat/completions")
    async def complete(request: Request, question: dict[str, str]) -> dict[str, str]:
        return {"caller": request.user.display_name, **question}

    client = TestClient(application)
    valid = {"authorization": f"Bearer {secret}"}
    answer = client.post("/v1/chat/completions", json={"ask": "why"}, headers=valid)
    assert answer.json() == {"caller": "a-token", "ask": "why"}
    assert client.post("/v1/chat/completions", json={"ask": "why"}).status_code == 401
    assert [client.get(path).status_code for path in ("/docs", "/openapi.json", "/absent")] == [401] * 3
    assert client.get("/absent", headers=valid).status_code == 404


@pytest.mark.parametrize("root_path", ["", "/proxy"])
def test_mounted_below_a_path(store: MemoryTokenStore, secret: str, root_path: str) -> None:
    """Mounted, the middleware guards what is below it, by paths as its application knows them, and nothing else."""
    inner = Starlette(routes=[*ROUTES, Route("/health", lambda _request: JSONResponse("well"))])
    guarded = BearerTokenMiddleware(inner, store=store, public_paths=["/health"])
    outer = Starlette(routes=[Route("/health2", lambda _request: JSONResponse("outside")), Mount("/llm", guarded)])
    client = TestClient(outer, root_path=root_path)
    assert client.get(f"{root_path}/health2").json() == "outside"
    assert client.get(f"{root_path}/llm/health").json() == "well"
    assert client.get(f"{root_path}/llm/members").status_code == 401
    assert client.get(f"{root_path}/llm/llm/health").status_code == 401
    valid = {"authorization": f"Bearer {secret}"}
    assert client.get(f"{root_path}/llm/members", headers=valid).status_code == 200


def test_servers_take_it_for_an_asgi_3_application(store: MemoryTokenStore) -> None:
    """Uvicorn and hypercorn tell the kinds of applications apart by whether the call is a coroutine function."""
    assert inspect.iscoroutinefunction(BearerTokenMiddleware.__call__)
    assert list(inspect.signature(BearerTokenMiddleware(plain, store=store)).parameters) == ["scope", "receive", "send"]


@pytest.mark.anyio
async def test_no_object_holds_a_secret(ask: Ask, keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    """After requests of all kinds, neither the middleware nor what it is made of holds a secret."""
    monkeypatch.setenv("FREEGPT_API_KEY", KEY)
    _, secret = keep(FileTokenStore(TOKEN_FILE))
    guarded = BearerTokenMiddleware(plain)
    for headers in (bearer(secret), bearer(KEY), bearer("sk-wrong")):
        await ask(guarded, headers=headers)
    authenticator = guarded._authenticator
    parts = [guarded, authenticator, authenticator._verifier, guarded._usage]
    seen = repr([(part, vars(part)) for part in parts])
    assert "api_tokens.json" in seen
    assert not any(text in seen for text in (secret, KEY, "sk-wrong", secret[20:]))
