"""The ASGI shell: scopes and messages in, scopes and messages out. It knows no tokens."""

from __future__ import annotations

import math
import time
from os import PathLike
from typing import TYPE_CHECKING, NamedTuple

import anyio
from anyio import to_thread
from anyio.lowlevel import RunVar

from . import denials
from .authentication import Authenticator, Decision, Refusal
from .bearer import plain_digest, presented, without_secret
from .callers import ANONYMOUS, Caller
from .delivery import deny_http, deny_websocket, end_http
from .exceptions import MalformedCredentialsError
from .refusals import RefusalLog
from .settings import FLUSH_INTERVAL, Settings
from .stores import open_store
from .stores.base import UNRESOLVED
from .usage import open_usage
from .usage.recorder import UsageRecorder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .stores.base import Verifier


class _Lane(NamedTuple):
    """How many look-ups of one event loop go to threads at once, and which threads those are."""

    gate: anyio.Semaphore
    # Not anyio's default threads: the application may hold all of them, and must not hold up authentication.
    threads: anyio.CapacityLimiter


_LAST = frozenset({"lifespan.shutdown.complete", "lifespan.shutdown.failed"})
_MISSING, _MALFORMED, _UNAVAILABLE = Refusal("missing"), Refusal("malformed"), Refusal("unavailable")

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
        store: where the tokens are: a path, a ``postgresql://`` URL, or any
            :class:`~freegpt_auth.stores.base.Verifier`. A server whose store is named, here or by the variable, is never
            open. Default: ``FREEGPT_AUTH_STORE``, else ``api_tokens.json`` in the working directory.
        public_paths: exact paths that need no token. Default: ``FREEGPT_AUTH_PUBLIC_PATHS``, else none.
        required: raise instead of starting in open mode. Default: ``FREEGPT_AUTH_REQUIRED``, else no.
        usage: path of the usage database, or ``off``. Default: ``FREEGPT_AUTH_USAGE``, else beside the tokens;
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
        if verifier is None:
            verifier = open_store(
                settings.store, named=settings.store_named, lease=settings.lease, cache_limit=settings.cache_limit
            )
        self._verifier = verifier
        self._look_up_limit: float = getattr(verifier, "look_up_limit", math.inf)
        self._public_paths = settings.public_paths
        named = settings.store_named or store is not None
        self._authenticator = Authenticator(verifier, settings.key, required=settings.required, named=named)
        self._refusals = RefusalLog()
        self._usage: UsageRecorder | None = None
        if settings.usage is not None:
            self._usage = UsageRecorder(open_usage(settings.usage), interval=settings.usage_interval)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a refusal, or let the application answer."""
        kind = scope["type"]
        if kind not in ("http", "websocket"):
            await self.app(scope, receive, self._flushing(scope, send))
            return
        if self._public_paths and _route_path(scope) in self._public_paths:
            caller = ANONYMOUS
        else:
            digest = plain_digest(scope["headers"]) if kind == "http" else None
            known = None if digest is None else self._authenticator.recognise(digest)
            if known is None:
                decision = await self._decide(scope, digest)
                if isinstance(decision, Refusal):
                    await self._refuse(scope, receive, send, decision)
                    return
                known = decision
            caller = known
            token = caller.token
            if token is not None and self._usage is not None:
                self._usage.record((token.id, time.time()))
        if kind == "websocket":
            scope = without_secret(scope)
        scope["user"] = caller.user
        scope["auth"] = caller.auth
        await self.app(scope, receive, send)

    async def _decide(self, scope: Scope, digest: bytes | None) -> Caller | Refusal:
        """Decide about a caller who is not known from an earlier request."""
        decision = self._peek(scope, digest)
        settled = await self._in_turn(scope) if decision is UNRESOLVED else decision
        return ANONYMOUS if isinstance(settled, Refusal) and _is_preflight(scope) else settled

    def _peek(self, scope: Scope, digest: bytes | None = None) -> Decision:
        """Decide from memory: on the event loop."""
        passes = self._authenticator.peek_open()
        if passes is not False:
            return ANONYMOUS if passes is True else UNRESOLVED
        digests = _digests(scope) if digest is None else [digest]
        return digests if isinstance(digests, Refusal) else self._authenticator.peek(digests)

    def _resolve(self, scope: Scope) -> Caller | Refusal:
        """Decide from the store: in a thread, where memory cannot."""
        if self._authenticator.resolve_open():
            return ANONYMOUS
        digests = _digests(scope)
        return digests if isinstance(digests, Refusal) else self._authenticator.resolve(digests)

    async def _in_turn(self, scope: Scope) -> Caller | Refusal:
        """Decide from the store, if memory still cannot when it is this request's turn."""
        lane = _lane()
        if lane.gate.statistics().tasks_waiting >= self._look_up_limit:
            return _UNAVAILABLE
        async with lane.gate:
            decision = self._peek(scope)  # those before us in the queue may have read the store
            if decision is not UNRESOLVED:
                return decision
            return await to_thread.run_sync(self._resolve, scope, limiter=lane.threads)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, refusal: Refusal) -> None:
        denial = denials.denial(_route_path(scope), refusal.reason)
        unfinished = False
        try:
            if scope["type"] == "http":
                unfinished = await deny_http(scope, send, denial)
            else:
                await deny_websocket(scope, receive, send, denial)
        finally:
            self._refusals.tell(scope, refusal)  # the client need not wait for it
        if unfinished:
            await end_http(receive, send)

    def _flushing(self, scope: Scope, send: Send) -> Send:
        """Return what sends a lifespan's messages on, and writes what is left before the last of them."""
        if scope["type"] != "lifespan":
            # A type not known is a type not guarded.
            raise NotImplementedError(f"freegpt_auth does not know how to guard a scope of type {scope['type']!r}")
        _lane()  # the first use of anyio imports for 90 ms: here no request waits for that
        return lambda message: self._finish(send, message) if message["type"] in _LAST else send(message)

    async def _finish(self, send: Send, message: Message) -> None:
        # Before it is forwarded: a server stops its loop on this message, and what comes after it is lost.
        self._refusals.finish()
        if self._usage:
            await to_thread.run_sync(self._usage.finish)
        close: Callable[[], None] | None = getattr(self._verifier, "close", None)
        if close is not None:
            await to_thread.run_sync(close)
        await send(message)


def _lane() -> _Lane:
    """Return the lane of the running event loop."""
    lane = _lanes.get(None)
    if lane is None:
        lane = _Lane(anyio.Semaphore(_LANE_WIDTH), anyio.CapacityLimiter(_LANE_WIDTH))
        _lanes.set(lane)
    return lane


def _digests(scope: Scope) -> list[bytes] | Refusal:
    """Return what a request presents, or why it is refused for that."""
    try:
        return presented(scope) or _MISSING
    except MalformedCredentialsError:
        return _MALFORMED


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
