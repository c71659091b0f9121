"""The ASGI shell: scopes and messages in, scopes and messages out. It knows no tokens."""

from __future__ import annotations

import math
import time
from os import PathLike
from typing import TYPE_CHECKING, NamedTuple

import anyio
from anyio import to_thread
from anyio.lowlevel import RunVar

from . import cors, denials
from .authentication import Authenticator, Decision, Refusal
from .bearer import plain, withdraw
from .callers import ANONYMOUS, Caller
from .delivery import deny_http, deny_websocket, end_http
from .exemptions import is_preflight, is_public
from .judging import MARK, judge
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
_UNAVAILABLE = Refusal("unavailable")

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
            :class:`~freegpt_auth.stores.base.Verifier`.
            Default: ``FREEGPT_AUTH_STORE``, else ``api_tokens.json`` in the working directory.
        public_paths: exact paths that need no token. Default: ``FREEGPT_AUTH_PUBLIC_PATHS``, else none.
        required: raise instead of starting in open mode. Default: ``FREEGPT_AUTH_REQUIRED``, else no.
        usage: path of the usage database, or ``off``. Default: ``FREEGPT_AUTH_USAGE``, else beside the tokens;
            with a verifier of one's own: off.
        usage_interval: seconds between two writes of usage: what a killed process can lose.
        keep_credentials: leave the verified credential in the scope, for an application, or a guard over another
            store, that checks the same one. Default: ``FREEGPT_AUTH_KEEP_CREDENTIALS``, else no.
        cors_origins: origins of web pages that may read a refusal, or ``*``; for a guard outside the CORS middleware.
            Default: ``FREEGPT_AUTH_CORS_ORIGINS``, else none.

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
        keep_credentials: bool | None = None,
        cors_origins: Iterable[str] | None = None,
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
            store=location,
            public_paths=public_paths,
            required=required,
            usage=usage,
            usage_interval=usage_interval,
            keep_credentials=keep_credentials,
            cors_origins=cors_origins,
        )
        if verifier is None:
            verifier = open_store(settings.store, lease=settings.lease, cache_limit=settings.cache_limit)
        self._verifier = verifier
        self._look_up_limit: float = getattr(verifier, "look_up_limit", math.inf)
        self._public_paths = settings.public_paths
        self._keeps = settings.keep_credentials
        self._cors_origins = settings.cors_origins
        self._authenticator = Authenticator(verifier, settings.key, required=settings.required)
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
        if self._public_paths and is_public(scope, self._public_paths):
            caller = ANONYMOUS
        else:
            digest, place = plain(scope)
            known = self._authenticator.recognise(digest)
            if known is None:
                known = await self._admit(scope, receive, send, digest)
                if known is None:
                    return
            elif not self._keeps:
                del scope["headers"][place]
            caller = known
            digest = b""  # tracebacks show it, and a key that a person chose can be guessed from its digest
            token = caller.token
            if token is not None and self._usage is not None:
                self._usage.record((token.id, time.time()))
        if caller is ANONYMOUS:  # a user that an outer middleware set stays
            scope.setdefault("user", caller.user)
            scope.setdefault("auth", caller.auth)
        else:
            scope["user"] = caller.user
            scope["auth"] = caller.auth
            scope[MARK] = caller
        await self.app(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send, digest: bytes) -> Caller | None:
        """Return a caller who is not known from an earlier request, without any valid credential left in *scope*.

        ``None`` says that the request was refused.
        """
        decision = await self._decide(scope, digest)
        if isinstance(decision, Refusal):
            await self._refuse(scope, receive, send, decision)
            return None
        if decision is not ANONYMOUS and not self._keeps:
            verified = decision.digest
            withdraw(scope, lambda each: each == verified or self._authenticator.accepts(each))
        return decision

    async def _decide(self, scope: Scope, digest: bytes) -> Caller | Refusal:
        """Decide about a caller who is not known from an earlier request."""
        decision = self._peek(scope, digest)
        settled = await self._in_turn(scope) if decision is UNRESOLVED else decision
        return ANONYMOUS if isinstance(settled, Refusal) and is_preflight(scope) else settled

    def _peek(self, scope: Scope, digest: bytes = b"") -> Decision:
        """Decide from memory: on the event loop."""
        passes = self._authenticator.peek_open()
        if passes is not False:
            return ANONYMOUS if passes is True else UNRESOLVED
        return judge(scope, self._authenticator.peek, self._verifier, digest)

    def _resolve(self, scope: Scope) -> Caller | Refusal:
        """Decide from the store: in a thread, where memory cannot."""
        authenticator = self._authenticator
        return ANONYMOUS if authenticator.resolve_open() else judge(scope, authenticator.resolve, self._verifier)

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
        denial = denials.denial(scope, refusal.reason)
        if self._cors_origins:
            denial = denial._replace(headers=[*denial.headers, *cors.headers_for(scope, self._cors_origins)])
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
