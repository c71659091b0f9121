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
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from freegpt_auth import UNRESOLVED, BearerTokenMiddleware, FileTokenStore, StoreError, sharing
from freegpt_auth.exceptions import TokenNotFoundError
from freegpt_auth.guard.callers import Caller
from freegpt_auth.guard.credentials import presented
from freegpt_auth.stores import base, rules
from freegpt_auth.stores.file import store as file_store, worker_notes
from freegpt_auth.tokens import digest_of, find, issue

KEY, STRANGER = "the-environment-key", "sk-nobody-has-this"
LIFETIME = 60.0
BROKEN = [
    b"",
    b"[]",
    b'{"version": 1, "tokens": [\n',
    b'{"version": 2, "tokens": []}',
    b'{"sk-plain": 1}',
    b"\xff" * 40,
]
SPECIAL = ["folder", "fifo", "dangling", "loop"]

several = st.integers(0, 9)


@dataclass(frozen=True)
class Known:
    """A token in the model."""

    id: str
    prefix: str
    expires: float = float("inf")
    revoked: bool = False

    def outcome(self, now: float) -> str:
        """Return how a request with its secret ends."""
        return "revoked" if self.revoked else "accepted" if self.expires > now else "expired"


@dataclass
class Server:
    """A long-lived middleware with its expected knowledge: the tokens of the last reading, and whether it failed."""

    middleware: BearerTokenMiddleware
    has_key: bool
    configured: bool = False
    broken: bool = False
    tokens: dict[str, Known] = field(default_factory=dict)


class Lives(RuleBasedStateMachine):
    """The model: which tokens the file holds, and which of its faults it has now."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name, "api_tokens.json")
        self.aside, self.probe = (self.path.with_name(name) for name in ("moved-away.json", "probe"))
        self.ticks, self.now = 0.0, time.time()
        self.patch = pytest.MonkeyPatch()
        defaults = FileTokenStore.__init__.__kwdefaults__
        assert defaults is not None
        self.patch.setitem(defaults, "sleep", self.wait)
        self.patch.setitem(defaults, "clock", lambda: self.ticks)
        for module in (base, rules):
            self.patch.setattr(module, "time", SimpleNamespace(time=lambda: self.now))
        self.patch.setattr(worker_notes, "_servers", lambda _: (worker_notes._Server(os.getpid(), self.supervisor),))
        self.patch.setattr(worker_notes, "_folders", lambda: (Path(self.folder.name, "notes"),))
        self.writers = [FileTokenStore(self.path), FileTokenStore(self.path)]
        self.state = "missing"
        self.tokens: dict[str, Known] = {}
        self.copies: list[tuple[bytes, dict[str, Known]]] = []
        self.moved: dict[str, Known] | None = None
        self.issued: list[str] = []
        self.plain: list[str] = []
        self.servers: list[Server] = []

    @initialize()
    def start(self) -> None:
        """Start a server with an environment key and one without, before there is any token."""
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

    def wait(self, seconds: float) -> None:
        """Let time pass, as a writer does that waits."""
        self.ticks += seconds
        self.now += seconds

    @rule(seconds=st.sampled_from([0.001, 0.019, 1.0]))
    def time_passes(self, seconds: float) -> None:
        """Looks at the file grow old."""
        self.wait(seconds)

    @precondition(lambda self: any(known.outcome(self.now) == "accepted" for known in self.tokens.values()))
    @rule()
    def tokens_expire(self) -> None:
        """Nothing happens until every token that was to expire has."""
        self.wait(LIFETIME)

    def by_hand(self) -> None:
        """Wait until an operator's change of the file is seen: the freshness of a check."""
        self.wait(file_store.FRESHNESS + 1e-9)  # a sum of fractions may be a little less than it should be

    def tick(self) -> None:
        """Wait until the file system's clock has moved on, so that no two states of the file have one signature."""
        self.probe.touch()
        before, deadline = self.probe.stat().st_mtime_ns, time.monotonic() + 10
        while self.probe.stat().st_mtime_ns == before:
            assert time.monotonic() < deadline
            self.probe.touch()

    # --- commands

    @precondition(lambda self: self.state != "broken")
    @rule(which=several, expires=st.booleans())
    def create(self, which: int, *, expires: bool) -> None:
        """Issue a token, for ever or for a minute."""
        self.tick()
        ends = self.now + LIFETIME if expires else None
        instant = datetime.fromtimestamp(ends, UTC) if ends else None
        token, secret = issue(f"token {len(self.issued)}", now=datetime.now(UTC), expires_at=instant)
        self.writers[which % 2].add(digest_of(secret), token)
        known = Known(token.id, token.prefix, instant.timestamp() if instant else float("inf"))
        self.tokens, self.state = {**self.tokens, secret: known}, "good"
        self.issued.append(secret)
        self.written()

    @precondition(lambda self: self.state == "good" and self.tokens)
    @rule(
        which=several,
        one=several,
        kind=st.sampled_from(["secret", "id", "prefix", "dotted", "longer"]),
        delete=st.booleans(),
    )
    def end(self, which: int, one: int, kind: str, *, delete: bool) -> None:
        """Revoke a token, perhaps again, or delete it, by any reference to it."""
        self.tick()
        secret = list(self.tokens)[one % len(self.tokens)]
        known, writer = self.tokens[secret], self.writers[which % 2]
        references = {"id": known.id, "prefix": known.prefix, "dotted": f"{known.prefix}...", "longer": secret[:20]}
        (meant,) = find(references.get(kind, secret), writer.tokens())
        assert meant.id == known.id
        others = {other: each for other, each in self.tokens.items() if other != secret}
        if delete:
            writer.delete(meant.id)
            self.tokens = others
        else:
            assert writer.revoke(meant.id, datetime.now(UTC)).revoked_at is not None
            self.tokens = {**self.tokens, secret: Known(known.id, known.prefix, known.expires, revoked=True)}
        self.written()

    def written(self) -> None:
        """Check that a command left neither a secret in the file nor a file beside it."""
        content = self.path.read_text()
        assert [secret for secret in self.issued + self.plain if secret in content] == []
        assert list(self.path.parent.glob(".*.tmp")) == []

    @precondition(lambda self: self.state != "good")
    @rule(which=several)
    def change_what_is_not_there(self, which: int) -> None:
        """A command never writes over a file it cannot read, nor invents one to revoke a token in."""
        before, broken = self.contents(), self.state == "broken"
        writer, (token, secret) = self.writers[which % 2], issue("x", now=datetime.now(UTC))
        changes: list[Any] = [lambda: writer.revoke("x", datetime.now(UTC)), lambda: writer.delete("x")]
        for change in changes + [lambda: writer.add(digest_of(secret), token)] * broken:
            with pytest.raises(StoreError if broken else TokenNotFoundError):
                change()
        assert self.contents() == before

    def contents(self) -> list[tuple[str, object]]:
        """Return the kinds and the bytes of all files in the folder."""
        found = [path for path in self.path.parent.iterdir() if path.suffix != ".lock"]
        return sorted(
            (path.name, path.read_bytes() if path.is_file() else oct(path.lstat().st_mode)) for path in found
        )  # fmt: skip

    # --- an operator's hands

    def clear(self) -> None:
        """Remove the file, or the object in its place."""
        with contextlib.suppress(IsADirectoryError, FileNotFoundError):
            self.path.unlink()
        with contextlib.suppress(FileNotFoundError):
            self.path.rmdir()

    def put(self, content: bytes, *, replace: bool) -> None:
        """Replace the file or overwrite it, as ``cp -p`` and ``tar`` do: the copy is as old as the original."""
        self.tick()
        if replace or not self.path.is_file():
            self.clear()
            fresh = self.path.with_name("fresh")
            fresh.write_bytes(content)
            os.utime(fresh, (1.7e9, 1.7e9))
            fresh.rename(self.path)
        else:
            self.path.write_bytes(content)
            os.utime(self.path, (1.7e9, 1.7e9))
        self.by_hand()

    @precondition(lambda self: self.state == "good")
    @rule()
    def copy(self) -> None:
        """Make a backup."""
        self.copies.append((self.path.read_bytes(), self.tokens))

    @precondition(lambda self: self.copies)
    @rule(one=several, replace=st.booleans())
    def restore(self, one: int, *, replace: bool) -> None:
        """Restore a backup of the file: its records are in force again."""
        content, self.tokens = self.copies[one % len(self.copies)]
        self.put(content, replace=replace)
        self.state = "good"

    @precondition(lambda self: self.state != "broken")  # else there is hardly ever a good file
    @rule(content=st.sampled_from(BROKEN), replace=st.booleans())
    def spoil(self, content: bytes, *, replace: bool) -> None:
        """Write something that is no token file."""
        self.put(content, replace=replace)
        self.state = "broken"

    @precondition(lambda self: self.state == "good")
    @rule(missing=st.integers(2, 30))
    def truncate(self, missing: int) -> None:
        """Lose the end of the file, and more of it than the last line break, as on a full disk."""
        self.tick()
        os.truncate(self.path, self.path.stat().st_size - missing)
        self.by_hand()
        self.state = "broken"

    @precondition(lambda self: self.state != "broken")
    @rule(kind=st.sampled_from(SPECIAL))
    def put_something_else(self, kind: str) -> None:
        """Replace the file by another kind of object."""
        self.clear()
        ways: dict[str, Any] = {
            "folder": self.path.mkdir,
            "fifo": lambda: os.mkfifo(self.path),
            "dangling": lambda: self.path.symlink_to("nowhere"),
            "loop": lambda: self.path.symlink_to(self.path.name),
        }
        ways[kind]()
        self.by_hand()
        self.state = "broken"

    @rule(names=st.lists(several, min_size=1, max_size=3, unique=True), active=st.booleans(), replace=st.booleans())
    def put_plain_tokens(self, names: list[int], *, active: bool, replace: bool) -> None:
        """Bring a file of the ancestor's format."""
        secrets = [f"sk-plain-{name}-{'x' * 35}" for name in names]
        entry = {"name": "old", "created_at": "2024-01-01T00:00:00", "active": active}
        self.put(json.dumps(dict.fromkeys(secrets, entry)).encode(), replace=replace)
        self.tokens = {one: Known(digest_of(one).hex()[:12], one[:14], revoked=not active) for one in secrets}
        self.plain = sorted({*self.plain, *secrets})
        self.state = "good"

    @precondition(lambda self: self.state == "good")
    @rule()
    def move_away(self) -> None:
        """Move the file away."""
        self.path.replace(self.aside)
        self.by_hand()
        self.tokens, self.moved, self.state = {}, self.tokens, "missing"

    @precondition(lambda self: self.moved is not None)
    @rule()
    def move_back(self) -> None:
        """Move the file back, over its present successor."""
        self.clear()
        self.aside.rename(self.path)
        self.by_hand()
        self.tokens, self.moved, self.state = self.moved or {}, None, "good"

    @precondition(lambda self: self.state != "missing")
    @rule()
    def remove(self) -> None:
        """Remove the file, or its replacement."""
        self.clear()
        self.by_hand()
        self.tokens, self.state = {}, "missing"

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
        self.supervisor = os.urandom(8)
        self.ever_configured = False
        self.servers.clear()
        for has_key in (False, True):
            self.recycle(9, has_key=has_key)

    @rule(one=several, has_key=st.booleans())
    def recycle(self, one: int, *, has_key: bool) -> None:
        """Start a worker in the place of another: it is never more open than that one was."""
        self.patch.delenv("FREEGPT_API_KEY", raising=False)
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv(*("FREEGPT_API_KEY", KEY) if has_key else ("FREEGPT_AUTH_REQUIRED", "0"))
            environment.chdir(self.folder.name)  # the store must not be named: the server could not be open
            environment.setattr(sharing, "_shared", WeakValueDictionary())  # that of another process
            middleware = BearerTokenMiddleware(no_app, usage="off")
        del self.servers[one : one + 1]
        self.servers.append(Server(middleware, has_key, configured=self.ever_configured))
        self.ask(self.servers[-1])

    def look(self, server: Server) -> None:
        """Record a server's knowledge after a check of the file."""
        server.broken = self.state == "broken"
        server.configured = server.configured or self.state != "missing"
        self.ever_configured = self.ever_configured or server.configured
        if not server.broken:
            server.tokens = self.tokens

    def ask(self, server: Server) -> None:
        """Send a server every secret so far: it decides by the file, or by its last good reading."""
        self.look(server)
        is_open = not server.configured and not server.has_key
        for secret in [*self.issued, *self.plain, STRANGER, KEY, None]:
            unknown = "unavailable" if server.broken else "unknown"
            outcome = server.tokens[secret].outcome(self.now) if secret in server.tokens else unknown
            outcome = "missing" if secret is None else "accepted" if secret == KEY and server.has_key else outcome
            assert (secret, decided(server.middleware, secret)) == (secret, "accepted" if is_open else outcome)

    @rule(one=several)
    def idle_server_is_asked(self, one: int) -> None:
        """A request comes to a server that may have slept through many changes."""
        self.ask(self.servers[one % len(self.servers)])

    @invariant()
    def busy_server_answers_right(self) -> None:
        """One server is asked all the time."""
        for server in self.servers[:1]:
            self.ask(server)


async def no_app(*_: object) -> None:
    """Stand in for an application: only the decisions of the servers matter."""


def decided(middleware: BearerTokenMiddleware, secret: str | None) -> str:
    """Return how a request with this secret ends, decided step by step as the middleware does."""
    headers = [(b"authorization", f"Bearer {secret}".encode())] * (secret is not None)
    scope: Any = {"type": "http", "method": "GET", "path": "/", "headers": headers}
    authenticator, credentials = middleware._authenticator, presented(scope)
    decision = authenticator.recognise(scope)[0] or authenticator.peek(credentials)
    if decision is UNRESOLVED:
        decision = authenticator.resolve(credentials)
    return "accepted" if isinstance(decision, Caller) else decision.reason


LIFE: list[tuple[str, dict[str, Any]]] = [
    ("start", {}),
    ("change_what_is_not_there", {"which": 0}),
    ("put_plain_tokens", {"names": [1, 2], "active": True, "replace": True}),
    ("create", {"which": 0, "expires": True}),
    ("create", {"which": 1, "expires": False}),
    ("copy", {}),
    ("end", {"which": 0, "one": 3, "kind": "prefix", "delete": False}),
    ("end", {"which": 1, "one": 0, "kind": "secret", "delete": True}),
    ("time_passes", {"seconds": 0.019}),
    ("tokens_expire", {}),
    ("touch", {"mode": None}),
    ("touch", {"mode": 0o640}),
    ("restore", {"one": 0, "replace": False}),
    ("idle_server_is_asked", {"one": 1}),
    ("truncate", {"missing": 2}),
    ("change_what_is_not_there", {"which": 1}),
    ("put_something_else", {"kind": "folder"}),
    ("restore", {"one": 0, "replace": True}),
    ("move_away", {}),
    ("recycle", {"one": 0, "has_key": False}),
    ("spoil", {"content": b"", "replace": True}),
    ("move_back", {}),
    ("put_plain_tokens", {"names": [1], "active": True, "replace": False}),
    ("put_plain_tokens", {"names": [2], "active": True, "replace": False}),  # as large as the one before
    ("spoil", {"content": b"[]", "replace": False}),
    ("remove", {}),
    ("restart", {}),
    ("put_something_else", {"kind": "dangling"}),
    ("remove", {}),
    ("recycle", {"one": 0, "has_key": False}),
]
"""A life in which everything happens."""


def test_a_life_in_which_everything_happens() -> None:
    """Each command, each fault and each mending has its effect in every server, and none of it is left to chance."""
    life = Lives()
    try:
        for step, arguments in LIFE:
            getattr(life, step)(**arguments)
            life.busy_server_answers_right()
    finally:
        life.teardown()


TestLives = Lives.TestCase
TestLives.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
