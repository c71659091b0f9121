"""The ASGI shell: scopes and messages in, scopes and messages out. It knows no tokens."""

from __future__ import annotations

import time
from os import PathLike
from typing import TYPE_CHECKING

from anyio import to_thread

from . import denials
from .assembly import assemble
from .authentication import Decision, Refusal
from .bearer import plain_digest, presented, without_secret
from .callers import ANONYMOUS, Caller
from .construction import Unusable, warn_if_late
from .copying import Copyable
from .delivery import deny_http, deny_websocket, end_http
from .exceptions import MalformedCredentialsError
from .lifespan import Lifespan
from .refusals import RefusalLog
from .settings import FLUSH_INTERVAL, Settings
from .stores.base import UNRESOLVED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import ASGIApp, Receive, Scope, Send

    from .stores.base import Verifier

_REQUESTS: tuple[str, ...] = ("http", "websocket")
_MISSING, _MALFORMED, _UNAVAILABLE = Refusal("missing"), Refusal("malformed"), Refusal("unavailable")


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
            :class:`~freegpt_auth.stores.base.Verifier`. A server whose store is named, here or by the variable, is never
            open. Default: ``FREEGPT_AUTH_STORE``, else ``api_tokens.json`` in the working directory.
        public_paths: exact paths that need no token. Default: ``FREEGPT_AUTH_PUBLIC_PATHS``, else none.
        required: raise instead of starting in open mode. Default: ``FREEGPT_AUTH_REQUIRED``, else no.
        usage: path of the usage database, or ``off``. Default: ``FREEGPT_AUTH_USAGE``, else beside the tokens;
            with a verifier of one's own: off.
        usage_interval: seconds between two writes of usage: what a killed process can lose.

    Raises:
        ConfigurationError: the settings cannot be used, and no event loop runs. While one runs, a server is constructing
            the middleware, and most servers ignore an exception then. So the error is kept: it fails the startup of the
            lifespan, and a request without a lifespan is answered 503.
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
        self._guarded = _REQUESTS
        self._unusable: Unusable | None = None
        self._refusals = RefusalLog()
        location: str | PathLike[str] | None = None
        self._source: Verifier | None = None
        if store is None or isinstance(store, (str, PathLike)):
            location = store
        else:
            self._source = store
            usage = "off" if usage is None else usage
        try:
            self._settings = Settings.from_env(
                store=location, public_paths=public_paths, required=required, usage=usage, usage_interval=usage_interval
            )
            parts = assemble(self._settings, self._source)
        except Exception as error:  # noqa: BLE001  whatever it is, most servers would serve all the same
            self._guarded, self._unusable = (), Unusable(error)
            return
        self._public_paths = self._settings.public_paths
        self._authenticator, self._look_ups, self._refusals, self._usage, self._counted = parts
        warn_if_late()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a refusal, or let the application answer."""
        kind = scope["type"]
        if kind not in self._guarded:
            await self._attend(scope, receive, send)
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
            token, usage = caller.token, self._usage
            if token is not None and usage is not None and self._counted not in scope:
                scope[self._counted] = True
                usage.record((token.id, time.time()))
        if kind == "websocket":
            scope = without_secret(scope)
        scope["user"] = caller.user
        scope["auth"] = caller.auth
        await self.app(scope, receive, send)

    async def _decide(self, scope: Scope, digest: bytes | None) -> Caller | Refusal:
        """Decide about a caller who is not known from an earlier request."""
        decision = self._peek(scope, digest)
        if decision is UNRESOLVED:
            settled = await self._look_ups.settle(self._peek, self._resolve, scope)
        else:
            settled = decision
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
            await unusable.fail(receive, send)
        else:
            unusable.report()
            await self._refuse(scope, receive, send, _UNAVAILABLE)

    async def _stop(self, lifespan: Lifespan) -> None:
        self._refusals.finish()
        if self._usage:
            await to_thread.run_sync(self._usage.finish)
        await self._look_ups.close(lifespan)


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
