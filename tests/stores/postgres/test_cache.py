"""The token cache of a process, against a model that holds every past state of the database."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from freegpt_auth import UNRESOLVED, Token
from freegpt_auth.stores.postgres.cache import TokenCache
from freegpt_auth.stores.postgres.reads import Change

if TYPE_CHECKING:
    from collections.abc import Callable

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
UNKNOWN = bytes(32)

State = dict[bytes, Token]  # every token of a database at one revision

token_numbers = st.integers(0, 7)


def _digest(number: int) -> bytes:
    return bytes([number + 1]) * 32


def _token(number: int, name: str = "", revoked_at: datetime | None = None) -> Token:
    return Token(id=str(number), name=name, prefix="", created_at=NOW, revoked_at=revoked_at)


def _tokens(count: int) -> State:
    return {_digest(number): _token(number) for number in range(count)}


def _cached(cache: TokenCache) -> State:
    """Return the cached tokens by digest. The id of each token here is its number."""
    return {_digest(int(token.id)): token for token in cache.tokens()}


class TokenCacheMachine(RuleBasedStateMachine):
    """A database, rows read from it that have not arrived yet, and a cache."""

    @initialize(limit=st.integers(1, 8))
    def begin(self, limit: int) -> None:
        """Start a process with a cache of any size that has read nothing yet."""
        self.states: list[State] = [{}]  # by revision
        self.log: list[tuple[int, bytes]] = []
        self.reads: list[tuple[bytes, Token | None, int]] = []
        self.pinned: State = {}
        self.before: State = {}
        self.fresh: set[bytes] = set()
        self.cache = TokenCache(limit, changes_kept=4)

    @property
    def head(self) -> int:
        """The revision of the database."""
        return len(self.states) - 1

    def expected(self, digest: bytes) -> Token | None:
        """Return the only token that may be cached: that of the cache's revision, or a pinned revocation."""
        token = self.states[self.cache.revision].get(digest) if self.cache.revision >= 0 else None
        return token and self.pinned.get(digest, token)

    # --- the database

    def write(self, digest: bytes, token: Token | None) -> None:
        """Raise the revision with one change."""
        state = {**self.states[-1], digest: token}
        self.states.append({key: each for key, each in state.items() if each is not None})
        self.log.append((self.head, digest))

    @rule(number=token_numbers)
    def create_or_delete(self, number: int) -> None:
        """Add the token, or delete it; a revoked and deleted token may be added again."""
        there = self.states[-1].get(_digest(number))
        self.write(_digest(number), None if there else _token(number, f"since {self.head}"))

    @rule(number=token_numbers)
    def revoke_or_rename(self, number: int) -> None:
        """Revoke the token, or rename it if it is revoked."""
        there = self.states[-1].get(_digest(number))
        if there is not None:
            revoked_at = there.revoked_at or NOW
            self.write(_digest(number), msgspec.structs.replace(there, revoked_at=revoked_at, name=f"at {self.head}"))

    # --- the process

    @rule()
    def follow(self) -> None:
        """Read the log of changes, each with the present state of its token; at first the whole table."""
        if self.cache.revision < 0:
            self.reload(pin_revocations=False)
            return
        new = [(revision, digest) for revision, digest in self.log if revision > self.cache.revision]
        self.fresh = {digest for _, digest in new}
        for digest in self.fresh:
            self.pinned.pop(digest, None)
        self.cache.apply((Change(*one, self.states[-1].get(one[1])) for one in new), self.head)

    @rule(pin_revocations=st.booleans())
    def reload(self, *, pin_revocations: bool) -> None:
        """Read the whole table: too much has changed, or the log begins after the cached revision."""
        self.fresh = {_digest(number) for number in range(8)}
        if pin_revocations:
            self.pinned.update({key: each for key, each in _cached(self.cache).items() if each.revoked_at is not None})
        first = dict(list(self.states[-1].items())[: self.cache.limit + 1])
        self.cache.load(first, self.head, pin_revocations=pin_revocations)

    @precondition(lambda self: self.cache.revision > 0)
    @rule(lost=st.integers(1, 3), number=token_numbers, goes_on=st.booleans())
    def lose_changes(self, lost: int, number: int, *, goes_on: bool) -> None:
        """Fail over to a standby that lacks the last changes and may have new ones."""
        kept = max(1, len(self.states) - lost)
        self.states = self.states[:kept]
        self.log = [one for one in self.log if one[0] < kept]
        self.reads.clear()  # their connections are closed
        if goes_on:
            self.create_or_delete(number)
        self.reload(pin_revocations=True)

    @rule(number=token_numbers)
    def begin_reading(self, number: int) -> None:
        """Read one token that is not cached; the row arrives later."""
        if self.cache.find(_digest(number)) is None:
            self.reads.append((_digest(number), self.states[-1].get(_digest(number)), self.head))

    @precondition(lambda self: self.reads)
    @rule(data=st.data())
    def finish_reading(self, data: st.DataObject) -> None:
        """Receive one of the rows: it is used unless a later change of its token is known."""
        digest, token, revision = self.reads.pop(data.draw(st.integers(0, len(self.reads) - 1)))
        answer = self.cache.fill(digest, token, revision)
        is_stale = answer is UNRESOLVED
        assert not is_stale or revision < self.cache.revision
        assert is_stale or answer == (token and self.pinned.get(digest, token))
        assert is_stale or revision > self.cache.revision or answer == self.expected(digest)

    @rule(number=token_numbers)
    def find(self, number: int) -> None:
        """Find a token if it is cached."""
        cached = _cached(self.cache).get(_digest(number))
        assert self.cache.find(_digest(number)) is cached

    @invariant()
    def cache_is_the_database_at_its_revision(self) -> None:
        """No token is older or newer than the cache's revision, and the limit holds."""
        held = _cached(self.cache)
        assert held == {digest: self.expected(digest) for digest in held}
        assert len(self.cache) == len(held) <= self.cache.limit
        assert self.cache.pinned == len(self.pinned)
        assert self.cache.find(UNKNOWN) is None

    @invariant()
    def complete_means_complete(self) -> None:
        """A token missing from a complete cache does not exist."""
        if self.cache.complete:
            assert _cached(self.cache).keys() == self.states[self.cache.revision].keys()

    @invariant()
    def a_token_stays_the_same_object(self) -> None:
        """An unchanged token stays the same object until the whole table is read again."""
        held = _cached(self.cache)
        assert all(held[digest] is self.before[digest] for digest in held.keys() & self.before.keys() - self.fresh)
        self.before, self.fresh = held, set()


TestTokenCache = TokenCacheMachine.TestCase
TestTokenCache.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def _partial() -> TokenCache:
    """Return a cache of the first three of five tokens, all in the older half."""
    cache = TokenCache(4)
    cache.load(_tokens(5), 1)
    cache.fill(_digest(2), _token(2), 1)
    return cache


def test_stale_row_is_read_again() -> None:
    """A row that was read before a change of its token, or before the oldest change kept, is not used."""
    cache = TokenCache(4, changes_kept=2)
    cache.load(_tokens(5), 1)
    cache.apply([Change(revision, _digest(3), _token(3)) for revision in (2, 3)], 3)
    assert cache.fill(_digest(3), _token(3), 2) is UNRESOLVED
    assert cache.fill(_digest(4), _token(4), 2) == _token(4)
    cache.apply([Change(4, _digest(3), _token(3)), Change(5, _digest(2), _token(2))], 5)
    assert cache.fill(_digest(4), _token(4), 2) is UNRESOLVED


def test_newer_row_is_answered_but_not_cached() -> None:
    """A request may know more than the cache: the next reads the row again until the cache is at that revision."""
    cache, revoked = _partial(), _token(3, revoked_at=NOW)
    assert cache.fill(_digest(3), revoked, 2) is revoked
    assert cache.find(_digest(3)) is None
    cache.apply([Change(2, _digest(3), revoked)], 2)
    assert cache.fill(_digest(3), revoked, 2) is cache.find(_digest(3)) is revoked


@pytest.mark.parametrize("number", [0, 3])
def test_concurrent_look_ups_share_one_object(number: int) -> None:
    """Two requests that looked up the same token at the same time get the same record, and so do all later requests."""
    cache = _partial()
    first = cache.fill(_digest(number), _token(number), 1)
    assert cache.fill(_digest(number), _token(number), 1) is cache.find(_digest(number)) is first


def test_differing_row_replaces_the_cached_one() -> None:
    """If a row differs from the cached token of the same revision, the row wins, in either half of the cache."""
    cache = _partial()
    for name in ("in the older half", "in the recent half"):
        other = _token(0, name)
        assert cache.fill(_digest(0), other, 1) is cache.find(_digest(0)) is other
        assert len(_cached(cache)) == len(cache)


# --- a full cache


def test_repeatedly_used_tokens_stay_cached() -> None:
    """A working set that fits into half of the cache is found whole, after larger ones did not fit."""
    cache = TokenCache(20)
    cache.load(_tokens(21), 1)
    for size in (*range(1, 200), 10, 10):
        for number in range(size % 150):
            if cache.find(_digest(number)) is None:
                cache.fill(_digest(number), _token(number), 1)
        assert len(cache) <= 20
    assert all(cache.find(_digest(number)) for number in range(10))


def test_changes_of_other_tokens_evict_none() -> None:
    """A thousand changes of tokens that are not cached neither fill nor empty the cache."""
    cache = TokenCache(10)
    cache.load({number.to_bytes(32): _token(number) for number in range(11)}, 1)
    cache.apply([Change(2, number.to_bytes(32), _token(number, "new")) for number in range(1_000)], 2)
    assert [token.name for token in cache.tokens()] == ["new"] * 5


@pytest.mark.parametrize("limit", [1, 100])
def test_unknown_digests_take_no_memory(limit: int) -> None:
    """A flood of wrong tokens is not cached, whether or not the table fits into the cache."""
    cache = TokenCache(limit)
    cache.load(_tokens(3), 1)
    before = len(cache)
    for number in range(1_000):
        assert cache.fill(number.to_bytes(32), None, 1) is None
    assert max(len(each) for each in vars(cache).values() if isinstance(each, dict)) == len(cache) == before


# --- concurrency


def test_reader_never_takes_a_token_for_unknown() -> None:
    """At each line of a change, a reload or a rotation, a request finds its token or looks it up in the database."""
    cache, tracer = TokenCache(4), sys.gettrace()

    def check(*_: object) -> Any:
        assert not cache.complete or all(cache.find(digest) for digest in _tokens(4))
        return check

    steps: list[tuple[Callable[[], None], bool]] = [
        (lambda: cache.load(_tokens(4), 1), True),
        (lambda: cache.apply([Change(2, _digest(number), _token(number, "new")) for number in range(4)], 2), True),
        (lambda: cache.load(_tokens(4), 3), True),
        (lambda: cache.apply([Change(4, _digest(number), _token(number)) for number in (4, 5, 6)], 4), False),
        (lambda: cache.apply([Change(5, _digest(number), None) for number in (4, 5, 6)], 5), False),
        (lambda: cache.load(_tokens(4), 6), True),
        (lambda: cache.load(_tokens(5), 7), False),
    ]
    for step, is_complete in steps:
        check()
        sys.settrace(check)
        try:
            step()
        finally:
            sys.settrace(tracer)
        assert cache.complete is is_complete


def test_find_never_waits_for_a_lock() -> None:
    """While a thread changes the cache, requests on the event loop are still answered."""
    cache = _partial()
    with cache._lock, ThreadPoolExecutor(1) as threads:
        assert threads.submit(cache.find, _digest(0)).result(timeout=30) == _token(0)
    assert cache.find(_digest(0)) == _token(0)


@pytest.mark.parametrize("after", [_token(0, revoked_at=NOW), None, _token(0)], ids=["revoked", "deleted", "promoted"])
def test_delayed_promotion_undoes_no_change(after: Token | None) -> None:
    """A request that found a token in the older half and was delayed finds its state after a change made meanwhile."""
    cache = _partial()

    def acquire(*, blocking: bool) -> bool:
        cache._lock = lock
        if after != _token(0):
            cache.apply([Change(2, _digest(0), after)], 2)
        assert cache.find(_digest(0)) == after
        return lock.acquire(blocking=blocking)

    lock, cache._lock = cache._lock, SimpleNamespace(acquire=acquire)  # type: ignore[assignment]
    assert cache.find(_digest(0)) == after
    assert cache._lock is lock
    assert cache.find(_digest(0)) == after


def test_threads_never_find_a_revoked_token_active() -> None:
    """With requests, stale rows and the follower's thread at the same time, a revoked token stays revoked."""
    cache, revoked, stop = TokenCache(6), dict[int, int](), threading.Event()
    cache.load(_tokens(8), 0)

    def use() -> None:
        while not stop.is_set():
            for number in range(8):
                since = revoked.get(number)
                token = cache.find(_digest(number))
                assert since is None or token is None or token.revoked_at is not None
                if token is None:  # the row from before the revocation
                    cache.fill(_digest(number), _token(number), (since or 10**9) - 1)

    with ThreadPoolExecutor(3) as threads:
        users = [threads.submit(use) for _ in range(3)]
        try:
            for number in range(8):
                for _ in range(200):
                    cache.apply([Change(number + 1, _digest(number), _token(number, revoked_at=NOW))], number + 1)
                revoked[number] = number + 1
        finally:
            stop.set()
        assert [user.result() for user in users] == 3 * [None]
