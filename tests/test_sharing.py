"""The parts that the middlewares of one process share, and those that they do not."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import anyio
import pytest
from anyio import to_thread

from freegpt_auth import UNRESOLVED, AuthMode, BearerTokenMiddleware, ConfigurationError, FileTokenStore, Survey
from freegpt_auth.sharing import shared
from freegpt_auth.stores.file.usage import UsageDatabase

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping
    from pathlib import Path

    from freegpt_auth.usage.base import Usage

    Ask = Callable[..., Coroutine[Any, Any, Any]]

TOKEN_FILE = "api_tokens.json"


def flush(guard: BearerTokenMiddleware) -> None:
    """Write the uses that a guard has counted."""
    assert guard._usage is not None
    guard._usage.flush()


async def plain(_scope: Any, _receive: Any, send: Any) -> None:
    """Answer 200 to every request."""
    await send({"type": "http.response.start", "status": 200, "headers": []})


def test_one_location_is_one_store(keep: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A middleware for each route costs one store and one recorder, and announces the mode once."""
    caplog.set_level(logging.INFO, "freegpt_auth")
    keep(FileTokenStore(TOKEN_FILE))
    guards = [BearerTokenMiddleware(plain, store=store) for store in (TOKEN_FILE, os.path.abspath(TOKEN_FILE))]
    shared_parts = [(guard._look_ups.source, guard._usage, guard._refusals) for guard in guards]
    assert shared_parts[0] == shared_parts[1]
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


def test_required_guard_reads_the_store_again(keep: Any) -> None:
    """A required guard starts once there is a token, though no request has shown it to the open guard beside it."""
    first = BearerTokenMiddleware(plain)
    keep(FileTokenStore(TOKEN_FILE))
    second = BearerTokenMiddleware(plain, required=True)
    assert first._authenticator.mode is second._authenticator.mode is AuthMode.TOKEN_FILE


@pytest.mark.anyio
async def test_revoked_key_is_refused_by_each_guard(ask: Ask, keep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process refuses the key for good, whichever of its guards read the revocation."""
    store = FileTokenStore(TOKEN_FILE)
    token, secret = keep(store)
    monkeypatch.setenv("FREEGPT_API_KEY", secret)
    guards = [BearerTokenMiddleware(plain, **settings) for settings in ({}, {"required": True}, {"store": TOKEN_FILE})]
    await to_thread.run_sync(store.revoke, token.id, token.created_at)
    assert (await ask(guards[0], headers=[(b"x-api-key", b"sk-any")])).status == 401
    await anyio.Path(TOKEN_FILE).unlink()
    for guard in guards:
        assert (await ask(guard, headers=[(b"x-api-key", secret.encode())])).status == 401


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [({"store": "other.json"}, {}), ({"usage_interval": 9.0}, {}), ({}, {"FREEGPT_AUTH_LEASE": "9"})],
)
def test_other_settings_are_not_shared(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], environment: dict[str, str]
) -> None:
    """Each middleware keeps the settings that it was given."""
    first = BearerTokenMiddleware(plain)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    second = BearerTokenMiddleware(plain, **arguments)
    assert (first._look_ups.source, first._usage) != (second._look_ups.source, second._usage)


def test_another_directory_is_another_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same relative path in two directories names two token files."""
    first = BearerTokenMiddleware(plain)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert BearerTokenMiddleware(plain)._look_ups.source is not first._look_ups.source


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


class Thing:
    """Something to share."""


def test_two_threads_share_one_object() -> None:
    """Two servers that start at the same time in one process end up with one store."""
    both = threading.Barrier(2)
    things: list[Thing] = []

    def make() -> Thing:
        both.wait(10)
        return Thing()

    threads = [threading.Thread(target=lambda: things.append(shared(make, "a thing"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert things[0] is things[1]


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


def _usage_in(path: str) -> Mapping[str, Usage]:
    return UsageDatabase(path).read()


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("interval", [2.0, 9.0])
async def test_two_guards_count_one_use(ask: Ask, keep: Any, kind: str, interval: float) -> None:
    """A request through two guards, of an application and of a mounted one, is one use with any settings."""
    token, secret = keep(FileTokenStore(TOKEN_FILE))
    inner = BearerTokenMiddleware(plain, usage_interval=interval)
    elsewhere = BearerTokenMiddleware(inner, usage="elsewhere.db")
    outer = BearerTokenMiddleware(elsewhere)
    for _ in range(3):
        assert (await ask(outer, type=kind, headers=[(b"authorization", f"Bearer {secret}".encode())])).status == 200
    for guard in (outer, inner, elsewhere):
        await to_thread.run_sync(flush, guard)
    for place in ("api_tokens.usage.db", "elsewhere.db"):
        assert (await to_thread.run_sync(_usage_in, place))[token.id].use_count == 3


@pytest.mark.anyio
async def test_two_tokens_are_two_uses(ask: Ask, keep: Any) -> None:
    """Guards over two token files and one usage database count one use of each token that they accept."""
    (first, secret), (second, other) = keep(FileTokenStore(TOKEN_FILE)), keep(FileTokenStore("other.json"))
    inner = BearerTokenMiddleware(plain, store="other.json", usage="both.db")
    outer = BearerTokenMiddleware(inner, usage="both.db")
    headers = [(b"authorization", f"Bearer {secret}".encode()), (b"x-api-key", other.encode())]
    assert (await ask(outer, headers=headers)).status == 200
    await to_thread.run_sync(flush, inner)
    counted = await to_thread.run_sync(_usage_in, "both.db")
    assert {token_id: use.use_count for token_id, use in counted.items()} == {first.id: 1, second.id: 1}


class Source:
    """A token source that answers when it is released, and notes that it is closed."""

    look_up_limit = 1

    def __init__(self) -> None:
        self.release = threading.Event()
        self.is_closed = False

    def peek(self, _digest: bytes) -> Any:
        """Know nothing."""
        return UNRESOLVED

    def resolve(self, _digest: bytes) -> Any:
        """Find nothing, in the end."""
        assert self.release.wait(30)

    def survey(self) -> Survey:
        """Count no token."""
        return Survey(configured=True, active=0, source="a slow source")

    def close(self) -> None:
        """Note it."""
        self.is_closed = True


@pytest.mark.anyio
async def test_slow_source_delays_no_other(ask: Ask) -> None:
    """Two applications of one process: one's slow token source has no part in the other's answers."""
    slow, quick = Source(), Source()
    quick.release.set()
    occupied, free = BearerTokenMiddleware(plain, store=slow), BearerTokenMiddleware(plain, store=quick)
    again = BearerTokenMiddleware(plain, store=slow)
    headers = [(b"x-api-key", b"sk-any")]
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(partial(ask, occupied, headers=headers))
            await anyio.wait_all_tasks_blocked()
            try:
                assert occupied._look_ups.lane().gate.statistics().tasks_waiting == Source.look_up_limit
                assert (await ask(free, headers=headers)).status == 401
                assert (await ask(again, headers=headers)).status == 503
            finally:
                slow.release.set()


@pytest.mark.anyio
async def test_exhausted_threads_are_answered_503(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A look-up for which the system has no thread is refused with 503, and the reason is logged once."""
    source = Source()
    source.release.set()
    app, headers = BearerTokenMiddleware(plain, store=source), [(b"x-api-key", b"sk-any")]

    async def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as exhausted:
        exhausted.setattr(to_thread, "run_sync", fail)
        assert [(await ask(app, headers=headers)).status for _ in range(2)] == [503, 503]
    assert [record.levelname for record in caplog.records if "no free thread" in record.message] == ["ERROR"]
    assert (await ask(app, headers=headers)).status == 401


@pytest.mark.anyio
async def test_error_of_a_source_is_raised(ask: Ask) -> None:
    """A RuntimeError of the token source is no lack of threads, and reaches the server's log."""
    source = Source()
    source.resolve = Mock(side_effect=RuntimeError("broken"))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="broken"):
        await ask(BearerTokenMiddleware(plain, store=source), headers=[(b"x-api-key", b"sk-any")])


@pytest.mark.anyio
async def test_last_lifespan_closes_the_source() -> None:
    """A server that stops leaves a source open for another server of the process, and a restarted one closes it again."""
    source = Source()
    events: dict[str, list[str]] = {}

    async def live(name: str, during: Callable[[], Awaitable[None]]) -> None:
        async def receive() -> Any:
            event = events.setdefault(name, ["startup", "shutdown"]).pop(0)
            if event == "shutdown":
                await during()
            return {"type": f"lifespan.{event}"}

        async def send(_message: Any) -> None:
            closed.append(source.is_closed)

        await BearerTokenMiddleware(plain, store=source)({"type": "lifespan"}, receive, send)

    async def nothing() -> None:
        """Serve no request."""

    for _ in range(2):
        events.clear()
        source.is_closed = False
        closed: list[bool] = []
        await live("outer", lambda: live("inner", nothing))
        assert closed == [False, False, False, True]
