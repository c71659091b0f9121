"""The verified credential is gone before anything else sees it: the application, layers outside, error trackers."""

from __future__ import annotations

import logging
import subprocess
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.authentication import UnauthenticatedUser

from freegpt_auth import UNRESOLVED, BearerTokenMiddleware, MemoryTokenStore
from freegpt_auth.guard.callers import MARK, Caller, caller_of
from freegpt_auth.guard.credentials import SUBPROTOCOL
from freegpt_auth.tokens import digest_of, issue
from tests.helpers.asgi import ask, bearer, plain

if TYPE_CHECKING:
    from tests.helpers.asgi import Headers

TOKEN, SECRET = issue("one", now=datetime.now(UTC))
SECOND_TOKEN, SECOND = issue("two", now=datetime.now(UTC))
[BEARER] = bearer(SECRET)
UPSTREAM = (b"x-api-key", b"sk-of-the-upstream")
HOST = (b"host", b"chat.test")

pytestmark = pytest.mark.anyio


@pytest.fixture
def store() -> MemoryTokenStore:
    """Return a store with two tokens."""
    store = MemoryTokenStore()
    store.add(digest_of(SECRET), TOKEN)
    store.add(digest_of(SECOND), SECOND_TOKEN)
    return store


@pytest.mark.parametrize(
    ("headers", "left"),
    [
        ([HOST, BEARER], [HOST]),
        ([(b"authorization", f"bearer  {SECRET} ".encode()), HOST], [HOST]),
        ([HOST, BEARER, UPSTREAM], [HOST, UPSTREAM]),
        ([(b"authorization", b"Bearer sk-of-the-upstream"), (b"x-api-key", SECRET.encode())], None),
        ([(b"api-key", SECRET.encode()), HOST, BEARER], [HOST]),
        ([(b"x-api-key", SECOND.encode()), BEARER, HOST], [HOST]),
        ([BEARER, (b"x-api-key", f"Bearer {SECRET}x".encode())], [(b"x-api-key", f"Bearer {SECRET}x".encode())]),
    ],
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_verified_headers_leave_the_scope(
    store: MemoryTokenStore, kind: str, headers: Headers, left: Headers | None
) -> None:
    """Each header with a valid secret goes, at the first request and at later ones; other credentials stay."""
    guarded = BearerTokenMiddleware(plain, store=store)
    for _ in range(2):
        sent = [*headers]
        answer = await ask(guarded, type=kind, headers=sent, subprotocols=[])
        assert answer.scope["headers"] == (headers[:1] if left is None else left)
        assert answer.scope["headers"] is sent, "layers outside that share the list lose the secret too"


async def test_subprotocols_leave_the_scope(store: MemoryTokenStore) -> None:
    """A verified subprotocol goes, also beside a valid header of a known caller; a foreign one stays."""
    guarded = BearerTokenMiddleware(plain, store=store)
    gone = ["realtime"]
    for secret, header, left in ((SECRET, [], gone), (SECRET, [BEARER], gone), ("sk-upstream", [BEARER], None)):
        offers = ["realtime", SUBPROTOCOL + secret]
        offered = (b"sec-websocket-protocol", ", ".join(offers).encode())
        answer = await ask(guarded, type="websocket", headers=[*header, offered], subprotocols=[*offers])
        assert answer.scope["subprotocols"] == (left or offers)
        assert answer.scope["headers"] == [(offered[0], b"realtime") if left else offered]


async def test_headers_leave_if_memory_is_no_help() -> None:
    """A secret that only the store itself could verify is removed all the same."""

    class Forgetful(MemoryTokenStore):
        def peek(self, _digest: bytes) -> Any:
            return UNRESOLVED

    store = Forgetful()
    store.add(digest_of(SECRET), TOKEN)
    guarded = BearerTokenMiddleware(plain, store=store)
    answer = await ask(guarded, headers=[BEARER, HOST, (b"api-key", SECRET.encode())])
    assert answer.scope["headers"] == [HOST]


@pytest.mark.parametrize("variable", ["", "1"])
async def test_kept_credentials_stay(store: MemoryTokenStore, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """An application that checks the same key itself gets it, by the argument or by the variable."""
    monkeypatch.setenv("FREEGPT_AUTH_KEEP_CREDENTIALS", variable)
    guarded = BearerTokenMiddleware(plain, store=store, keep_credentials=None if variable else True)
    for headers in ([BEARER], [BEARER], [BEARER, UPSTREAM]):
        answer = await ask(guarded, headers=[*headers])
        assert answer.scope["headers"] == headers
        assert answer.scope["user"].display_name == "one"


@pytest.mark.parametrize(
    ("way", "scope"), [("open", {}), ("public", {"path": "/health"}), ("preflight", {"method": "OPTIONS"})]
)
async def test_nothing_leaves_without_authentication(store: MemoryTokenStore, way: str, scope: Any) -> None:
    """Where no credential is asked for none is removed, and a user that an outer middleware set stays."""
    preflight = [(b"origin", b"https://ui.test"), (b"access-control-request-method", b"POST")]
    headers = [*bearer("sk-1"), *preflight]
    guarded = BearerTokenMiddleware(plain, store=None if way == "open" else store, public_paths=["/health"])
    for user in ({}, {"user": "outer", "auth": "theirs"}):
        answer = await ask(guarded, headers=[*headers], **{**scope, **user})
        assert answer.scope["headers"] == headers
        assert [answer.scope[name] for name in user] == [*user.values()]
        assert isinstance(answer.scope["user"], UnauthenticatedUser) is not bool(user)
    known = await ask(guarded, headers=[BEARER, *preflight], user="outer", **scope)
    assert (known.scope["user"] == "outer") is (way != "preflight")


# --- two guards


async def test_inner_guard_accepts_the_outer_ones_caller(
    store: MemoryTokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a guard over the same store a second guard accepts the same caller, for every carrier, and the key."""
    monkeypatch.setenv("FREEGPT_API_KEY", "the-environment-key")
    guarded = BearerTokenMiddleware(BearerTokenMiddleware(plain, store=store), store=store)
    for headers in ([BEARER], [BEARER, UPSTREAM], [UPSTREAM, (b"api-key", SECRET.encode())]):
        for kind in ("http", "websocket"):
            answer = await ask(guarded, type=kind, headers=[*headers])
            assert answer.scope["user"].display_name == "one"
    assert (await ask(guarded, headers=bearer("the-environment-key"))).status == 200
    [foreign] = bearer("sk-of-the-upstream")
    answer = await ask(guarded, headers=[foreign, (b"x-api-key", SECRET.encode())])
    assert (answer.status, answer.scope["headers"]) == (200, [foreign])


async def test_inner_guard_judges_again(store: MemoryTokenStore) -> None:
    """A token that is revoked between two guards is refused by the inner one."""
    inner = BearerTokenMiddleware(plain, store=store)

    async def revoke(scope: Any, receive: Any, send: Any) -> None:
        store.revoke(TOKEN.id, datetime.now(UTC))
        await inner(scope, receive, send)

    assert (await ask(BearerTokenMiddleware(revoke, store=store), headers=[BEARER])).status == 401


async def test_replaced_credentials_name_the_caller(store: MemoryTokenStore) -> None:
    """An application that hands on a copy of the scope with another valid token acts as that token's caller."""
    inner = BearerTokenMiddleware(plain, store=store)
    scopes: list[Any] = []

    async def act_as_the_second(scope: Any, receive: Any, send: Any) -> None:
        scopes.append({**scope, "headers": [(b"x-api-key", SECOND.encode())]})
        await inner(scopes[-1], receive, send)

    assert (await ask(BearerTokenMiddleware(act_as_the_second, store=store), headers=[BEARER])).status == 200
    assert scopes[0]["user"].display_name == "two"


@pytest.mark.parametrize("keeps", [False, True])
async def test_inner_guard_over_another_store(store: MemoryTokenStore, *, keeps: bool) -> None:
    """Another store must verify the credential itself, for which the outer guard has to keep it."""
    other = MemoryTokenStore()
    other.add(digest_of(SECRET), TOKEN)
    guarded = BearerTokenMiddleware(BearerTokenMiddleware(plain, store=other), store=store, keep_credentials=keeps)
    answer = await ask(guarded, headers=[BEARER])
    assert answer.status == (200 if keeps else 401)
    assert answer.headers.get("www-authenticate") == (None if keeps else 'Bearer realm="freegpt_auth"')


async def test_marks_of_others_prove_nothing(store: MemoryTokenStore) -> None:
    """No other object in the scope, and no caller that another store verified, lets a request in."""
    guarded = BearerTokenMiddleware(plain, store=store)
    caller = caller_of(TOKEN, digest_of(SECRET), MemoryTokenStore())
    unknown = Caller(caller.user, caller.auth, token=TOKEN, digest=digest_of("sk-wrong"), source=store)
    forged = {"digest": digest_of(SECRET), "source": store}
    marks: list[Any] = [True, SECRET, digest_of(SECRET), forged, caller, unknown]
    for mark in marks:
        assert (await ask(guarded, **{MARK: mark})).status == 401


# --- those that would show it


async def test_logged_headers_show_no_secret(store: MemoryTokenStore, caplog: pytest.LogCaptureFixture) -> None:
    """An application that logs its headers, or its whole scope, logs no secret and no digest."""

    async def logs(scope: Any, receive: Any, send: Any) -> None:
        logging.getLogger("application").warning("%r %r", scope["headers"], scope)
        await plain(scope, receive, send)

    guarded = BearerTokenMiddleware(logs, store=store)
    for headers in ([BEARER, HOST], [BEARER, HOST, UPSTREAM]):
        assert (await ask(guarded, headers=headers)).status == 200
    assert "chat.test" in caplog.text
    assert SECRET not in caplog.text
    assert repr(digest_of(SECRET)) not in caplog.text


async def test_opentelemetry_spans_show_no_secret(store: MemoryTokenStore) -> None:
    """A span inside the guard that captures every header of the request captures no secret."""
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    traced = OpenTelemetryMiddleware(plain, tracer_provider=provider, http_capture_headers_server_request=[".*"])
    guarded = BearerTokenMiddleware(traced, store=store)
    for headers in ([BEARER, HOST], [BEARER, HOST, UPSTREAM]):
        answer = await ask(guarded, headers=headers, scheme="http", query_string=b"", server=("chat.test", 80))
        assert answer.status == 200
    shown = repr([dict(span.attributes or {}) for span in spans.get_finished_spans()])
    assert "http.request.header.host" in shown
    assert SECRET not in shown


SENTRY = """
import os, sys, sentry_sdk
from sentry_sdk.transport import Transport
from starlette.applications import Starlette
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from freegpt_auth import BearerTokenMiddleware

secret, order = os.environ["FREEGPT_API_KEY"], sys.argv[1]

class Recorded(Transport):
    def capture_envelope(self, envelope):
        print(envelope.serialize().decode("latin-1"))

async def fail(_request):
    raise RuntimeError("the application failed")

options = {} if order == "inside" else {"send_default_pii": True, "_experiments": {"trace_lifecycle": "stream"}}
sentry_sdk.init("https://public@sentry.test/1", transport=Recorded, traces_sample_rate=1.0, **options)
app = Starlette(routes=[Route("/v1/models", fail), WebSocketRoute("/v1/realtime", fail)])
if order == "inside":
    app.add_middleware(BearerTokenMiddleware)
client = TestClient(app if order == "inside" else BearerTokenMiddleware(app), raise_server_exceptions=False)
for name, scheme in (("Authorization", "Bearer "), ("X-Api-Key", ""), ("Api-Key", "")) * 2:
    assert client.get("/v1/models", headers={name: scheme + secret}).status_code == 500
try:
    client.websocket_connect("/v1/realtime", subprotocols=["openai-insecure-api-key." + secret]).__enter__()
except RuntimeError:
    sentry_sdk.flush()
"""


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_sentry_shows_no_secret(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentry's events, traces and variables hold no secret; nor do streamed spans, where the guard is outermost."""
    monkeypatch.setenv("FREEGPT_API_KEY", SECRET)
    program = [sys.executable, "-c", SENTRY, order]
    finished = subprocess.run(program, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    assert finished.stdout.count('"the application failed"') >= 7
    assert '"vars"' in finished.stdout
    assert "user-agent" in finished.stdout
    assert SECRET not in finished.stdout
    assert repr(digest_of(SECRET))[2:-1].replace("\\", "\\\\") not in finished.stdout, "as JSON writes it"
