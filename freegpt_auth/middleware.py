"""The ASGI shell: it passes each request on, or refuses it; the parts in ``guard`` decide."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from anyio import to_thread

from .assembly import assemble, location_or_source
from .construction import Unusable, warn_if_late
from .copying import Copyable
from .guard import cors, denials
from .guard.callers import ANONYMOUS, MARK, Caller
from .guard.credentials import Presented, presented, withdraw
from .guard.delivery import deny_http, deny_websocket, end_http
from .guard.exemptions import is_preflight, is_public
from .guard.lifespan import Lifespan
from .guard.modes import AuthMode
from .guard.refusal import UNAVAILABLE, Refusal
from .guard.refusal_log import RefusalLog
from .settings import USAGE_INTERVAL, Settings
from .stores.base import UNRESOLVED

if TYPE_CHECKING:
    from collections.abc import Iterable
    from os import PathLike

    from starlette.types import ASGIApp, Receive, Scope, Send

    from .stores.base import TokenSource

_REQUESTS: tuple[str, ...] = ("http", "websocket")
_UNREAD = Presented([])


class BearerTokenMiddleware(Copyable):
    """Lets a request through to *app* only with a valid bearer token or key.

    With no argument but *app* it is complete: everything else comes from the environment, see
    :meth:`freegpt_auth.Settings.from_env`. An argument wins over its variable.

    ``http`` and ``websocket`` are guarded alike, ``lifespan`` passes, and any other type of scope is an error. The
    application finds the caller in ``scope["user"]`` and ``scope["auth"]``, so Starlette's ``request.user``,
    ``request.auth.scopes`` and ``@requires`` work.

    Args:
        app: the application to protect.
        store: where the tokens are: a path, a ``postgresql://`` URL, or any
            :class:`~freegpt_auth.stores.base.TokenSource`. A server whose store is named, here or by the variable, is
            never open. Default: ``FREEGPT_AUTH_STORE``, else ``api_tokens.json`` in the working directory.
        public_paths: exact paths that need no token. Default: ``FREEGPT_AUTH_PUBLIC_PATHS``, else none.
        required: raise instead of starting in open mode. Default: ``FREEGPT_AUTH_REQUIRED``, else no.
        usage: path of the usage database, or ``off``. Default: ``FREEGPT_AUTH_USAGE``, else beside the tokens;
            with a token source of one's own: off.
        usage_interval: seconds between two writes of usage: a killed process loses the uses since the last.
        keep_credentials: leave the verified credential in the scope, for an application, or a guard over another
            store, that checks the same one. Default: ``FREEGPT_AUTH_KEEP_CREDENTIALS``, else no.
        cors_origins: origins of web pages that may read a refusal, or ``*``; for a guard outside the CORS middleware.
            Default: ``FREEGPT_AUTH_CORS_ORIGINS``, else none.

    Raises:
        ConfigurationError: the settings cannot be used, and no event loop runs. While one runs, a server is
            constructing the middleware, and most servers ignore an exception then. So the error is kept: it fails the
            startup of the lifespan, and a request without a lifespan is answered 503.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        store: str | PathLike[str] | TokenSource | None = None,
        public_paths: Iterable[str] | None = None,
        required: bool | None = None,
        usage: str | PathLike[str] | None = None,
        usage_interval: float = USAGE_INTERVAL,
        keep_credentials: bool | None = None,
        cors_origins: Iterable[str] | None = None,
    ) -> None:
        self.app = app
        self._guarded = _REQUESTS
        self._unusable: Unusable | None = None
        self._refusals = RefusalLog()
        self._cors_origins: frozenset[str] = frozenset()
        location, self._source = location_or_source(store)
        try:
            settings = self._settings = Settings.from_env(
                store=location,
                public_paths=public_paths,
                required=required,
                usage="off" if usage is None and self._source is not None else usage,
                usage_interval=usage_interval,
                keep_credentials=keep_credentials,
                cors_origins=cors_origins,
            )
            parts = assemble(settings, self._source)
        except Exception as error:  # noqa: BLE001  most servers serve in spite of any exception
            self._guarded, self._unusable = (), Unusable(error)
            return
        self._public_paths = settings.public_paths
        self._keeps = settings.keep_credentials
        self._cors_origins = settings.cors_origins
        self._authenticator, self._look_ups, self._refusals, self._usage, self._counted = parts
        warn_if_late()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application, or refuse it."""
        if scope["type"] not in self._guarded or (self._public_paths and is_public(scope, self._public_paths)):
            await self._serve_unguarded(scope, receive, send)
            return
        caller, digest, place = self._authenticator.recognise(scope)
        if caller is None:
            caller = await self._admit(scope, receive, send, digest, place)
            if caller is None:
                return
        elif not self._keeps:
            del scope["headers"][place]
        digest = b""  # a traceback may show it, and a key that a person chose can be guessed from its digest
        # Not in a function of its own: a call takes 2 % of the whole.
        token_id, usage = caller.token_id, self._usage
        if token_id is not None and usage is not None and scope.get(self._counted) != token_id:
            scope[self._counted] = token_id
            usage.record((token_id, time.time()))
        scope["user"] = caller.user
        scope["auth"] = caller.auth
        scope[MARK] = caller
        await self.app(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send, digest: bytes, place: int) -> Caller | None:
        """Return the caller of a request that was not recognised, and remove its valid credentials from *scope*.

        ``None`` stands for a request that was refused, or passed on without a caller.
        """
        authenticator = self._authenticator
        # Credentials are read only once the server may be closed.
        is_open = not digest and authenticator.mode is AuthMode.OPEN
        decision = authenticator.peek(_UNREAD) if is_open else UNRESOLVED
        if decision is not ANONYMOUS:
            credentials = self._read(scope, digest, place)
            decision = authenticator.peek(credentials)
            if decision is UNRESOLVED:
                decision = await self._look_ups.look_up(authenticator, credentials)
        if isinstance(decision, Refusal):
            if not is_preflight(scope):
                await self._refuse(scope, receive, send, decision)
                return None
            decision = ANONYMOUS
        if decision is ANONYMOUS:
            _name_anonymous(scope)
            await self.app(scope, receive, send)
            return None
        if not self._keeps:
            verified = decision.digest
            withdraw(scope, lambda each: each == verified or self._is_valid(each))
        return decision

    def _read(self, scope: Scope, digest: bytes, place: int) -> Presented:
        """Return the credentials of a request, read once.

        An outer guard over the same source may have verified and removed one: its digest is verified again, after the
        credentials still sent. An application may have put new ones into a copy of the scope.
        """
        credentials = presented(scope, digest, place)
        outer = scope.get(MARK)
        if isinstance(outer, Caller) and outer.source is self._look_ups.source:
            credentials.digests.append(outer.digest)
        return credentials

    def _is_valid(self, digest: bytes) -> bool:
        """Return whether memory alone shows that a secret is valid."""
        return isinstance(self._authenticator.peek(Presented([digest])), Caller)

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
            self._refusals.log(scope, refusal)  # after the answer: the client does not wait for the log
        if unfinished:
            await end_http(receive, send)

    async def _serve_unguarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a public path or a lifespan, or refuse a request while the settings cannot be used.

        Raises:
            NotImplementedError: the type of *scope* is unknown, so it cannot be guarded.
        """
        kind, unusable = scope["type"], self._unusable
        if kind in self._guarded:
            _name_anonymous(scope)
            await self.app(scope, receive, send)
            return
        if kind != "lifespan" and (unusable is None or kind not in _REQUESTS):
            raise NotImplementedError(f"freegpt_auth does not know how to guard a scope of type {kind!r}")
        if unusable is None:
            lifespan = Lifespan(receive, send, self._stop)
            self._look_ups.open(lifespan)
            await lifespan.run(self.app, scope)
        elif kind == "lifespan":
            await unusable.fail(scope, receive, send)
        else:
            unusable.report()
            await self._refuse(scope, receive, send, UNAVAILABLE)

    async def _stop(self, lifespan: Lifespan) -> None:
        self._refusals.finish()
        if self._usage:
            await to_thread.run_sync(self._usage.finish)
        await self._look_ups.close(lifespan)


def _name_anonymous(scope: Scope) -> None:
    """Put the caller of a request without authentication into *scope*; a user that an outer middleware set stays."""
    scope.setdefault("user", ANONYMOUS.user)
    scope.setdefault("auth", ANONYMOUS.auth)
