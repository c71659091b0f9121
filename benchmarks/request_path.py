"""In process: the time that a guard adds to a request. The noise of a server and a network would hide it.

Each request presents one of 512 tokens at random, in a new scope with new header objects, as from a server. A benchmark
that repeats one request measures the processor's caches.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import tempfile
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import results
from floor import Floor
from measure import in_turns, over, quartiles, ratios
from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, SimpleUser
from starlette.middleware.authentication import AuthenticationMiddleware
from token_file import write_tokens

from freegpt_auth import BearerTokenMiddleware

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from starlette.requests import HTTPConnection
    from starlette.types import ASGIApp

    Header = tuple[bytes, bytes]

SIZES = (1, 1_000, 100_000)
MIDDLE = 1_000
"""Number of tokens of the rows that are measured with one number only."""

USED = 512
"""Tokens that are presented, of all in the file."""

UNUSED = 30_000
"""Tokens that are presented once, for the first use of each."""

TURN = 64
"""Requests of one turn. Their scopes are made before: 256 would no longer fit into the processor's caches."""

NEVER = 1e6
HEADERS = [
    (b"host", b"localhost:8000"),
    (b"accept-encoding", b"gzip, deflate"),
    (b"connection", b"keep-alive"),
    (b"accept", b"application/json"),
    (b"content-type", b"application/json"),
    (b"user-agent", b"OpenAI/Python 3.54.0"),
    (b"x-stainless-lang", b"python"),
    (b"x-stainless-package-version", b"3.54.0"),
    (b"x-stainless-os", b"Linux"),
    (b"x-stainless-arch", b"x64"),
    (b"x-stainless-runtime", b"CPython"),
    (b"x-stainless-runtime-version", b"3.12.1"),
    (b"x-stainless-async", b"false"),
    (b"x-stainless-retry-count", b"0"),
    (b"x-stainless-read-timeout", b"600"),
]
"""Headers of the openai client. Its credential follows the first twelve."""

LENGTH = (b"content-length", b"120")
BARE = "bare"
_REFUSED = ("missing", "wrong", "wrong, logged")

_logger = logging.getLogger("freegpt_auth")


class Contender(NamedTuple):
    """An application, and the requests to it.

    Attributes:
        app: the guarded application.
        secrets: the secrets to present, one after another.
        present: makes the header that presents a secret; ``None`` for a request without one.
        kind: type of the scope.
        level: level of the library's log.
        body: the requests have a body. To refuse one takes longer: the guard waits for its end.
    """

    app: ASGIApp
    secrets: Iterator[str]
    present: Callable[[str], Header] | None
    kind: str = "http"
    level: int = logging.WARNING
    body: bool = True


class DictBackend(AuthenticationBackend):
    """A backend for Starlette's middleware as in its documentation, with a dict of plain secrets."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self.names = {secret: str(number) for number, secret in enumerate(secrets)}

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser]:
        """Return the caller. Starlette lets a request without credentials pass, so this refuses it."""
        if "Authorization" not in conn.headers:
            raise AuthenticationError("no token")
        try:
            scheme, secret = conn.headers["Authorization"].split()
            if scheme.lower() != "bearer":
                raise AuthenticationError("no token")
            name = self.names[secret]
        except (ValueError, KeyError):
            raise AuthenticationError("invalid token") from None
        return AuthCredentials(["authenticated"]), SimpleUser(name)


def measure(rounds: int) -> list[results.Row]:
    """Measure with each number of tokens."""
    logging.getLogger().addHandler(logging.StreamHandler(Path(os.devnull).open("w")))  # noqa: SIM115  open to the end
    return [row for size in SIZES for row in _measured(size, rounds)]


def _measured(size: int, rounds: int) -> Iterator[results.Row]:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), asyncio.Runner() as runner:
        contenders = _contenders(size)
        for name, contender in contenders.items():
            if name != "first use":
                runner.run(_turn(contender, 3 * USED))  # every token has been used
        figures = in_turns({name: partial(_timed, runner, one) for name, one in contenders.items()}, rounds)
        for contender in contenders.values():
            runner.run(_end(contender.app))
    bare = figures.pop(BARE)
    added = {name: over(values, bare) for name, values in figures.items()}
    for name, values in added.items():
        bases = {"starlette": "starlette", "floor": "floor, refused" if name in _REFUSED else "floor"}
        if name == "valid":
            bases["floor, one carrier"] = "floor, one carrier"
        compared = {title: ratios(values, added[base]) for title, base in bases.items() if name not in bases}
        compared[BARE] = ratios(figures[name], bare)
        yield {
            "name": name,
            "tokens": size,
            "added_ns": quartiles(values),
            "ratios": {title: quartiles(one) for title, one in compared.items()},
        }


def _contenders(size: int) -> dict[str, Contender]:
    """Return the contenders with a file of so many tokens. The working directory is empty."""
    path = os.path.abspath("tokens.json")
    secrets = write_tokens(Path(path), size)
    used = _drawn(random.sample(secrets, min(size, USED)))
    guard, floor = _guard(path), Floor(_application, secrets, path)
    one_carrier = Floor(_application, secrets, path, one_carrier=True)
    starlette = AuthenticationMiddleware(_application, DictBackend(secrets))
    contenders = {
        BARE: Contender(_application, used, _bearer),
        "valid": Contender(guard, used, _bearer),
        "floor": Contender(floor, used, _bearer),
        "floor, one carrier": Contender(one_carrier, used, _bearer),
        "starlette": Contender(starlette, used, _bearer),
    }
    if size == MIDDLE:
        contenders |= _others(floor)
    elif size > UNUSED:
        contenders["first use"] = Contender(_guard(path), cycle(random.sample(secrets, UNUSED)), _bearer)
    return contenders


def _others(floor: ASGIApp) -> dict[str, Contender]:
    """Return the contenders for other modes, carriers and refusals.

    Their tokens are in another file: guards over one file share its callers, so "valid" would find its own in the
    processor's caches, where the floor does not.
    """
    secrets = write_tokens(Path("others.json"), MIDDLE)
    expiring = write_tokens(Path("expiring.json"), MIDDLE, datetime.now(UTC) + timedelta(days=1))
    used, guard, key = _drawn(random.sample(secrets, USED)), _guard("others.json"), secrets[0]
    wrong = _drawn([f"sk-{number:049}" for number in range(USED)])
    return {
        "expiring": Contender(_guard("expiring.json"), _drawn(random.sample(expiring, USED)), _bearer),
        "x-api-key": Contender(guard, used, _x_api_key),
        "websocket": Contender(guard, used, _bearer, "websocket"),
        "environment key": Contender(_guard(None, key), cycle([key]), _bearer),
        "environment key is a token": Contender(_guard("others.json", key), cycle([key]), _bearer),
        "open": Contender(_guard(None), used, _bearer),
        "missing": Contender(guard, used, None, body=False),
        "wrong": Contender(guard, wrong, _bearer, body=False),
        "wrong, logged": Contender(guard, wrong, _bearer, level=logging.INFO, body=False),
        "floor, refused": Contender(floor, wrong, _bearer, body=False),
    }


def _guard(path: str | None, key: str = "") -> BearerTokenMiddleware:
    usage = "off" if path is None else f"{path}.usage.db"
    with patch.dict(os.environ, {"FREEGPT_API_KEY": key} if key else {}):
        return BearerTokenMiddleware(_application, store=path, usage=usage, usage_interval=NEVER)


def _drawn(secrets: list[str]) -> Iterator[str]:
    while True:
        yield random.choice(secrets)  # noqa: S311


def _bearer(secret: str) -> Header:
    return b"authorization", b"Bearer " + secret.encode()


def _x_api_key(secret: str) -> Header:
    return b"x-api-key", secret.encode()


def _scope(contender: Contender) -> dict[str, Any]:
    """Return a new scope. Of equal bytes only the same object has its hash computed: a server makes new ones."""
    presented = [] if contender.present is None else [contender.present(next(contender.secrets))]
    headers = [*HEADERS[:12], *presented, *HEADERS[12:], *([LENGTH] if contender.body else [])]
    return {
        "type": contender.kind,
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "root_path": "",
        "headers": [(bytes(bytearray(name)), bytes(bytearray(value))) for name, value in headers],
        "client": ("127.0.0.1", 50_000),
        "server": ("127.0.0.1", 8000),
    }


def _timed(runner: asyncio.Runner, contender: Contender) -> float:
    return runner.run(_turn(contender))


async def _turn(contender: Contender, requests: int = TURN) -> float:
    """Return the nanoseconds of one request."""
    scopes, app = [_scope(contender) for _ in range(requests)], contender.app
    _logger.setLevel(contender.level)
    began = time.perf_counter_ns()
    for scope in scopes:
        await app(scope, _receive, _send)
    return (time.perf_counter_ns() - began) / requests


async def _end(app: ASGIApp) -> None:
    """Run the lifespan, whose end writes the recorded uses."""
    events = iter(["startup", "shutdown"])

    async def receive() -> Any:
        return {"type": f"lifespan.{next(events)}"}

    await app({"type": "lifespan"}, receive, _send)


async def _application(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def _receive() -> Any:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _send(_message: Any) -> None:
    pass


if __name__ == "__main__":
    results.main("request_path", measure, rounds=151)
