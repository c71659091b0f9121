"""The ASGI shell: scopes and messages in, scopes and messages out. It knows no tokens."""

from __future__ import annotations

import time
from os import PathLike
from typing import TYPE_CHECKING, Literal, NamedTuple

import anyio
from anyio import to_thread
from anyio.lowlevel import RunVar

from . import denials
from .authentication import ANONYMOUS, Authenticator, AuthMode, Caller, Refusal
from .bearer import presented, without_secret
from .exceptions import MalformedCredentialsError
from .refusals import RefusalLog
from .settings import FLUSH_INTERVAL, Settings
from .stores import open_store
from .stores.base import UNRESOLVED, Unresolved
from .usage import UsageRecorder

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .stores.base import Verifier

BODY_LIMIT = 64 * 1024 * 1024
"""Bytes of a refused request's body that are received and dropped before its connection is given up."""

BODY_TIMEOUT = 5.0
"""Seconds for which they are."""


class _Lane(NamedTuple):
    """How many look-ups of one event loop go to threads at once, and which threads those are."""

    gate: anyio.Semaphore
    # Not anyio's default threads: the application may hold all of them, and must not hold up authentication.
    threads: anyio.CapacityLimiter


_lanes: RunVar[_Lane] = RunVar("freegpt_auth")
_LANE_WIDTH = 4


class BearerTokenMiddleware:
    """Lets a request through to *app* only with a valid bearer token or key.

    With no argument but *app* it is complete: everything else comes from the environment, see
    :meth:`freegpt_auth.Settings.from_env`. An argument wins over its variable.

    ``http`` and ``websocket`` are guarded alike, ``lifespan`` passes, and any other type of scope is an error. The
    application finds the caller in ``scope["user"]`` and ``scope["auth"]``, so Starlette's ``request.user``,
    ``request.auth.scopes`` and ``@requires`` work.

    Args:
        app: the application to protect.
        store: where the tokens are: a path, or any :class:`~freegpt_auth.stores.base.Verifier`.
            Default: ``FREEGPT_AUTH_STORE``, else ``api_tokens.json`` in the working directory.
        public_paths: exact paths that need no token. Default: ``FREEGPT_AUTH_PUBLIC_PATHS``, else none.
        required: raise instead of starting in open mode. Default: ``FREEGPT_AUTH_REQUIRED``, else no.
        usage: path of the usage database, or ``off``. Default: ``FREEGPT_AUTH_USAGE``, else beside the token file;
            with a verifier of one's own: off.
        usage_interval: seconds between two writes of usage: what a killed process can lose.

    Raises:
        ConfigurationError: the settings cannot be used; a server must not start on them.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        store: str | PathLike[str] | Verifier | None = None,
        public_paths: Iterable[str] | None = None,
        required: bool | None = None,
        usage: str | PathLike[str] | None = None,
        usage_interval: float = FLUSH_INTERVAL,
    ) -> None:
        self.app = app
        location: str | PathLike[str] | None = None
        verifier: Verifier | None = None
        if store is None or isinstance(store, (str, PathLike)):
            location = store
        else:
            verifier = store
            usage = "off" if usage is None else usage
        settings = Settings.from_env(
            store=location, public_paths=public_paths, required=required, usage=usage, usage_interval=usage_interval
        )
        verifier = open_store(settings.store) if verifier is None else verifier
        self._public_paths = settings.public_paths
        self._authenticator = Authenticator(verifier, settings.key, required=settings.required)
        self._refusals = RefusalLog()
        self._usage: UsageRecorder | None = None
        if settings.usage is not None:
            self._usage = UsageRecorder(settings.usage, interval=settings.usage_interval)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a refusal, or let the application answer."""
        kind = scope["type"]
        if kind == "lifespan":
            await self._live(scope, receive, send)
            return
        if kind not in ("http", "websocket"):
            # A type not known is a type not guarded.
            raise NotImplementedError(f"freegpt_auth does not know how to guard a scope of type {kind!r}")
        decision = self._peek(scope)
        if decision is UNRESOLVED:
            decision = await self._in_turn(scope)
        if isinstance(decision, Refusal):
            if not _is_preflight(scope):
                await self._refuse(scope, receive, send, decision)
                return
            decision = ANONYMOUS
        if decision.token is not None and self._usage is not None:
            self._usage.record(decision.token.id, time.time())
        if kind == "websocket":
            scope = without_secret(scope)
        scope["user"] = decision.user
        scope["auth"] = decision.auth
        await self.app(scope, receive, send)

    def _peek(self, scope: Scope) -> Caller | Refusal | Literal[Unresolved.UNRESOLVED]:
        """Decide from memory: on the event loop, for every request."""
        authenticator = self._authenticator
        if self._public_paths and _route_path(scope) in self._public_paths:
            return ANONYMOUS
        if authenticator.mode is AuthMode.OPEN:
            passes = authenticator.peek_open()
            if passes is UNRESOLVED:
                return UNRESOLVED
            if passes:
                return ANONYMOUS
        secrets = _secrets(scope)
        return secrets if isinstance(secrets, Refusal) else authenticator.peek(secrets)

    def _resolve(self, scope: Scope) -> Caller | Refusal:
        """Decide from the store: in a thread, where memory cannot."""
        authenticator = self._authenticator
        if authenticator.resolve_open():
            return ANONYMOUS
        secrets = _secrets(scope)
        return secrets if isinstance(secrets, Refusal) else authenticator.resolve(secrets)

    async def _in_turn(self, scope: Scope) -> Caller | Refusal:
        """Decide from the store, if memory still cannot when it is this request's turn."""
        lane = _lanes.get(None)
        if lane is None:
            lane = _Lane(anyio.Semaphore(_LANE_WIDTH), anyio.CapacityLimiter(_LANE_WIDTH))
            _lanes.set(lane)
        async with lane.gate:
            decision = self._peek(scope)  # those before us in the queue may have read the store
            if decision is not UNRESOLVED:
                return decision
            return await to_thread.run_sync(self._resolve, scope, limiter=lane.threads)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, refusal: Refusal) -> None:
        denial = denials.denial(_route_path(scope), refusal.reason)
        try:
            if scope["type"] == "http":
                await _deny_http(scope, send, denial)
            else:
                await _deny_websocket(scope, receive, send, denial)
        finally:
            self._refusals.tell(scope, refusal)  # the client need not wait for it
        if scope["type"] == "http":
            await _end_http(receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def flush_and_send(message: Message) -> None:
            # Before it is forwarded: a server stops its loop on this message, and what comes after it is lost.
            if message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
                self._refusals.finish()
                if self._usage:
                    await to_thread.run_sync(self._usage.flush)
            await send(message)

        await self.app(scope, receive, flush_and_send)


def _secrets(scope: Scope) -> list[bytes] | Refusal:
    try:
        return presented(scope) or Refusal("missing")
    except MalformedCredentialsError:
        return Refusal("malformed")


async def _deny_http(scope: Scope, send: Send, denial: denials.Denial) -> None:
    """Send the whole answer at once, but do not end the response: see :func:`_end_http`."""
    body = b"" if scope["method"] == "HEAD" else denial.body
    await send({"type": "http.response.start", "status": denial.status, "headers": [*denial.headers]})
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _end_http(receive: Receive, send: Send) -> None:
    """End the response when the request has ended.

    A server closes a connection whose response ends before its request, and a client that is still uploading then sees
    a reset in place of the answer. Draining first would answer ``Expect: 100-continue`` with a "go on".
    """
    received = 0
    with anyio.move_on_after(BODY_TIMEOUT):
        while received < BODY_LIMIT:
            message = await receive()
            if not message.get("more_body", False):
                break
            received += len(message.get("body", b""))
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _deny_websocket(scope: Scope, receive: Receive, send: Send, denial: denials.Denial) -> None:
    """Refuse before the upgrade: as a real HTTP response where the server can send one, else by closing."""
    await receive()
    if "websocket.http.response" in (scope.get("extensions") or {}):
        # The server frames this response: uvicorn 0.50 adds a length of its own, and clients refuse a response with two.
        headers = [header for header in denial.headers if header[0] != b"content-length"]
        await send({"type": "websocket.http.response.start", "status": denial.status, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": denial.body, "more_body": False})
    else:
        await send({"type": "websocket.close", "code": 1008})


def _is_preflight(scope: Scope) -> bool:
    """Tell whether a browser asks if it may send the real request; by the Fetch standard it asks without credentials."""
    if scope["type"] != "http" or scope["method"] != "OPTIONS":
        return False
    names = {name for name, _ in scope["headers"]}
    return b"origin" in names and b"access-control-request-method" in names


def _route_path(scope: Scope) -> str:
    """Return the path below the mount point, as Starlette's router sees it."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and (path == root or path.startswith(root + "/")):
        return path[len(root) :]
    return path
