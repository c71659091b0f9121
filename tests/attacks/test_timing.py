"""The time until a refusal is sent tells nothing of what the server knows about the secret that was presented.

As in dudect (Reparaz, Balasch, Verbauwhede: "Dude, is my code constant time?", 2017): classes are measured in turn, in
random order, so that whatever else the machine does meets them all alike; Welch's t is taken over several croppings, since
the slow tail is noise. With enough samples t finds any difference, also one of no use to anybody. So what is bounded is the
effect, the difference of medians; t only says that a difference is there at all.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import random
import socket
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from statistics import fmean, median, stdev, variance
from typing import TYPE_CHECKING, Any

import pytest

from freegpt_auth import BearerTokenMiddleware, FileTokenStore, Settings
from freegpt_auth.tokens import digest_of, generate_secret

if TYPE_CHECKING:
    from collections.abc import Callable

BOUND = 0.03
"""Of the time that a refusal takes in process, some 180 ns: what two classes may differ by.

Loopback is the quietest network, and the same request scatters by 10 us and more on it. At dudect's threshold of 4.5 a
difference of 0.18 us takes 2 * (4.5 * 10 / 0.18) ** 2 = 125,000 requests of each class to be seen there, more elsewhere.
"""

PROOF = 10.0
"""The value of t from which dudect says "definitely"."""

CROPPINGS = (0.5, 0.75, 0.9, 0.99, 1.0)
ROUNDS, VISITS = 12_000, 2_500
LONG_AGO = "2020-01-01T00:00:00Z"
TIMES = {"revoked": "revoked_at", "expired": "expires_at"}
KEY = "key-" + "0" * 48

APPLICATION = """
from freegpt_auth import BearerTokenMiddleware
app = BearerTokenMiddleware(None)
"""

Samples = dict[str, list[int]]

_logger = logging.getLogger("figures")  # --log-cli-level=INFO shows them


def keep_tokens(near: bytes = b"", count: int = 8) -> dict[str, list[str]]:
    """Write a token file, and return secrets of each class: two that are unknown, to see how much chance does."""
    records = [_record(near)] if near else []
    secrets: dict[str, list[str]] = {name: [] for name in ("unknown", "also unknown", "revoked", "expired")}
    for secret, name in ((generate_secret(), name) for _ in range(count) for name in secrets):
        secrets[name].append(secret)
        if name in TIMES:
            records.append({**_record(digest_of(secret)), TIMES[name]: LONG_AGO})
    Path("api_tokens.json").write_text(json.dumps({"version": 1, "tokens": records}))
    Path("api_tokens.json").chmod(0o600)
    return secrets


def _record(digest: bytes) -> dict[str, str]:
    return {
        "id": digest.hex()[:12],
        "name": "x",
        "prefix": "",
        "digest": f"sha256${digest.hex()}",
        "created_at": LONG_AGO,
    }


def as_scopes(secrets: dict[str, list[str]], kind: str = "http") -> dict[str, list[Any]]:
    """Return the requests that present them."""
    common = {"type": kind, "method": "GET", "path": "/v1/models", "client": ("127.0.0.1", 50000)}
    common["extensions"] = {"websocket.http.response": {}}
    return {
        name: [{**common, "headers": [(b"host", b"x"), (b"authorization", b"Bearer " + s.encode())]} for s in group]
        for name, group in secrets.items()
    }


def measure(app: Any, classes: dict[str, list[Any]], rounds: int) -> Samples:
    """Return how many nanoseconds each of *rounds* refusals of each class took until its body was sent."""
    return asyncio.run(_measure(app, classes, rounds))


async def _measure(app: Any, classes: dict[str, list[Any]], rounds: int) -> Samples:
    clock, sent = time.perf_counter_ns, 0
    samples: Samples = {name: [] for name in classes}

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        nonlocal sent
        if message.get("body"):
            sent = clock()

    order = list(classes)
    gc.disable()
    for number in range(-rounds // 10, rounds):
        random.shuffle(order)
        for name in order:
            scope = dict(random.choice(classes[name]))
            began = clock()
            await app(scope, receive, send)
            if number >= 0:  # those before warm up
                samples[name].append(sent - began)
    gc.enable()
    return samples


def strongest_t(first: list[int], second: list[int]) -> float:
    """Return Welch's t of the cropping in which it is largest."""
    together = sorted(first + second)
    found = 0.0
    for share in CROPPINGS:
        limit = together[int(share * (len(together) - 1))]
        one, two = ([value for value in values if value <= limit] for values in (first, second))
        error = (variance(one) / len(one) + variance(two) / len(two)) ** 0.5
        found = max(found, (fmean(two) - fmean(one)) / error, key=abs)
    return found


def differences(samples: Samples, base: str = "unknown") -> dict[str, float]:
    """Return by which part of the base's time each other class takes longer."""
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
    """Fail if one class differs from the base by more than the bound."""
    found = differences(samples, base)
    assert {name: f"{share:+.1%}" for name, share in found.items() if abs(share) > BOUND} == {}


@pytest.fixture
def times(rounds: int) -> int:
    """Return how often each class is measured."""
    return ROUNDS * rounds


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_unknown_revoked_and_expired_take_the_same_time(times: int, kind: str) -> None:
    """Whoever finds an old secret cannot tell by a stop-watch whether it was once good here."""
    secrets = keep_tokens()
    assert_alike(measure(BearerTokenMiddleware(None, usage="off"), as_scopes(secrets, kind), times))


def test_what_a_secret_shares_with_the_key_does_not_show(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """A guess at the environment key takes as long if it is nearly right; nobody finds the key piece by piece."""
    monkeypatch.setenv("FREEGPT_API_KEY", KEY)
    keep_tokens()
    secrets = {"far": ["xyz-" + "9" * 48], "also far": ["zyx-" + "8" * 48], "near": [KEY[:-1] + "1"]}
    samples = measure(BearerTokenMiddleware(None, usage="off"), as_scopes(secrets), times)
    assert_alike(samples, "far")


def test_what_a_digest_shares_with_the_keys_does_not_show(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """A guess whose digest begins as the key's does takes as long as any: 31 of 32 bytes alike show nothing."""
    keep_tokens()
    secrets = {name: [generate_secret()] for name in ("far", "also far", "near")}
    digest = sha256(secrets["near"][0].encode()).digest()
    monkeypatch.setenv("FREEGPT_API_KEY", KEY)
    settings = Settings.from_env()
    assert settings.key
    near = replace(settings, key=replace(settings.key, digest=digest[:-1] + bytes([digest[-1] ^ 1])))
    monkeypatch.setattr(Settings, "from_env", lambda **_: replace(near, usage=None))
    assert_alike(measure(BearerTokenMiddleware(None), as_scopes(secrets), times), "far")


def test_what_a_digest_shares_with_a_tokens_does_not_show(times: int) -> None:
    """A guess whose digest begins as a stored one does takes as long as any: the look-up is no comparison, byte by byte."""
    near = generate_secret()
    digest = sha256(near.encode()).digest()
    unknown = keep_tokens(digest[:-1] + bytes([digest[-1] ^ 1]))
    secrets = {"far": unknown["unknown"], "also far": unknown["also unknown"], "near": [near] * 8}
    assert_alike(measure(BearerTokenMiddleware(None, usage="off"), as_scopes(secrets), times), "far")


class Slower(FileTokenStore):
    """A store that takes longer to find a token than to miss one, by a known time."""

    delay = 0

    def peek(self, digest: bytes) -> Any:
        """Look up, and wait if there is something."""
        token = super().peek(digest)
        if self.delay and self._snapshot.tokens.find(digest):
            until = time.perf_counter_ns() + self.delay
            while time.perf_counter_ns() < until:
                pass
        return token


def test_a_difference_would_be_seen(times: int) -> None:
    """The control: twice the bound, planted in a store, is found, by effect and by t, and nothing is found without."""
    secrets = keep_tokens()
    del secrets["expired"]
    store = Slower("api_tokens.json")
    app = BearerTokenMiddleware(None, store=store)
    before = measure(app, as_scopes(secrets), times)
    store.delay = round(2 * BOUND * median(before["unknown"]))
    after = measure(app, as_scopes(secrets), times)
    _logger.info("planted: %d ns", store.delay)
    chance, planted = differences(before), differences(after)
    assert BOUND < planted["revoked"] - chance["revoked"] < 6 * BOUND
    assert strongest_t(after["unknown"], after["revoked"]) > PROOF
    assert abs(chance["also unknown"]) < BOUND / 2


def visit(address: tuple[str, int], classes: dict[str, list[bytes]], rounds: int) -> Samples:
    """Return how many nanoseconds each answer of a real server took, from the request to its last byte."""
    samples: Samples = {name: [] for name in classes}
    with socket.create_connection(address, timeout=30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        order = list(classes)
        for number in range(-rounds // 10, rounds):
            random.shuffle(order)
            for name in order:
                request = random.choice(classes[name])
                began = time.perf_counter_ns()
                connection.sendall(request)
                answer = b""
                while not answer.endswith(b"}}"):
                    answer += connection.recv(65536)
                if number >= 0:
                    samples[name].append(time.perf_counter_ns() - began)
                assert answer.startswith(b"HTTP/1.1 401")
    return samples


def test_nothing_is_seen_through_a_network(serve: Callable[..., Any], rounds: int) -> None:
    """Thousands of requests on the quietest network there is show no difference, and what scatters hides the bound."""
    secrets = keep_tokens()
    Path("app.py").write_text(APPLICATION)
    server = serve("app:app", "--no-access-log", "--log-level", "warning", "--lifespan", "off")
    requests = {
        name: [f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {s}\r\n\r\n".encode() for s in group]
        for name, group in secrets.items()
    }
    port = int(server.url.rpartition(":")[2])
    samples = visit(("127.0.0.1", port), requests, VISITS * rounds)
    differences(samples)
    quick = sorted(samples["unknown"])[: int(0.9 * len(samples["unknown"]))]
    _logger.info("scatter of the quickest nine tenths: %.0f ns", stdev(quick))
    assert all(abs(strongest_t(samples["unknown"], values)) < PROOF for values in samples.values())
