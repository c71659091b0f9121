"""The middleware as servers, clients and applications meet it: every row of the wire format, every mode, every edge."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import pytest
from anyio import to_thread
from starlette.applications import Starlette
from starlette.authentication import requires
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from freegpt_auth import AuthMode, BearerTokenMiddleware, FileTokenStore, MemoryTokenStore, Survey
from freegpt_auth.guard.credentials import SUBPROTOCOL
from freegpt_auth.guard.denials import RETRY_AFTER, denial
from freegpt_auth.stores.file.usage import UsageDatabase
from freegpt_auth.tokens import digest_of, issue
from tests.helpers.asgi import LIFESPAN, ask, bearer, hello, plain, statuses

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.requests import Request

    from tests.conftest import Keep

KEY = "the-environment-key"
TOKEN_FILE = "api_tokens.json"
NOW = datetime.now(UTC)
LIVE_TOKEN, LIVE = issue("live", now=NOW)
NEVER: Any = None
"""An application that no request may reach: a call of it is an error."""

pytestmark = pytest.mark.anyio


@pytest.fixture
def store() -> MemoryTokenStore:
    """Return a store in memory that holds a live, a revoked and an expired token."""
    store = MemoryTokenStore()
    store.add(digest_of(LIVE), LIVE_TOKEN)
    for name, end in (("revoked", "revoked_at"), ("expired", "expires_at")):
        store.add(digest_of(f"sk-{name}"), msgspec.structs.replace(LIVE_TOKEN, id=f"id-{name}", **{end: NOW}))
    return store


@pytest.fixture
def guarded(store: MemoryTokenStore) -> Any:
    """Return an application behind the middleware."""
    return BearerTokenMiddleware(hello, store=store)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Return the captured log, refusals among it."""
    caplog.set_level(logging.INFO, "freegpt_auth")
    return caplog


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ([], "missing"),
        ([b"authorization: Basic dXNlcjpzZWNyZXQ="], "missing"),
        ([b"authorization: %s"], "missing"),
        ([b"authorization: Bearer\xa0%s"], "missing"),
        ([b"authorization: Bearer %s", b"authorization: Basic eA=="], "malformed"),
        ([b"authorization: Bearer %s, Bearer %s"], "malformed"),
        ([b"authorization: Bearer Bearer %s"], "prefixed"),
        ([b"x-api-key: bearer %s"], "prefixed"),
        ([b'authorization: Bearer "%s"'], "quoted"),
        ([b"api-key: '%s'", b"authorization: Bearer sk-else"], "quoted"),
        ([b"api-key: '%s'", b"authorization: Bearer sk-revoked"], "revoked"),
        ([b"authorization: Bearer %s\xe9"], "unknown"),
        ([b"api-key: " + b"a" * 60_000], "unknown"),
        ([b"authorization: \t bEaReR \t%s "], None),
        ([b"authorization: Bearer sk-else", b"x-api-key: %s"], None),
        ([b"authorization: Bearer %s", b"api-key: sk-else"], None),
        ([b"authorization: Bearer %s", b"api-key: '%s'"], None),
    ],
)
async def test_presented_credentials(guarded: Any, log: Any, headers: list[bytes], reason: str | None) -> None:
    """Missing, ambiguous, mistyped and wrong credentials are told apart; query, body and cookies never count."""
    lines = [*headers, b"cookie: access_token=%s; authorization=Bearer %s"]
    answer = await ask(
        guarded,
        method="POST",
        query_string=f"access_token={LIVE}&api_key={LIVE}&key={LIVE}".encode(),
        headers=[tuple(line.replace(b"%s", LIVE.encode()).split(b": ")) for line in lines],  # type: ignore[misc]
        incoming=[{"type": "http.request", "body": json.dumps({"access_token": LIVE, "api_key": LIVE}).encode()}],
    )
    denied = denial(answer.scope, reason or "")
    assert answer.status == (denied.status if reason else 200)
    assert ((answer.messages[0]["headers"], answer.body) == (denied.headers, denied.body)) is bool(reason)
    assert [record.reason for record in log.records] == [reason] * bool(reason)
    assert LIVE not in answer.body.decode() + log.text


async def test_invalid_has_one_face(guarded: Any, log: Any) -> None:
    """Unknown, mistyped, revoked and expired are one answer, byte by byte; the log alone knows which it was."""
    secrets = ["sk-unknown", LIVE[:-1] + chr(ord(LIVE[-1]) ^ 1), "sk-revoked", "sk-expired"]
    first, *others = [(await ask(guarded, headers=bearer(secret))).messages for secret in secrets]
    assert others == [first] * 3
    reasons = [("unknown", None), ("unknown", None), ("revoked", "id-revoked"), ("expired", "id-expired")]
    assert [(record.reason, record.token_id) for record in log.records] == reasons


async def test_head_is_refused_with_headers_only(guarded: Any) -> None:
    """A refused HEAD has the headers of the refused GET and no body."""
    head, get = await ask(guarded, method="HEAD"), await ask(guarded)
    assert head.body == b""
    assert (head.status, head.headers) == (get.status, get.headers)


@pytest.mark.parametrize("kind", ["webtransport", "", "HTTP"])
async def test_an_unknown_scope_type_is_an_error(store: MemoryTokenStore, kind: str) -> None:
    """A type that is not known is not guarded, so it is never passed on: not with a valid token nor in open mode."""
    for source in (store, None):
        with pytest.raises(NotImplementedError, match="does not know how to guard"):
            await ask(BearerTokenMiddleware(NEVER, store=source), type=kind, headers=bearer(LIVE))


async def test_broken_store_is_503_but_the_key_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """While tokens cannot be read clients are asked to try again soon, and the operator's key goes on working."""
    monkeypatch.setenv("FREEGPT_API_KEY", KEY)
    await anyio.Path(TOKEN_FILE).write_text("{ broken")
    guarded = BearerTokenMiddleware(plain)
    answer = await ask(guarded, headers=bearer("sk-perhaps-valid"))
    assert answer.status == 503
    assert answer.headers["retry-after"] == str(RETRY_AFTER)
    assert await statuses(guarded, None, KEY) == [401, 200]
    assert (await ask(guarded, headers=[*bearer("sk-perhaps-valid"), (b"x-api-key", KEY.encode())])).status == 200


async def test_request_that_closes_a_server_is_read(keep: Keep) -> None:
    """The first request after a token was created may already be an ambiguous one, and gets the answer for that."""
    guarded = BearerTokenMiddleware(NEVER, usage="off")
    keep(FileTokenStore(TOKEN_FILE))
    assert (await ask(guarded, headers=bearer("one") * 2)).status == 400


@pytest.mark.parametrize(
    ("secrets", "reason"),
    [([], "missing"), (["sk-wrong"], "unknown"), ([LIVE, "sk-2"], "malformed"), ([f"'{LIVE}'"], "quoted")],
)
async def test_websocket_is_refused_before_the_upgrade(guarded: Any, secrets: list[str], reason: str) -> None:
    """A refused WebSocket client reads a real response with its reason, where the server can send one."""
    offers = [SUBPROTOCOL + secret for secret in secrets]
    answer = await ask(guarded, type="websocket", subprotocols=offers, extensions={"websocket.http.response": {}})
    denied = denial(answer.scope, reason)
    assert answer.messages[0]["type"] == "websocket.http.response.start"
    assert (answer.status, answer.body) == (denied.status, denied.body)
    assert [*answer.headers] == ["content-type", "cache-control", "www-authenticate"], "no second length"


PREFLIGHT = [(b"origin", b"https://ui.test"), (b"access-control-request-method", b"POST")]


@pytest.mark.parametrize("others", [{}, {"extensions": None}, {"method": "OPTIONS", "headers": PREFLIGHT}])
async def test_websocket_without_extension_is_closed(guarded: Any, others: dict[str, Any]) -> None:
    """On a server without the extension the handshake is closed with 1008, even with the headers of a preflight."""
    answer = await ask(guarded, type="websocket", **others)
    assert answer.messages == [{"type": "websocket.close", "code": 1008}]


async def test_a_tokens_life(keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the environment key a token works as soon as it is made, and not once revoking it has returned."""
    monkeypatch.setenv("FREEGPT_API_KEY", KEY)
    guarded = BearerTokenMiddleware(hello, usage="off")
    assert await statuses(guarded, None, KEY, KEY + "x", KEY[:-1], KEY.upper()) == [401, 200, 401, 401, 401]
    store = FileTokenStore(TOKEN_FILE)
    token, secret = keep(store)
    _, neighbour = keep(store)
    answer = await ask(guarded, headers=bearer(secret))
    assert json.loads(answer.body) == {"user": "a-token", "identity": token.id, "scopes": ["authenticated"]}
    store.revoke(token.id, datetime.now(UTC))
    assert await statuses(guarded, None, KEY, secret, neighbour) == [401, 200, 401, 200]
    monkeypatch.delenv("FREEGPT_API_KEY")
    assert await statuses(BearerTokenMiddleware(hello, usage="off"), KEY, neighbour) == [401, 200]


@pytest.mark.parametrize("usage", [None, "counts.db"])
def test_own_token_source_counts_no_use(store: MemoryTokenStore, usage: str | None) -> None:
    """With a token source of one's own usage is off, unless a place for it is named."""
    recorder = BearerTokenMiddleware(plain, store=store, usage=usage, usage_interval=0.5)._usage
    assert (recorder and (recorder._store.source, recorder._interval)) == (usage and (os.path.abspath(usage), 0.5))


async def test_no_answer_shares_its_headers_with_another(guarded: Any) -> None:
    """A header that an outer middleware adds to one refusal, such as a cookie, never reaches the next client."""
    first = await ask(guarded)
    first.messages[0]["headers"].append((b"set-cookie", b"session=1"))
    assert "set-cookie" not in (await ask(guarded)).headers


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("http", ["send, 0 logged", "send, 0 logged", "receive, 1 logged", "send, 1 logged"]),
        ("websocket", ["receive, 0 logged", "send, 0 logged"]),
    ],
)
async def test_the_client_waits_for_no_log(guarded: Any, log: Any, kind: str, expected: list[str]) -> None:
    """A refusal is sent before it is logged, and logged before its body is awaited, also if the client is gone."""
    steps: list[str] = []
    scope = {"type": kind, "method": "POST", "path": "/", "headers": [(b"content-length", b"1")], "client": None}

    async def receive() -> Any:
        steps.append(f"receive, {len(log.records)} logged")
        return {"type": f"{kind}.disconnect"}

    async def send(_: Any) -> None:
        steps.append(f"send, {len(log.records)} logged")

    async def lost(_: Any) -> None:
        raise ConnectionResetError

    await guarded(scope, receive, send)
    assert steps == expected
    with pytest.raises(ConnectionResetError):
        await guarded(scope, receive, lost)
    assert [record.reason for record in log.records] == ["missing", "missing"]


async def test_usage_is_written_before_shutdown_completes(keep: Keep, log: Any) -> None:
    """When the server learns that it may exit, the last uses are on disk and the last refusals are accounted for."""
    token, secret = keep(FileTokenStore(TOKEN_FILE))
    guarded = BearerTokenMiddleware(plain)
    written: list[tuple[str, int]] = []

    async def send(message: Any) -> None:
        usage = await to_thread.run_sync(lambda: UsageDatabase("api_tokens.usage.db").read())
        written.append((message["type"], usage[token.id].use_count if usage else 0))

    async def server(scope: Any, receive: Any, _send: Any) -> None:
        await guarded(scope, receive, send)

    assert await statuses(guarded, secret, secret, *["sk-wrong"] * 12) == [200, 200, *[401] * 12]
    await ask(server, type="lifespan", incoming=LIFESPAN)
    assert log.messages[-1] == "2 more refusals are not shown"
    assert written == [("lifespan.startup.complete", 0), ("lifespan.shutdown.complete", 2)]


async def test_only_accepted_tokens_are_counted(keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused requests, the environment key and public paths write nothing; tokens are counted without a lifespan."""
    monkeypatch.setenv("FREEGPT_API_KEY", KEY)
    token, secret = keep(FileTokenStore(TOKEN_FILE))
    guarded: Any = BearerTokenMiddleware(plain, public_paths=["/health"], usage="counts.db")
    assert await statuses(guarded, None, "sk-wrong", KEY) == [401, 401, 200]
    await ask(guarded, path="/health", headers=bearer(secret))
    await to_thread.run_sync(guarded._usage.flush)
    assert not await anyio.Path("counts.db").exists()
    assert await statuses(guarded, secret) == [200]
    await to_thread.run_sync(guarded._usage.flush)
    usage = await to_thread.run_sync(lambda: UsageDatabase("counts.db").read())
    assert {key: value.use_count for key, value in usage.items()} == {token.id: 1}


def test_the_first_look_up_imports_nothing(tmp_path: Path) -> None:
    """A server without anyio imports it at the start: the first request would wait 90 ms for it."""
    program = (
        "import asyncio, sys, freegpt_auth\n"
        "async def app(scope, receive, send):\n"
        "    sys.stdout.write(' '.join(sys.modules))\n"
        "    await send({'type': 'lifespan.shutdown.complete'})\n"
        "async def send(message): pass\n"
        "asyncio.run(freegpt_auth.BearerTokenMiddleware(app)({'type': 'lifespan'}, None, send))\n"
    )
    served = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, check=True, timeout=30)
    assert b"anyio._backends._asyncio" in served.stdout.split()


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_receive_and_send_are_the_servers_own(store: MemoryTokenStore, kind: str) -> None:
    """No stream is buffered and a client's leaving is seen at once: nothing stands between application and server."""
    seen: list[Any] = []

    async def application(_scope: Any, receive: Any, send: Any) -> None:
        seen.extend((receive, send))

    receive, send = object(), object()
    guarded: Any = BearerTokenMiddleware(application, store=store)
    await guarded({"type": kind, "path": "/", "headers": bearer(LIVE)}, receive, send)
    assert seen == [receive, send]


def who(request: Request) -> JSONResponse:
    """Return the caller as Starlette's conventions describe it."""
    return JSONResponse([request.user.is_authenticated, request.user.display_name, request.auth.scopes])


GUARDED = {"/members": "authenticated", "/admins": "admin"}
ROUTES = [Route("/who", who), *(Route(path, requires(scope)(who)) for path, scope in GUARDED.items())]


def test_starlettes_conventions_work(store: MemoryTokenStore) -> None:
    """request.user, request.auth.scopes and @requires work as Starlette's guide says; on an open server for nobody."""
    boss = msgspec.structs.replace(LIVE_TOKEN, id="1", name="boss", scopes=("admin",))
    store.add(digest_of("sk-boss"), boss)
    protected = TestClient(Starlette(routes=ROUTES, middleware=[Middleware(BearerTokenMiddleware, store=store)]))
    open_to_all = TestClient(Starlette(routes=ROUTES, middleware=[Middleware(BearerTokenMiddleware)]))
    for client, secret, path, expected in (
        (protected, LIVE, "/members", [True, "live", ["authenticated"]]),
        (protected, "sk-boss", "/admins", [True, "boss", ["authenticated", "admin"]]),
        (protected, LIVE, "/admins", 403),
        (protected, "sk-wrong", "/absent", 401),
        (open_to_all, LIVE, "/who", [False, "", []]),
        (open_to_all, LIVE, "/members", 403),
    ):
        answer = client.get(path, headers={"authorization": f"Bearer {secret}"})
        assert expected == (answer.json() if answer.status_code == 200 else answer.status_code)


@pytest.mark.parametrize("root", ["", "/proxy"])
def test_mounted_below_a_path(store: MemoryTokenStore, root: str) -> None:
    """Mounted, the middleware guards its subtree, by the paths that its application sees."""
    guarded = BearerTokenMiddleware(Starlette(routes=ROUTES), store=store, public_paths=["/who"])
    client = TestClient(Starlette(routes=[Mount("/llm", guarded)]), root_path=root)
    paths = {"/llm/who": 200, "/llm/members": 401, "/llm/llm/who": 401, "/llm/absent": 401}
    assert {path: client.get(root + path).status_code for path in paths} == paths
    assert client.get(f"{root}/llm/members", headers={"authorization": f"Bearer {LIVE}"}).status_code == 200


def test_the_settings_of_a_database_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease and the cache of the environment are those of the store, and its usage is in the same database."""
    from freegpt_auth.stores.postgres.store import LOOK_UP_LIMIT, PostgresTokenStore  # noqa: PLC0415

    surveyed = Survey(configured=True, active=0, source="postgresql://u@h/d", kind="database")
    monkeypatch.setattr(PostgresTokenStore, "survey", lambda _: surveyed)
    for name, value in (("STORE", "postgresql://u:hunter2@h/d"), ("LEASE", "7"), ("CACHE", "9")):
        monkeypatch.setenv(f"FREEGPT_AUTH_{name}", value)
    guarded = BearerTokenMiddleware(plain)
    source: Any = guarded._look_ups.source
    assert (source._lease, source._cache.limit) == (7.0, 9)
    usage: Any = guarded._usage
    assert usage._store.source == "postgresql://u@h/d"
    assert guarded._look_ups.source.look_up_limit == LOOK_UP_LIMIT
    assert guarded._authenticator.mode is AuthMode.DATABASE
    assert "hunter2" not in repr([vars(part) for part in (guarded, source, usage)])
