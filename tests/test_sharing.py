"""The parts that the middlewares of one process share, and those that they do not."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import anyio
import pytest
from anyio import to_thread

from freegpt_auth import UNRESOLVED, AuthMode, BearerTokenMiddleware, ConfigurationError, FileTokenStore, Survey
from freegpt_auth.guard.lookups import LANE_WIDTH
from freegpt_auth.sharing import shared
from freegpt_auth.stores.file.usage import UsageDatabase
from tests.helpers.asgi import LIFESPAN, ask, bearer, plain, statuses

if TYPE_CHECKING:
    from pathlib import Path

TOKEN_FILE = "api_tokens.json"

pytestmark = pytest.mark.anyio


class Source:
    """A token source that finds nothing, remembers each look-up and its thread, and never counts as configured."""

    look_up_limit = 1

    def __init__(self) -> None:
        self.known: set[bytes] = set()
        self.threads: list[int] = []
        self.is_closed = False
        self.release = threading.Event()
        self.release.set()

    def peek(self, digest: bytes) -> Any:
        """Answer from memory."""
        return None if digest in self.known else UNRESOLVED

    def resolve(self, digest: bytes) -> Any:
        """Look it up, once released."""
        assert self.release.wait(30)
        self.threads.append(threading.get_ident())
        self.known.add(digest)

    def survey(self) -> Survey:
        """Count no token."""
        return Survey(configured=False, active=0, source="a source")

    def close(self) -> None:
        """Note it."""
        self.is_closed = True


def parts(**arguments: Any) -> tuple[object, ...]:
    """Return the parts of a new middleware that others may share."""
    guard = BearerTokenMiddleware(plain, **arguments)
    return guard._look_ups.source, guard._usage, guard._refusals


def test_one_location_is_one_store(keep: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A middleware for each route costs one store and one recorder, and announces the mode once."""
    caplog.set_level(logging.INFO, "freegpt_auth")
    keep(FileTokenStore(TOKEN_FILE))
    first = BearerTokenMiddleware(plain)
    assert parts(store=os.path.abspath(TOKEN_FILE)) == (first._look_ups.source, first._usage, first._refusals)
    assert len(caplog.messages) == 1


def test_named_default_is_one_store() -> None:
    """A guard over the default file and one that names this file are closed by the latter; a required one starts."""
    first = BearerTokenMiddleware(plain)
    assert first._authenticator.mode.value == "open"
    with pytest.raises(ConfigurationError, match="authentication is required"):
        BearerTokenMiddleware(plain, required=True)
    second = BearerTokenMiddleware(plain, store=TOKEN_FILE)
    assert second._look_ups.source is first._look_ups.source
    assert first._authenticator.mode is AuthMode.TOKEN_FILE
    assert BearerTokenMiddleware(plain, required=True)._authenticator is first._authenticator


def test_own_token_source_is_never_open() -> None:
    """A token source of one's own counts as named, even if it says that it is not configured."""
    assert BearerTokenMiddleware(plain, store=Source())._authenticator.mode is AuthMode.TOKEN_FILE


def test_required_guard_reads_the_store_again(keep: Any) -> None:
    """A required guard starts once there is a token, though no request has shown it to the open guard beside it."""
    first = BearerTokenMiddleware(plain)
    keep(FileTokenStore(TOKEN_FILE))
    second = BearerTokenMiddleware(plain, required=True)
    assert first._authenticator.mode is second._authenticator.mode is AuthMode.TOKEN_FILE


async def test_revoked_key_is_refused_by_each_guard(keep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process refuses the key for good, whichever of its guards read the revocation."""
    store = FileTokenStore(TOKEN_FILE)
    token, secret = keep(store)
    monkeypatch.setenv("FREEGPT_API_KEY", secret)
    guards = [BearerTokenMiddleware(plain, **settings) for settings in ({}, {"required": True}, {"store": TOKEN_FILE})]
    await to_thread.run_sync(store.revoke, token.id, token.created_at)
    assert await statuses(guards[0], "sk-any") == [401]
    await anyio.Path(TOKEN_FILE).unlink()
    for guard in guards:
        assert await statuses(guard, secret) == [401]


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [({"store": "other.json"}, {}), ({"usage_interval": 9.0}, {}), ({}, {"FREEGPT_AUTH_LEASE": "9"})],
)
def test_other_settings_are_not_shared(monkeypatch: pytest.MonkeyPatch, arguments: Any, environment: Any) -> None:
    """Each middleware keeps the settings that it was given."""
    first = BearerTokenMiddleware(plain)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert parts(**arguments)[:2] != (first._look_ups.source, first._usage)


def test_another_directory_is_another_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same relative path in two directories names two token files."""
    first = BearerTokenMiddleware(plain)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert parts()[0] is not first._look_ups.source


def test_unused_parts_are_released() -> None:
    """The tokens leave memory with the last middleware over them."""
    guard = BearerTokenMiddleware(plain)
    twin = BearerTokenMiddleware(plain)
    store = weakref.ref(guard._look_ups.source)
    del guard
    gc.collect()
    assert store() is twin._look_ups.source
    del twin
    gc.collect()
    assert store() is None


def test_two_threads_share_one_object() -> None:
    """Two servers that start at the same time in one process end up with one store."""
    both = threading.Barrier(2)

    def make() -> Source:
        both.wait(10)
        return Source()

    with ThreadPoolExecutor() as threads:
        first, second = threads.map(lambda _: shared(make, "a thing"), range(2))
    assert first is second


_FORK_WHILE_SHARING = """
import os, signal, sys
from freegpt_auth import BearerTokenMiddleware, sharing
first = BearerTokenMiddleware(print)
with first._authenticator._lock, sharing._lock:  # as another thread holds them
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        print(BearerTokenMiddleware(print)._authenticator.mode)
        sys.stdout.flush()
        os._exit(0)
os.waitpid(child, 0)
"""


def test_fork_renews_the_locks() -> None:
    """A child that is forked while another thread holds a lock constructs its middleware all the same."""
    environ = {**os.environ, "FREEGPT_API_KEY": "the-environment-key"}
    child = subprocess.run(
        [sys.executable, "-c", _FORK_WHILE_SHARING], env=environ, capture_output=True, check=True, timeout=60
    )
    assert child.stdout == b"environment\n"


async def uses(path: str, *guards: Any) -> dict[str, int]:
    """Write the uses that guards have counted, and return those in a usage database."""

    def written() -> dict[str, int]:
        for guard in guards:
            guard._usage.flush()
        return {token_id: usage.use_count for token_id, usage in UsageDatabase(path).read().items()}

    return await to_thread.run_sync(written)


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("interval", [2.0, 9.0])
async def test_two_guards_count_one_use(keep: Any, kind: str, interval: float) -> None:
    """A request through two guards, of an application and of a mounted one, is one use with any settings."""
    token, secret = keep(FileTokenStore(TOKEN_FILE))
    inner = BearerTokenMiddleware(plain, usage_interval=interval)
    elsewhere = BearerTokenMiddleware(inner, usage="elsewhere.db")
    outer = BearerTokenMiddleware(elsewhere)
    for _ in range(3):
        assert (await ask(outer, type=kind, headers=bearer(secret))).status == 200
    for place in ("api_tokens.usage.db", "elsewhere.db"):
        assert await uses(place, outer, inner, elsewhere) == {token.id: 3}


async def test_two_tokens_are_two_uses(keep: Any) -> None:
    """Guards over two token files and one usage database count one use of each token that they accept."""
    (first, secret), (second, other) = keep(FileTokenStore(TOKEN_FILE)), keep(FileTokenStore("other.json"))
    inner = BearerTokenMiddleware(plain, store="other.json", usage="both.db")
    outer = BearerTokenMiddleware(inner, usage="both.db")
    assert (await ask(outer, headers=[*bearer(secret), (b"x-api-key", other.encode())])).status == 200
    assert await uses("both.db", inner) == {first.id: 1, second.id: 1}


async def test_slow_source_delays_no_other() -> None:
    """One application's slow token source delays no other; a look-up answers the requests that wait for it."""
    slow, quick = Source(), Source()
    slow.release.clear()
    occupied, again, free = (BearerTokenMiddleware(plain, store=source) for source in (slow, slow, quick))
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(partial(ask, occupied, headers=bearer("sk-any")))
            await anyio.wait_all_tasks_blocked()
            try:
                assert occupied._look_ups.lane().gate.statistics().tasks_waiting == Source.look_up_limit
                assert await statuses(free, "sk-any") == [401]
                assert await statuses(again, "sk-any") == [503]
            finally:
                slow.release.set()
    assert len(slow.threads) == LANE_WIDTH == 4


async def test_blocking_source_has_threads_of_its_own() -> None:
    """It does not hold up the event loop, nor does an application that keeps every worker thread busy hold it up."""
    source, release = Source(), threading.Event()
    threads = to_thread.current_default_thread_limiter()
    async with anyio.create_task_group() as group:
        for _ in range(int(threads.total_tokens)):
            group.start_soon(partial(to_thread.run_sync, release.wait))
        while threads.available_tokens:
            await anyio.lowlevel.checkpoint()
        try:
            with anyio.fail_after(60):
                assert await statuses(BearerTokenMiddleware(plain, store=source), "sk-1", "sk-2") == [401, 401]
        finally:
            release.set()
    assert len(source.threads) == 2
    assert threading.get_ident() not in source.threads


async def test_one_middleware_serves_several_event_loops(anyio_backend: str) -> None:
    """A test client, or a server with a loop for each thread, may share one middleware."""
    guarded = BearerTokenMiddleware(plain, store=Source())
    elsewhere = partial(anyio.run, statuses, guarded, "sk-there", backend=anyio_backend)
    assert await statuses(guarded, "sk-here") == await to_thread.run_sync(elsewhere) == [401]


async def test_exhausted_threads_are_answered_503(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A look-up for which the system has no thread is refused with 503, and each time of need is logged once."""
    app = BearerTokenMiddleware(plain, store=Source())
    for secret in ("sk-one", "sk-two"):
        with monkeypatch.context() as exhausted:
            exhausted.setattr(to_thread, "run_sync", Mock(side_effect=RuntimeError("can't start new thread")))
            assert await statuses(app, secret, secret) == [503, 503]
        assert await statuses(app, secret) == [401]
    assert [record.levelname for record in caplog.records if "no free thread" in record.message] == ["ERROR"] * 2


async def test_error_of_a_source_is_raised() -> None:
    """A RuntimeError of the token source is no lack of threads, and reaches the server's log."""
    source = Source()
    source.resolve = Mock(side_effect=RuntimeError("broken"))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="broken"):
        await statuses(BearerTokenMiddleware(plain, store=source), "sk-any")


async def test_last_lifespan_closes_the_source() -> None:
    """A server that stops leaves the source open for another server of the process; a restarted one closes it again."""
    source = Source()
    inner = BearerTokenMiddleware(plain, store=source)
    closed: list[bool] = []

    async def beside_another(_scope: Any, _receive: Any, _send: Any) -> None:
        await ask(inner, type="lifespan", incoming=LIFESPAN)
        closed.append(source.is_closed)

    for _ in range(2):
        source.is_closed = False
        await ask(BearerTokenMiddleware(beside_another, store=source), type="lifespan", incoming=LIFESPAN)
        closed.append(source.is_closed)
    assert closed == [False, True] * 2
