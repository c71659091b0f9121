"""The ASGI shell: scopes and messages in, scopes and messages out. It knows no tokens."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from anyio import to_thread

from .assembly import assemble, told_apart
from .construction import Unusable, warn_if_late
from .copying import Copyable
from .guard import cors, denials
from .guard.authenticator import Decision, Refusal
from .guard.callers import ANONYMOUS, Caller
from .guard.credentials import plain, withdraw
from .guard.delivery import deny_http, deny_websocket, end_http
from .guard.exemptions import is_preflight, is_public
from .guard.judging import MARK, judge
from .guard.lifespan import Lifespan
from .guard.refusal_log import RefusalLog
from .settings import FLUSH_INTERVAL, Settings
from .stores.base import UNRESOLVED

if TYPE_CHECKING:
    from collections.abc import Iterable
    from os import PathLike

    from starlette.types import ASGIApp, Receive, Scope, Send

    from .stores.base import TokenSource

_REQUESTS: tuple[str, ...] = ("http", "websocket")
_UNAVAILABLE = Refusal("unavailable")


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
            :class:`~freegpt_auth.stores.base.TokenSource`. A server whose store is named, here or by the variable, is never
            open. Default: ``FREEGPT_AUTH_STORE``, else ``api_tokens.json`` in the working directory.
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
        ConfigurationError: the settings cannot be used, and no event loop runs. While one runs, a server is constructing
            the middleware, and most servers ignore an exception then. So the error is kept: it fails the startup of the
            lifespan, and a request without a lifespan is answered 503.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        store: str | PathLike[str] | TokenSource | None = None,
        public_paths: Iterable[str] | None = None,
        required: bool | None = None,
        usage: str | PathLike[str] | None = None,
        usage_interval: float = FLUSH_INTERVAL,
        keep_credentials: bool | None = None,
        cors_origins: Iterable[str] | None = None,
    ) -> None:
        self.app = app
        self._guarded = _REQUESTS
        self._unusable: Unusable | None = None
        self._refusals = RefusalLog()
        self._cors_origins: frozenset[str] = frozenset()
        location, self._source = told_apart(store)
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
        except Exception as error:  # noqa: BLE001  whatever it is, most servers would serve all the same
            self._guarded, self._unusable = (), Unusable(error)
            return
        self._public_paths = settings.public_paths
        self._keeps = settings.keep_credentials
        self._cors_origins = settings.cors_origins
        self._authenticator, self._look_ups, self._refusals, self._usage, self._counted = parts
        warn_if_late()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a refusal, or let the application answer."""
        kind = scope["type"]
        if kind not in self._guarded:
            await self._attend(scope, receive, send)
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
        self._name_caller(scope, caller)
        await self.app(scope, receive, send)

    def _name_caller(self, scope: Scope, caller: Caller) -> None:
        """Name the caller to the application, and count the use of the caller's token."""
        if caller is ANONYMOUS:  # a user that an outer middleware set stays
            scope.setdefault("user", caller.user)
            scope.setdefault("auth", caller.auth)
            return
        token, usage = caller.token, self._usage
        if token is not None and usage is not None and scope.get(self._counted) != token.id:
            scope[self._counted] = token.id
            usage.record((token.id, time.time()))
        scope["user"] = caller.user
        scope["auth"] = caller.auth
        scope[MARK] = caller

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
        if decision is UNRESOLVED:
            settled = await self._look_ups.settle(self._peek, self._resolve, scope)
        else:
            settled = decision
        return ANONYMOUS if isinstance(settled, Refusal) and is_preflight(scope) else settled

    def _peek(self, scope: Scope, digest: bytes = b"") -> Decision:
        """Decide from memory: on the event loop."""
        passes = self._authenticator.peek_open()
        if passes is not False:
            return ANONYMOUS if passes is True else UNRESOLVED
        return judge(scope, self._authenticator.peek, self._look_ups.verifier, digest)

    def _resolve(self, scope: Scope) -> Caller | Refusal:
        """Decide from the store: in a thread, where memory cannot."""
        if self._authenticator.resolve_open():
            return ANONYMOUS
        return judge(scope, self._authenticator.resolve, self._look_ups.verifier)

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

    async def _attend(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a lifespan, or a request while the settings cannot be used."""
        kind, unusable = scope["type"], self._unusable
        if kind != "lifespan" and (unusable is None or kind not in _REQUESTS):
            # A type not known is a type not guarded.
            raise NotImplementedError(f"freegpt_auth does not know how to guard a scope of type {kind!r}")
        if unusable is None:
            lifespan = Lifespan(receive, send, self._stop)
            self._look_ups.open(lifespan)
            await lifespan.run(self.app, scope)
        elif kind == "lifespan":
            await unusable.fail(scope, receive, send)
        else:
            unusable.report()
            await self._refuse(scope, receive, send, _UNAVAILABLE)

    async def _stop(self, lifespan: Lifespan) -> None:
        self._refusals.finish()
        if self._usage:
            await to_thread.run_sync(self._usage.finish)
        await self._look_ups.close(lifespan)
