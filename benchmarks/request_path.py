"""What guarding adds to each request, in process: no server and no network, which would hide it in their own noise."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from floor import Floor
from measure import TIMES, Result, in_turns, over, ratio, spread
from rivals import LEFT_OUT, ON_FASTAPI, RIVALS, on_fastapi
from token_file import write_tokens

from freegpt_auth import BearerTokenMiddleware

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from measure import Spread
    from starlette.types import ASGIApp

SIZES = (1, 1_000, 100_000)
ROUNDS = 25
TURN = 0.004
"""Seconds of one turn: short against the drift of a machine's speed, long against the clock's resolution."""

NEVER = 1e6
OURS, FLOOR, BARE, BARE_FASTAPI = "freegpt_auth", "the floor", "no guard", "FastAPI, no guard"
REFUSED, FLOOR_REFUSED = "freegpt_auth, wrong token", "the floor, wrong token"
REFUSED_BODY, FLOOR_REFUSED_BODY = "freegpt_auth, wrong token, body", "the floor, wrong token, body received"
PUBLIC, LIFESPAN, BARE_LIFESPAN = "freegpt_auth, public path", "freegpt_auth, lifespan", "no guard, lifespan"

NOTES = {
    PUBLIC: "0.22 µs of it are one more call of an ASGI application and two entries in the scope.",
    LIFESPAN: "Once in the life of a process. It makes ready what the first look-up would otherwise wait 90 ms for.",
    REFUSED: "About 2 µs, which the floor leaves out, see to it that all refusals take the same time, whatever is known of "
    "the token, and that a client may be uploading.",
    REFUSED_BODY: "About 6 µs more are the time limit for a body that does not come: a cancel scope of anyio.",
}
"""Where the time goes that the floor does not take, by leaving one part out after the other."""

# What OpenAI's Python client sends.
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
LENGTH = (b"content-length", b"120")


class Turn(NamedTuple):
    """What one contender does when it is its turn.

    Attributes:
        app: what is called.
        header: what is presented.
        path: what is asked for.
        kind: the type of the scope.
        body: whether the request has a body.
        after: what clears up, outside the measured time.
    """

    app: ASGIApp
    header: tuple[bytes, bytes] | None = None
    path: str = "/v1/chat/completions"
    kind: str = "http"
    body: bool = True
    after: Callable[[], object] = tuple


def measure() -> Iterator[Result]:
    """Measure with one token, a thousand and a hundred thousand."""
    for size in SIZES:
        figures = take(size)
        added = {name: over(values, figures[_base(name)]) for name, values in figures.items() if _base(name)}
        section = f"Added to each request, {size:,} token{'s' * (size > 1)}"
        for name, values in added.items():
            target = 0.3 if name in (PUBLIC, LIFESPAN) else None
            title = RIVALS[name].title if name in RIVALS else name
            yield Result(section, title, spread(values), "µs", target, note=NOTES.get(name, ""))
        yield Result(section, "freegpt_auth / the floor", ratio(added[OURS], added[FLOOR]), TIMES, 1.25)
        for name in ("starlette", "starlette-least"):
            title = f"freegpt_auth / {RIVALS[name].title}"
            yield Result(section, title, ratio(added[OURS], added[name]), TIMES, 0.75)
        if size == 1:
            yield Result(section, "freegpt_auth / vLLM", ratio(added[OURS], added["vllm"]), TIMES, 0.8)
        for name, base, target in (
            (REFUSED, FLOOR_REFUSED, 2.0),
            (REFUSED_BODY, FLOOR_REFUSED, 2.0),
            (REFUSED_BODY, FLOOR_REFUSED_BODY, None),
        ):
            yield Result(section, f"{name} / {base}", ratio(added[name], added[base]), TIMES, target)


def charted(results: Iterable[Result]) -> dict[str, dict[str, Spread]]:
    """Return what each guard adds to a request with a valid token, by the number of tokens."""
    guards = {OURS, FLOOR, *(rival.title for rival in RIVALS.values())}
    figures: dict[str, dict[str, Spread]] = {}
    for result in results:
        if result.name in guards:
            figures.setdefault(result.name, {})[result.section.rpartition(", ")[2]] = result.figure
    return figures


def left_out() -> list[str]:
    """Return what was not measured, and why."""
    return [f"{RIVALS[name].title}, {size:,} tokens: {reason}" for (name, size), reason in LEFT_OUT.items()]


def take(size: int) -> dict[str, list[float]]:
    """Return the microseconds of a request, round by round, of every contender."""
    with tempfile.TemporaryDirectory() as folder:
        secrets = write_tokens(Path(folder, "api_tokens.json"), size)
        contenders = guarded(folder, secrets)
        loop = asyncio.new_event_loop()
        figures = in_turns({name: clocked(loop, turn) for name, turn in contenders.items()}, ROUNDS)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
    return figures


def guarded(folder: str, secrets: list[str]) -> dict[str, Turn]:
    """Return every contender, ready for its turn."""
    path = f"{folder}/api_tokens.json"
    ours = BearerTokenMiddleware(application, store=path, usage_interval=NEVER)
    with_public_path = BearerTokenMiddleware(application, store=path, usage="off", public_paths=["/health"])
    floor = Floor(application, secrets, path)
    right, wrong = bearer(secrets[len(secrets) // 2]), bearer("sk-wrong")
    assert ours._usage is not None  # noqa: SLF001
    forget = ours._usage._pending.clear  # noqa: SLF001  what is written later is measured elsewhere
    turns = {
        BARE: Turn(application, right),
        BARE_FASTAPI: Turn(on_fastapi(application), right),
        FLOOR: Turn(floor, right, after=floor.used.clear),
        OURS: Turn(ours, right, after=forget),
        FLOOR_REFUSED: Turn(floor, wrong, body=False),
        REFUSED: Turn(ours, wrong, body=False),
        FLOOR_REFUSED_BODY: Turn(Floor(application, secrets, path, receives=True), wrong),
        REFUSED_BODY: Turn(ours, wrong),
        PUBLIC: Turn(with_public_path, right, path="/health"),
        LIFESPAN: Turn(BearerTokenMiddleware(live, store=path, usage="off"), kind="lifespan"),
        BARE_LIFESPAN: Turn(live, kind="lifespan"),
    }
    for name, rival in RIVALS.items():
        if len(secrets) in rival.sizes:
            turns[name] = Turn(rival.build(secrets, application), rival.header(secrets[len(secrets) // 2]))
    return turns


async def live(_scope: Any, _receive: Any, send: Any) -> None:
    """Start and end at once."""
    await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})


async def application(_scope: Any, _receive: Any, send: Any) -> None:
    """Answer, as little as can be."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def _receive() -> Any:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _send(_message: Any) -> None:
    pass


def bearer(secret: str) -> tuple[bytes, bytes]:
    """Return the header that presents *secret*."""
    return b"authorization", b"Bearer " + secret.encode()


def _base(name: str) -> str:
    """Return what a contender would take if it guarded nothing."""
    if name in (BARE, BARE_FASTAPI, BARE_LIFESPAN):
        return ""
    return BARE_FASTAPI if name in ON_FASTAPI else BARE_LIFESPAN if name == LIFESPAN else BARE


def clocked(loop: asyncio.AbstractEventLoop, turn: Turn) -> Callable[[], float]:
    """Return what takes a contender's turn, and returns the microseconds of one request."""
    scope = {
        "type": turn.kind,
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": turn.path,
        "raw_path": turn.path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            *HEADERS[:12],
            *([turn.header] if turn.header else []),
            *HEADERS[12:],
            *([LENGTH] if turn.body else []),
        ],
        "client": ("127.0.0.1", 50_000),
        "server": ("127.0.0.1", 8000),
    }

    async def go(times: int) -> float:
        app = turn.app
        began = time.perf_counter()
        for _ in range(times):
            await app(dict(scope), _receive, _send)
        return (time.perf_counter() - began) / times

    loop.run_until_complete(go(2))  # whatever is made on first use
    times = max(1, int(TURN / loop.run_until_complete(go(3))))

    def take_turn() -> float:
        seconds = loop.run_until_complete(go(times))
        turn.after()
        return seconds * 1e6

    return take_turn
