"""Whole lives of a token file: commands, an operator's hands, time and servers in any order, against a model.

Servers look at the file as the middleware does, and rely on a look for as long as they are allowed to: the clocks are
moved by hand, so that no writer has to be waited for and nothing depends on how fast this machine is.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable  # noqa: TC003  beside the annotations that pytest may resolve
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import chain
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock
from weakref import WeakValueDictionary

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from freegpt_auth import UNRESOLVED, BearerTokenMiddleware, FileTokenStore, StoreError, sharing
from freegpt_auth.exceptions import TokenNotFoundError
from freegpt_auth.guard.callers import Caller
from freegpt_auth.guard.credentials import presented
from freegpt_auth.stores import base, rules
from freegpt_auth.stores.file import worker_notes
from freegpt_auth.stores.file.store import FRESHNESS
from freegpt_auth.tokens import digest_of, issue
from tests.stores.file.common import in_lines, row

KEY, STRANGER = "the-environment-key", "sk-nobody-has-this"
LIFETIME = 60.0
BROKEN = [b"", b"[]", in_lines(row())[:-20], b'{"version": 2, "tokens": []}', b'{"sk-plain": 1}', b"\xff" * 40]
SPECIAL: dict[str, Callable[[Path], object]] = {
    "folder": Path.mkdir,
    "fifo": os.mkfifo,
    "dangling": lambda path: path.symlink_to("nowhere"),
    "loop": lambda path: path.symlink_to(path.name),
}

several = st.integers(0, 9)
copying = st.sampled_from(["replace", "overwrite"])


@dataclass(frozen=True)
class Known:
    """A token in the model."""

    id: str
    expires: float = inf
    revoked: bool = False

    def outcome(self, now: float) -> str:
        """Return how a request with its secret ends."""
        return "revoked" if self.revoked else "accepted" if self.expires > now else "expired"


@dataclass
class Server:
    """A long-lived middleware with its expected knowledge: the tokens of the last good reading."""

    middleware: BearerTokenMiddleware
    has_key: bool
    configured: bool = False
    tokens: dict[str, Known] = field(default_factory=dict)


class Lives(RuleBasedStateMachine):
    """The model: which tokens the file holds, and which of its faults it has now."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name, "api_tokens.json")
        self.aside, self.probe = (self.path.with_name(name) for name in ("moved-away.json", "probe"))
        self.ticks, self.now = 0.0, time.time()
        self.notes: set[str] = set()
        self.patch = pytest.MonkeyPatch()
        defaults: Any = FileTokenStore.__init__.__kwdefaults__
        for name, function in (("sleep", self.wait), ("clock", lambda: self.ticks)):
            self.patch.setitem(defaults, name, function)
        for module in (base, rules):
            self.patch.setattr(module, "time", SimpleNamespace(time=lambda: self.now))
        self.patch.setattr(worker_notes, "leave", self.notes.add)
        self.patch.setattr(worker_notes, "found", self.notes.__contains__)
        self.writers = [FileTokenStore(self.path), FileTokenStore(self.path)]
        self.state = "missing"
        self.tokens: dict[str, Known] = {}
        self.copies: list[tuple[bytes, dict[str, Known]]] = []
        self.moved: dict[str, Known] | None = None
        self.secrets: list[str] = []
        self.servers: list[Server] = []
        self.restart()

    def teardown(self) -> None:
        """Ask every server once more, and leave nothing behind."""
        try:
            for server in self.servers:
                self.ask(server)
        finally:
            self.patch.undo()
            self.folder.cleanup()

    # --- time

    @rule(seconds=st.sampled_from([0.001, 0.019, 0.019, 1.0, LIFETIME]))
    def wait(self, seconds: float) -> None:
        """Let time pass, as a writer does that waits: looks at the file grow old, and tokens expire."""
        self.ticks += seconds
        self.now += seconds

    def by_hand(self) -> None:
        """Wait until an operator's change of the file is seen: the freshness of a check."""
        self.wait(FRESHNESS + 1e-9)  # a sum of fractions may be a little less than it should be

    def tick(self) -> None:
        """Wait until the file system's clock has moved on, so that no two states of the file have one signature."""
        self.probe.touch()
        before = self.probe.stat().st_mtime_ns
        while self.probe.stat().st_mtime_ns == before:
            self.probe.touch()

    # --- commands

    def writer(self) -> FileTokenStore:
        """Return each writer in turn, once a change is seen as one."""
        self.tick()
        self.writers.reverse()
        return self.writers[0]

    @precondition(lambda self: self.state != "broken")
    @rule(lifetime=st.sampled_from([LIFETIME, inf]))
    def create(self, lifetime: float) -> None:
        """Issue a token, for ever or for a minute."""
        ends = None if lifetime == inf else datetime.fromtimestamp(self.now + lifetime, UTC)
        token, secret = issue(f"token {len(self.secrets)}", now=datetime.now(UTC), expires_at=ends)
        self.writer().add(digest_of(secret), token)
        self.tokens = {**self.tokens, secret: Known(token.id, ends.timestamp() if ends else inf)}
        self.secrets.append(secret)
        self.state = "good"
        self.written()

    @precondition(lambda self: self.state == "good" and self.tokens)
    @rule(one=several, way=st.sampled_from(["revoke", "delete"]))
    def end(self, one: int, way: str) -> None:
        """Revoke a token, perhaps again, or delete it."""
        secret, known = list(self.tokens.items())[one % len(self.tokens)]
        if way == "delete":
            self.writer().delete(known.id)
            self.tokens = {other: each for other, each in self.tokens.items() if other != secret}
        else:
            assert self.writer().revoke(known.id, datetime.now(UTC)).revoked_at is not None
            self.tokens = {**self.tokens, secret: replace(known, revoked=True)}
        self.written()

    def written(self) -> None:
        """Check that a command left neither a secret in the file nor a file beside it, and make a backup."""
        content = self.path.read_bytes()
        assert [secret for secret in self.secrets if secret.encode() in content] == []
        assert list(self.path.parent.glob(".*.tmp")) == []
        self.copies.append((content, self.tokens))

    @precondition(lambda self: self.state != "good")
    @rule()
    def change_without_a_file(self) -> None:
        """A command never writes over a file it cannot read, nor invents one to revoke a token in."""
        before, broken = self.contents(), self.state == "broken"
        writer, (token, secret) = self.writer(), issue("x", now=datetime.now(UTC))
        changes: list[Any] = [lambda: writer.revoke("x", datetime.now(UTC)), lambda: writer.delete("x")]
        for change in changes + [lambda: writer.add(digest_of(secret), token)] * broken:
            with pytest.raises(StoreError if broken else TokenNotFoundError):
                change()
        assert self.contents() == before

    def contents(self) -> dict[str, object]:
        """Return the bytes or the kinds of all files in the folder."""
        found = [path for path in self.path.parent.iterdir() if path.suffix != ".lock" and path != self.probe]
        return {path.name: path.read_bytes() if path.is_file() else path.lstat().st_mode for path in found}

    # --- an operator's hands

    def clear(self) -> None:
        """Remove the file, or the object in its place."""
        with contextlib.suppress(IsADirectoryError, FileNotFoundError):
            self.path.unlink()
        with contextlib.suppress(FileNotFoundError):
            self.path.rmdir()

    def put(self, content: bytes, how: str) -> None:
        """Replace the file or overwrite it, as ``cp -p`` and ``tar`` do: the copy is as old as the original."""
        self.tick()
        is_new = how == "replace" or not self.path.is_file()
        place = self.path.with_name("fresh") if is_new else self.path
        place.write_bytes(content)
        os.utime(place, (1.7e9, 1.7e9))
        if is_new:
            self.clear()
            place.rename(self.path)
        self.by_hand()

    @precondition(lambda self: self.copies)
    @rule(one=several, how=copying)
    def restore(self, one: int, how: str) -> None:
        """Restore a backup of the file: its records are in force again."""
        content, self.tokens = self.copies[one % len(self.copies)]
        self.put(content, how)
        self.state = "good"

    @precondition(lambda self: self.state != "broken")  # else there is hardly ever a good file
    @rule(replacement=st.sampled_from([*BROKEN, *SPECIAL]), how=copying)
    def spoil(self, replacement: bytes | str, how: str) -> None:
        """Write something that is no token file, or put another kind of object in its place."""
        if isinstance(replacement, bytes):
            self.put(replacement, how)
        else:
            self.clear()
            SPECIAL[replacement](self.path)
            self.by_hand()
        self.state = "broken"

    @rule(names=st.lists(several, min_size=1, max_size=3, unique=True), active=st.booleans(), how=copying)
    def put_plain_tokens(self, names: list[int], how: str, *, active: bool = True) -> None:
        """Bring a file of the ancestor's format."""
        secrets = [f"sk-plain-{name}-{'x' * 35}" for name in names]
        entry = {"name": "old", "created_at": "2024-01-01T00:00:00", "active": active}
        self.put(json.dumps(dict.fromkeys(secrets, entry)).encode(), how)
        self.tokens = {secret: Known(digest_of(secret).hex()[:12], revoked=not active) for secret in secrets}
        self.secrets = list(dict.fromkeys([*self.secrets, *secrets]))
        self.state = "good"

    @precondition(lambda self: self.state != "missing")
    @rule()
    def remove(self) -> None:
        """Move the file away, or remove the object in its place."""
        if self.state == "good":
            self.path.replace(self.aside)
            self.moved = self.tokens
        self.clear()
        self.by_hand()
        self.tokens, self.state = {}, "missing"

    @precondition(lambda self: self.moved is not None)
    @rule()
    def move_back(self) -> None:
        """Move the file back, over its present successor."""
        self.clear()
        self.aside.rename(self.path)
        self.by_hand()
        self.tokens, self.moved, self.state = self.moved or {}, None, "good"

    @precondition(lambda self: self.state == "good")
    @rule(mode=st.sampled_from([None, 0o600, 0o640, 0o666]))
    def touch(self, mode: int | None) -> None:
        """Touch the file, or change its permissions: no token changes."""
        self.path.touch() if mode is None else self.path.chmod(mode)
        self.by_hand()

    # --- servers

    @rule()
    def restart(self) -> None:
        """Restart the server: its new workers know nothing of the past."""
        self.notes.clear()
        self.servers.clear()
        for has_key in (False, True):
            self.recycle(9, has_key=has_key)

    @rule(one=several, has_key=st.booleans())
    def recycle(self, one: int, *, has_key: bool = False) -> None:
        """Start a worker in the place of another: it is never more open than that one was."""
        self.patch.delenv("FREEGPT_API_KEY", raising=False)
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv(*("FREEGPT_API_KEY", KEY) if has_key else ("FREEGPT_AUTH_REQUIRED", "0"))
            environment.chdir(self.folder.name)  # the store must not be named: the server could not be open
            environment.setattr(sharing, "_shared", WeakValueDictionary())  # that of another process
            middleware = BearerTokenMiddleware(AsyncMock(), usage="off")
        configured = any(server.configured for server in self.servers)
        del self.servers[one : one + 1]
        self.servers.append(Server(middleware, has_key, configured))
        self.ask(self.servers[-1])

    def ask(self, server: Server) -> None:
        """Send a server every secret so far: it decides by the file, or by its last good reading."""
        broken = self.state == "broken"
        server.configured = server.configured or self.state != "missing"
        server.tokens = server.tokens if broken else self.tokens
        is_open = not server.configured and not server.has_key
        for secret in [*self.secrets, STRANGER, KEY, None]:
            unknown = "unavailable" if broken else "unknown"
            outcome = server.tokens[secret].outcome(self.now) if secret in server.tokens else unknown
            outcome = "missing" if secret is None else "accepted" if secret == KEY and server.has_key else outcome
            assert (secret, decided(server.middleware, secret)) == (secret, "accepted" if is_open else outcome)
        active = [known for known in server.tokens.values() if known.outcome(self.now) == "accepted"]
        assert server.middleware._authenticator._source.survey()[:2] == (server.configured, len(active))

    @rule(one=several)
    def idle_server_is_asked(self, one: int) -> None:
        """A request comes to a server that may have slept through many changes."""
        self.ask(self.servers[one % len(self.servers)])

    @invariant()
    def busy_server_answers_right(self) -> None:
        """One server is asked all the time."""
        for server in self.servers[:1]:
            self.ask(server)


def decided(middleware: BearerTokenMiddleware, secret: str | None) -> str:
    """Return how a request with this secret ends, decided step by step as the middleware does."""
    headers = [(b"authorization", f"Bearer {secret}".encode())] * (secret is not None)
    scope: Any = {"type": "http", "method": "GET", "path": "/", "headers": headers}
    authenticator, credentials = middleware._authenticator, presented(scope)
    decision = authenticator.recognise(scope)[0] or authenticator.peek(credentials)
    if decision is UNRESOLVED:
        decision = authenticator.resolve(credentials)
    return "accepted" if isinstance(decision, Caller) else decision.reason


LIFE: dict[str, list[tuple[Any, ...]]] = {
    "plain tokens are converted": [("change_without_a_file",), ("put_plain_tokens", [1, 2], "replace")],
    "tokens are issued": [("create", LIFETIME), ("create", inf)],
    "tokens end": [("end", 3, "revoke"), ("end", 0, "delete"), ("wait", 0.019), ("wait", LIFETIME)],
    "nothing changes": [("touch", None), ("touch", 0o640), ("restore", 1, "overwrite"), ("idle_server_is_asked", 1)],
    "the file breaks": [("spoil", "loop", "replace"), ("change_without_a_file",), ("spoil", "folder", "replace")],
    "the file is moved": [("restore", 1, "replace"), ("remove",), ("recycle", 0), ("spoil", b"", "replace")],
    "the file returns": [("move_back",), ("put_plain_tokens", [1], "overwrite")],
    "another of its size follows": [("put_plain_tokens", [2], "overwrite"), ("spoil", "fifo", "replace")],
    "the server is restarted": [("remove",), ("restart",)],
    "a server starts beside a fault": [("spoil", "dangling", "replace"), ("remove",), ("recycle", 0)],
}
"""A life in which everything happens."""


def test_a_life_in_which_everything_happens() -> None:
    """Each command, each fault and each mending has its effect in every server, and none of it is left to chance."""
    life = Lives()
    try:
        for step, *arguments in chain.from_iterable(LIFE.values()):
            getattr(life, step)(*arguments)
            life.busy_server_answers_right()
    finally:
        life.teardown()


TestLives = Lives.TestCase
TestLives.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
