"""The time until a refusal is sent reveals nothing about the secret.

As in dudect (Reparaz, Balasch, Verbauwhede: "Dude, is my code constant time?", 2017), classes are measured in turn, in
random order: other load affects all classes alike. Welch's t is taken over several croppings, because the slow tail is
noise. With enough samples t finds any difference, however useless. The tests therefore bound the effect, the difference
of the medians; t only shows that a difference exists.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import socket
import time
from copy import copy
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import fmean, median, stdev, variance
from typing import TYPE_CHECKING, Literal, TypeVar

import pytest

from freegpt_auth import BearerTokenMiddleware, FileTokenStore, Settings
from freegpt_auth.tokens import digest_of, generate_secret, issue

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from freegpt_auth import Token
    from freegpt_auth.stores.base import Unresolved
    from tests.conftest import Keep
    from tests.helpers.servers import Serve

BOUND = 0.03
"""Largest difference of two classes, as a share of the time of a refusal in process: some 180 ns.

On loopback, the quietest network, the same request scatters by 10 us and more. At dudect's threshold of 4.5 an attacker
needs 2 * (4.5 * 10 / 0.18) ** 2 = 125,000 requests of each class to see a difference of 0.18 us there.
"""

PROOF = 10.0
"""The value of t from which dudect reports a definite difference."""

CROPPINGS = (0.5, 0.75, 0.9, 0.99, 1.0)
ROUNDS, VISITS = 12_000, 2_500
KEY = "key-" + "0" * 48

APPLICATION = """
from freegpt_auth import BearerTokenMiddleware
app = BearerTokenMiddleware(None)  # no request reaches an application
"""

Samples = dict[str, list[int]]
"""The durations of each class, in nanoseconds."""

Request = TypeVar("Request")

_logger = logging.getLogger("figures")  # --log-cli-level=INFO shows them


@pytest.fixture
def secrets(keep: Keep) -> dict[str, list[str]]:
    """Make a token file and return secrets of each class; two classes are unknown, which shows the effect of chance."""
    store, now = FileTokenStore("api_tokens.json"), datetime.now(UTC)
    revoked, expired = ([keep(store, "x", end) for _ in range(8)] for end in (None, now - timedelta(days=1)))
    for token, _ in revoked:
        store.revoke(token.id, now)
    kept = {name: [secret for _, secret in pairs] for name, pairs in (("revoked", revoked), ("expired", expired))}
    return {**{name: [generate_secret() for _ in range(8)] for name in ("unknown", "also unknown")}, **kept}


def as_scopes(secrets: dict[str, list[str]], kind: str = "http") -> dict[str, list[Scope]]:
    """Return requests with these secrets."""
    common: Scope = {"type": kind, "method": "GET", "path": "/v1/models", "client": ("127.0.0.1", 50000)}
    common["extensions"] = {"websocket.http.response": {}}
    return {
        name: [{**common, "headers": [(b"host", b"x"), (b"authorization", b"Bearer " + s.encode())]} for s in group]
        for name, group in secrets.items()
    }


def measure_app(app: ASGIApp, classes: dict[str, list[Scope]], rounds: int) -> Samples:
    """Return the time of *rounds* refusals of each class in process, until the body is sent."""
    sent = 0

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        nonlocal sent
        if message.get("body"):
            sent = time.perf_counter_ns()

    async def ask(scope: Scope) -> int:
        await app(scope, receive, send)
        return sent

    return asyncio.run(measure(ask, classes, rounds))


async def measure(ask: Callable[[Request], Awaitable[int]], classes: dict[str, list[Request]], rounds: int) -> Samples:
    """Return the time of *rounds* requests of each class until the end of the answer, which *ask* returns."""
    samples: Samples = {name: [] for name in classes}
    order = list(classes)
    gc.disable()
    for number in range(-rounds // 10, rounds):
        random.shuffle(order)
        for name in order:
            request = copy(random.choice(classes[name]))
            began = time.perf_counter_ns()
            ended = await ask(request)
            if number >= 0:  # the first ones warm up
                samples[name].append(ended - began)
    gc.enable()
    return samples


def strongest_t(first: list[int], second: list[int]) -> float:
    """Return the largest of Welch's t over the croppings."""
    together = sorted(first + second)
    found = 0.0
    for share in CROPPINGS:
        limit = together[int(share * (len(together) - 1))]
        one, two = ([value for value in values if value <= limit] for values in (first, second))
        error = (variance(one) / len(one) + variance(two) / len(two)) ** 0.5
        found = max(found, (fmean(two) - fmean(one)) / error, key=abs)
    return found


def differences(samples: Samples, base: str = "unknown") -> dict[str, float]:
    """Return the difference of each class to the base, as a share of the base's time."""
    usual = median(samples[base])
    _logger.info("%s: %.0f ns", base, usual)
    found = {}
    for name, values in samples.items():
        if name != base:
            found[name] = (median(values) - usual) / usual
            t = strongest_t(samples[base], values)
            _logger.info("%s: %+.0f ns, %+.1f %%, t = %+.1f", name, median(values) - usual, 100 * found[name], t)
    return found


def assert_alike(samples: Samples, base: str = "unknown") -> None:
    """Check that no class differs from the base by more than the bound."""
    found = differences(samples, base)
    assert {name: f"{share:+.1%}" for name, share in found.items() if abs(share) > BOUND} == {}


async def unreached(_scope: Scope, _receive: Receive, _send: Send) -> None:
    """Stand for the application, which no request reaches."""
    raise AssertionError


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_refusals_take_the_same_time(secrets: dict[str, list[str]], rounds: int, kind: str) -> None:
    """Unknown, revoked and expired secrets take the same time: the time does not reveal a former token."""
    assert_alike(measure_app(BearerTokenMiddleware(unreached, usage="off"), as_scopes(secrets, kind), ROUNDS * rounds))


def near_key(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a guess that differs from the environment key in its last character."""
    monkeypatch.setenv("FREEGPT_API_KEY", KEY)
    return [KEY[:-1] + "1"]


def near_digest_of_key(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a guess whose digest shares 31 of 32 bytes with the digest of the environment key."""
    guess = generate_secret()
    monkeypatch.setenv("FREEGPT_API_KEY", KEY)
    settings = Settings.from_env()
    assert settings.key
    near = replace(settings, key=replace(settings.key, digest=nearly(digest_of(guess))), usage=None)
    monkeypatch.setattr(Settings, "from_env", lambda **_: near)
    return [guess]


def near_digest_of_token(_: pytest.MonkeyPatch) -> list[str]:
    """Return a guess whose digest shares 31 of 32 bytes with the digest of a token."""
    guess = generate_secret()
    token = issue("x", now=datetime.now(UTC))[0]
    FileTokenStore("api_tokens.json").add(nearly(digest_of(guess)), token)
    return [guess]


def nearly(digest: bytes) -> bytes:
    """Return the digest with its last bit changed."""
    return digest[:-1] + bytes([digest[-1] ^ 1])


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize("make", [near_key, near_digest_of_key, near_digest_of_token])
def test_near_guess_takes_the_same_time(
    monkeypatch: pytest.MonkeyPatch, rounds: int, make: Callable[[pytest.MonkeyPatch], list[str]]
) -> None:
    """A guess that is nearly right takes as long as any other: no key or token is found piece by piece."""
    guesses = as_scopes({"near": make(monkeypatch), "far": ["xyz-" + "9" * 48], "also far": ["zyx-" + "8" * 48]})
    assert_alike(measure_app(BearerTokenMiddleware(unreached, usage="off"), guesses, ROUNDS * rounds), "far")


class Slower(FileTokenStore):
    """A store that takes longer for a known token than for an unknown one, by *delay* nanoseconds."""

    delay = 0

    def peek(self, digest: bytes) -> Token | Literal[Unresolved.UNRESOLVED] | None:
        """Look up, and wait if the token is known."""
        token = super().peek(digest)
        if self.delay and self._snapshot.tokens.find(digest):
            until = time.perf_counter_ns() + self.delay
            while time.perf_counter_ns() < until:
                pass
        return token


def test_planted_difference_is_found(secrets: dict[str, list[str]], rounds: int) -> None:
    """The control: a planted difference of twice the bound is found, by effect and by t; without it none is found."""
    del secrets["expired"]
    store = Slower("api_tokens.json")
    app = BearerTokenMiddleware(unreached, store=store)
    before = measure_app(app, as_scopes(secrets), ROUNDS * rounds)
    store.delay = round(2 * BOUND * median(before["unknown"]))
    after = measure_app(app, as_scopes(secrets), ROUNDS * rounds)
    _logger.info("planted: %d ns", store.delay)
    chance, planted = differences(before), differences(after)
    assert BOUND < planted["revoked"] - chance["revoked"] < 6 * BOUND
    assert strongest_t(after["unknown"], after["revoked"]) > PROOF
    assert abs(chance["also unknown"]) < BOUND / 2


def test_network_shows_no_difference(secrets: dict[str, list[str]], serve: Serve, rounds: int) -> None:
    """Thousands of requests over loopback show no difference between the classes."""
    Path("app.py").write_text(APPLICATION)
    server = serve("app:app", "--no-access-log", "--log-level", "warning", "--lifespan", "off")
    requests = {
        name: [f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {s}\r\n\r\n".encode() for s in group]
        for name, group in secrets.items()
    }
    with socket.create_connection(server.address, timeout=30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        async def ask(request: bytes) -> int:
            connection.sendall(request)
            answer = b""
            while not answer.endswith(b"}}"):
                answer += connection.recv(65536)
            ended = time.perf_counter_ns()
            assert answer.startswith(b"HTTP/1.1 401")
            return ended

        samples = asyncio.run(measure(ask, requests, VISITS * rounds))
    differences(samples)
    quick = sorted(samples["unknown"])[: int(0.9 * len(samples["unknown"]))]
    _logger.info("scatter of the quickest nine tenths: %.0f ns", stdev(quick))
    assert all(abs(strongest_t(samples["unknown"], values)) < PROOF for values in samples.values())
