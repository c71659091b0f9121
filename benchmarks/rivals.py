"""Other ways to guard an ASGI application, each in the fastest configuration that its own documentation allows.

Every one gets the same secrets and the same application, and must let a right secret through and refuse a wrong one:
run this file to see that it does. Requests must be for a path under ``/v1``, since that is all that vLLM guards.
"""

# Annotations are not postponed here: FastAPI evaluates them, and cannot see the names of the function it is built in.
import asyncio
import os
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from hashlib import sha256, sha512
from secrets import compare_digest
from typing import Annotated, Any, NamedTuple

from argon2 import PasswordHasher
from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_key_auth import AuthorizerMiddleware
from keygate import KeyGate
from keygate.keys import hash_key
from keygate.models import ApiKeyRow
from keyshield import ApiKeyService
from keyshield.api import create_depends_api_key
from keyshield.hasher.argon2 import Argon2ApiKeyHasher
from keyshield.repositories.in_memory import InMemoryApiKeyRepository
from keyshield.services.cached import CachedApiKeyService
from sqlalchemy import create_engine, insert
from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, SimpleUser
from starlette.datastructures import Headers
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Header = tuple[bytes, bytes]


class Rival(NamedTuple):
    """One way to guard an application.

    Attributes:
        title: what a reader knows it by.
        requirement: the package and version that was measured.
        build: makes, of the valid secrets and an application, the guarded application. Needs no event loop.
        header: makes, of a secret, the header that presents it. Tells the same in every process.
        sizes: for how many tokens it can be measured; :data:`LEFT_OUT` says why not for others.
    """

    title: str
    requirement: str
    build: Callable[[list[str], ASGIApp], ASGIApp]
    header: Callable[[str], Header]
    sizes: tuple[int, ...] = (1, 1_000, 100_000)


def bearer(secret: str) -> Header:
    """Present *secret* as RFC 6750 says, which all understand that have no format of their own."""
    return b"authorization", b"Bearer " + secret.encode()


# --- Starlette's AuthenticationMiddleware, starlette 1.10.0, twice: with a backend as its documentation writes them, and
# with the least that can be written. Both look plain secrets up in a dict. A refusal is a 400, its default.


class _DocumentedBackend(AuthenticationBackend):
    """Does what the example in Starlette's documentation does, for the bearer scheme and a dict of secrets."""

    def __init__(self, secrets: list[str]) -> None:
        self.names = {secret: str(number) for number, secret in enumerate(secrets)}

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser]:
        """Return who calls. Starlette lets a request without credentials through, so it is refused here."""
        if "Authorization" not in conn.headers:
            raise AuthenticationError("no token")
        auth = conn.headers["Authorization"]
        try:
            scheme, secret = auth.split()
            if scheme.lower() != "bearer":
                raise AuthenticationError("no token")
            name = self.names[secret]
        except (ValueError, KeyError):
            raise AuthenticationError("invalid token") from None
        return AuthCredentials(["authenticated"]), SimpleUser(name)


class _LeastBackend(AuthenticationBackend):
    def __init__(self, secrets: list[str]) -> None:
        auth = AuthCredentials(["authenticated"])
        self.callers = {secret: (auth, SimpleUser(str(number))) for number, secret in enumerate(secrets)}

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser]:
        """Return who calls. Starlette lets a request without credentials through, so it is refused here."""
        scheme, _, secret = conn.headers.get("Authorization", "").partition(" ")
        caller = self.callers.get(secret) if scheme.lower() == "bearer" else None
        if caller is None:
            raise AuthenticationError("invalid token")
        return caller


def _starlette(secrets: list[str], app: ASGIApp) -> ASGIApp:
    return AuthenticationMiddleware(app, _DocumentedBackend(secrets))


def _starlette_least(secrets: list[str], app: ASGIApp) -> ASGIApp:
    return AuthenticationMiddleware(app, _LeastBackend(secrets))


# --- vLLM's AuthenticationMiddleware, vllm/entrypoints/serve/middleware/authenticate.py at commit baaf6e9: vLLM needs
# gigabytes and a GPU's libraries to be installed, so this does the same work in its place. It has no settings. Like
# vLLM's, __call__ is no coroutine function, which saves a frame, and for which uvicorn must be told interface="asgi3".


class _EachInTurn:
    """Compares the digest of what is presented with that of every token, and does not stop at the right one."""

    guarded = ("/v1", "/v2", "/inference", "/cohere")

    def __init__(self, app: ASGIApp, secrets: list[str]) -> None:
        self.app = app
        self.digests = [sha256(secret.encode()).digest() for secret in secrets]

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] not in ("http", "websocket") or scope.get("method") == "OPTIONS":
            return self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        headers = Headers(scope=scope)
        if path.startswith(self.guarded) and not self.knows(headers):
            return JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
        return self.app(scope, receive, send)

    def knows(self, headers: Headers) -> bool:
        """Tell whether one of the tokens is presented."""
        scheme, _, secret = headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        presented = sha256(secret.encode()).digest()
        found = False
        for digest in self.digests:
            found |= compare_digest(presented, digest)
        return found


def _vllm(secrets: list[str], app: ASGIApp) -> ASGIApp:
    return _EachInTurn(app, secrets)


# --- fastapi-key-auth 0.15.5, AuthorizerMiddleware. Its keys are environment variables whose names begin with a
# pattern, and every request goes through the whole environment. No public paths: that is its fastest.

_VARIABLE = "RIVAL_API_KEY_"


def _key_auth(secrets: list[str], app: ASGIApp) -> ASGIApp:
    """Guard with *secrets* alone. The guard built before loses its own, since they would slow this one."""
    for name in [name for name in os.environ if name.startswith(_VARIABLE)]:
        del os.environ[name]
    os.environ.update({f"{_VARIABLE}{number}": secret for number, secret in enumerate(secrets)})
    return AuthorizerMiddleware(app, key_pattern=_VARIABLE)


def _key_auth_header(secret: str) -> Header:
    return b"x-api-key", secret.encode()


# --- BaseHTTPMiddleware, starlette 1.10.0: what most tutorials show, with one look-up in a dict of plain secrets.


def _base_http(secrets: list[str], app: ASGIApp) -> ASGIApp:
    callers = {secret: number for number, secret in enumerate(secrets)}

    async def dispatch(request: Request, call_next: RequestResponseEndpoint) -> Response:
        scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or secret not in callers:
            return PlainTextResponse("invalid token", 401)
        return await call_next(request)

    return BaseHTTPMiddleware(app, dispatch)


# --- What guards a FastAPI route and not an application, fastapi 0.165.0. It is put before the application by a route
# that hands every request on to it. FastAPI's own work is no part of the guard: take on_fastapi(app) away from the
# figures.


class _Forward(Response):
    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


def on_fastapi(app: ASGIApp, *guards: Callable[..., Any]) -> FastAPI:
    """Put FastAPI before *app*, with *guards* as dependencies of its only route."""
    outer = FastAPI(openapi_url=None)  # else four routes for the documentation are tried before this one
    answer = _Forward(app)

    async def forward() -> Response:
        return answer

    methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    dependencies = [Depends(guard) for guard in guards]
    outer.add_api_route("/{path:path}", forward, methods=methods, dependencies=dependencies)
    return outer


# --- A FastAPI dependency: HTTPBearer, and one look-up in a dict of plain secrets. Asynchronous, else it runs in a
# thread.


def _dependency(secrets: list[str], app: ASGIApp) -> ASGIApp:
    callers = {secret: number for number, secret in enumerate(secrets)}

    async def caller(credentials: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]) -> int:
        number = callers.get(credentials.credentials)
        if number is None:
            raise HTTPException(401)
        return number

    return on_fastapi(app, caller)


# --- keyshield 2.0.1, its FastAPI dependency, keys in its InMemoryApiKeyRepository, the fastest it has. At its fastest:
# verified keys are cached, no delay, and the cheapest Argon2, which is enough for random secrets. With its defaults:
# Argon2 as it comes (64 MiB, 3 passes), a delay of 0.1 to 0.3 s after every request, no cache. Keys have a format of
# its own.


def _keyshield_parts(secret: str) -> tuple[str, str]:
    """Return the id and the secret of the key that stands for *secret*, as long as those that keyshield makes."""
    digits = sha512(secret.encode()).hexdigest()
    return digits[:16], digits[16:80]


def _keyshield_header(secret: str) -> Header:
    return bearer("ak_v1-{}-{}".format(*_keyshield_parts(secret)))


def _keyshield(secrets: list[str], app: ASGIApp) -> ASGIApp:
    cheapest = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    hasher = Argon2ApiKeyHasher("pepper", cheapest)
    service = CachedApiKeyService(InMemoryApiKeyRepository(), hasher, cache_ttl=3_600, min_delay=0, max_delay=0)
    return _with_keyshield(service, secrets, app)


def _keyshield_defaults(secrets: list[str], app: ASGIApp) -> ASGIApp:
    service = ApiKeyService(InMemoryApiKeyRepository(), Argon2ApiKeyHasher("pepper"))
    return _with_keyshield(service, secrets, app)


def _with_keyshield(service: ApiKeyService, secrets: list[str], app: ASGIApp) -> ASGIApp:
    async def create_keys() -> None:
        for key_id, key_secret in map(_keyshield_parts, secrets):
            await service.create(key_id=key_id, key_secret=key_secret)

    async def provide() -> ApiKeyService:
        return service

    _run(create_keys())
    return on_fastapi(app, create_depends_api_key(provide))


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run *work* to its end, even if this thread already has a running event loop."""
    with ThreadPoolExecutor(1) as executor:
        executor.submit(asyncio.run, work).result()


# --- fastapi-keygate 0.5.1, KeyGate.require with its default database, an SQLite file; one in memory is no faster, and
# AsyncKeyGate takes twice as long. At its fastest: no rate limit, and its log of usage not installed. Keys have a
# format of its own and cannot be chosen, so its table is filled here, with its own model and digest.


def _keygate_parts(secret: str) -> tuple[str, str]:
    """Return the public prefix of the key that stands for *secret*, and the key.

    The prefix takes the whole column. KeyGate's own has 32 bits: of 100,000, two are the same in 69 of 100 tables, and
    creating the second one fails.
    """
    digits = sha512(secret.encode()).hexdigest()
    return digits[:16], f"kg_{digits[:16]}_{digits[16:59]}"


def _keygate_header(secret: str) -> Header:
    return b"x-api-key", _keygate_parts(secret)[1].encode()


def _keygate(secrets: list[str], app: ASGIApp) -> ASGIApp:
    folder = tempfile.mkdtemp()
    url = f"sqlite:///{folder}/keygate.db"
    gate = KeyGate(db_url=url)
    now = datetime.now(UTC).replace(tzinfo=None)
    rows = [
        {"prefix": prefix, "key_hash": hash_key(key), "owner_id": "owner", "created_at": now}
        for prefix, key in map(_keygate_parts, secrets)
    ]
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(insert(ApiKeyRow), rows)
    engine.dispose()
    outer = on_fastapi(app, gate.require)
    weakref.finalize(outer, shutil.rmtree, folder)
    return outer


RIVALS = {
    "starlette": Rival("Starlette, backend as documented", "starlette==1.10.0", _starlette, bearer),
    "starlette-least": Rival("Starlette, least backend", "starlette==1.10.0", _starlette_least, bearer),
    "vllm": Rival("vLLM's AuthenticationMiddleware", "vllm @ baaf6e9, the same work", _vllm, bearer),
    "fastapi-key-auth": Rival(
        "fastapi-key-auth", "fastapi-key-auth==0.15.5", _key_auth, _key_auth_header, sizes=(1, 1_000)
    ),
    "base-http": Rival("BaseHTTPMiddleware + dict", "starlette==1.10.0", _base_http, bearer),
    "dependency": Rival("FastAPI dependency, HTTPBearer + dict", "fastapi==0.165.0", _dependency, bearer),
    "keyshield": Rival(
        "keyshield, cached, no delay", "keyshield==2.0.1", _keyshield, _keyshield_header, sizes=(1, 1_000)
    ),
    "keyshield-defaults": Rival(
        "keyshield, its defaults", "keyshield==2.0.1", _keyshield_defaults, _keyshield_header, sizes=(1,)
    ),
    "fastapi-keygate": Rival("fastapi-keygate", "fastapi-keygate==0.5.1", _keygate, _keygate_header),
}

ON_FASTAPI = frozenset({"dependency", "keyshield", "keyshield-defaults", "fastapi-keygate"})
"""Those whose figures hold FastAPI's own work: see :func:`on_fastapi`."""

LEFT_OUT = {
    (
        "fastapi-key-auth",
        100_000,
    ): "its keys are environment variables: 8 MB of them, and Linux starts no process with over 6",
    (
        "keyshield",
        100_000,
    ): "its fastest store compares each new key with all others: five minutes and more to create them",
    (
        "keyshield-defaults",
        1_000,
    ): "Argon2 takes 70 ms and more to create a key: over a minute before the first request",
    ("keyshield-defaults", 100_000): "Argon2 takes 70 ms and more to create a key: two hours before the first request",
}
"""Why a rival is not measured with so many tokens."""


PASSED = 200
REFUSED = frozenset({400, 401, 403})


def check(app: ASGIApp, header: Header | None) -> bool:
    """Tell whether *app* lets a request with *header* through.

    Raises:
        RuntimeError: it neither let it through nor refused it.
    """
    status = asyncio.run(_ask(app, header))
    if status != PASSED and status not in REFUSED:
        raise RuntimeError(f"neither accepted nor refused: status {status}")
    return status == PASSED


async def _ask(app: ASGIApp, header: Header | None) -> int:
    status = 0

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/v1/models",
        "raw_path": b"/v1/models",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost"), *([header] if header else [])],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 8000),
    }
    await app(scope, receive, send)
    return status


async def _microseconds(app: ASGIApp, header: Header, budget: float = 0.3, most: int = 2_000) -> float:
    """Return what a request takes: a rough figure, to see that nothing is out of order."""
    await _ask(app, header)
    begin = time.perf_counter()
    done = 0
    while not done or (done < most and time.perf_counter() - begin < budget):
        await _ask(app, header)
        done += 1
    return (time.perf_counter() - begin) / done * 1e6


async def _application(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"passed"})


def _line(rival: Rival, size: int) -> tuple[bool, str]:
    """Check one guard, and return whether it does its work and a line of the report."""
    secrets = [f"sk-{number:043}" for number in range(size)]
    begin = time.perf_counter()
    app = rival.build(secrets, _application)
    built = time.perf_counter() - begin
    right, wrong = rival.header(secrets[-1]), rival.header("sk-wrong")
    accepted = check(app, rival.header(secrets[0])) and check(app, right)
    refused = not check(app, wrong) and not check(app, None)
    passing, failing = (asyncio.run(_microseconds(app, header)) for header in (right, wrong))
    words = f"{'accepted' if accepted else 'NOT ACCEPTED'} {'refused' if refused else 'NOT REFUSED'}"
    return accepted and refused, f"{words} {passing:12,.1f} us {failing:12,.1f} us  built in {built:.1f} s"


def main() -> None:
    """Check every rival with every number of tokens, and fail if one of them does not guard."""
    failed = False
    for name, rival in RIVALS.items():
        for size in (1, 1_000, 100_000):
            if size in rival.sizes:
                good, line = _line(rival, size)
            else:
                good, line = True, LEFT_OUT[name, size]
            failed |= not good
            sys.stdout.write(f"{rival.title:42} {rival.requirement:30} {size:7,}  {line}\n")
    floors: dict[str, ASGIApp] = {"nothing": _application, "FastAPI, nothing guarded": on_fastapi(_application)}
    for title, app in floors.items():
        figure = asyncio.run(_microseconds(app, bearer("")))
        sys.stdout.write(f"{title:99} {figure:12,.1f} us\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
