"""The token cache of a process, against a model that holds every past state of the database."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
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

State = dict[bytes, Token]
"""Every token of a database at one revision."""

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

    def __init__(self) -> None:
        super().__init__()
        self.states: list[State] = [{}]  # by revision
        self.log: list[tuple[int, bytes]] = []
        self.reads: list[tuple[bytes, Token | None, int]] = []
        self.pinned: State = {}
        self.cache = TokenCache(1)
        self.before: State = {}
        self.fresh: set[bytes] = set()

    @initialize(limit=st.integers(1, 8))
    def begin(self, limit: int) -> None:
        """Start a process with a cache of any size."""
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
        """Read the log of changes, each with the present state of its token."""
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
        """Find a token in the state of the cache's revision, or not at all."""
        found = self.cache.find(_digest(number))
        assert found is None or found == self.expected(_digest(number))

    @rule()
    def use_everything(self) -> None:
        """Use every cached token."""
        for digest in _cached(self.cache):
            assert self.cache.find(digest) is not None

    @invariant()
    def cache_is_the_database_at_its_revision(self) -> None:
        """No token is older or newer than the cache's revision, and the limit holds."""
        held = _cached(self.cache)
        assert held == {digest: self.expected(digest) for digest in held}
        assert len(self.cache) == len(held) <= self.cache.limit
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


def test_state_machine_covers_every_rule() -> None:
    """Stale rows, lost changes, and a full cache that is used again: none of them is left to chance."""
    machine = TokenCacheMachine()
    machine.begin(limit=4)
    machine.follow()
    for number in range(3):
        machine.create_or_delete(number)
    machine.follow()
    assert machine.cache.complete
    machine.revoke_or_rename(1)
    machine.follow()
    for number in range(3, 8):
        machine.create_or_delete(number)
    machine.revoke_or_rename(7)
    machine.follow()
    assert not machine.cache.complete
    machine.use_everything()
    machine.begin_reading(7)
    machine.lose_changes(lost=1, number=7, goes_on=False)
    machine.lose_changes(lost=8, number=1, goes_on=True)
    machine.cache_is_the_database_at_its_revision()
    machine.complete_means_complete()
    machine.a_token_stays_the_same_object()


# --- stale rows


def test_newer_row_is_answered_but_not_cached() -> None:
    """A request may know more than the cache. The next request reads the row again until the cache is at that revision."""
    cache = TokenCache(2)
    cache.load(_tokens(3), 1)
    revoked = _token(2, revoked_at=NOW)
    assert cache.fill(_digest(2), revoked, 2) is revoked
    assert cache.find(_digest(2)) is None
    cache.apply([Change(2, _digest(2), revoked)], 2)
    assert cache.find(_digest(2)) is None
    assert cache.fill(_digest(2), revoked, 2) is cache.find(_digest(2)) is revoked


def test_concurrent_look_ups_share_one_object() -> None:
    """Two requests that looked up the same token at the same time get the same record, and so do all later requests."""
    cache = TokenCache(2)
    cache.load(_tokens(3), 1)
    first = cache.fill(_digest(2), _token(2), 1)
    assert cache.fill(_digest(2), _token(2), 1) is first
    cache.fill(_digest(1), _token(1), 1)  # rotates: the first token is in the older half
    assert cache.fill(_digest(2), _token(2), 1) is cache.find(_digest(2)) is first


def test_differing_row_replaces_the_cached_one() -> None:
    """If a row differs from the cached token of the same revision, the row wins, in either half of the cache."""
    cache = TokenCache(4)
    cache.load(_tokens(5), 1)
    for name in ("another", "and another"):
        other = _token(1, name)
        assert cache.fill(_digest(1), other, 1) is cache.find(_digest(1)) is other
        assert len(_cached(cache)) == len(cache)
        cache.fill(_digest(3), _token(3), 1)
        cache.fill(_digest(4), _token(4), 1)  # rotates: the token is in the older half


def test_pin_ends_with_a_change_of_the_token() -> None:
    """After lost changes an operator can restore a token that stays revoked here: by changing that token."""
    cache = TokenCache(9)
    cache.load({_digest(0): _token(0, revoked_at=NOW), _digest(1): _token(1)}, 4)
    cache.load(_tokens(2), 2, pin_revocations=True)
    cache.apply([Change(3, _digest(1), _token(1, "other"))], 3)
    assert cache.find(_digest(0)) == _token(0, revoked_at=NOW)
    cache.apply([Change(4, _digest(0), _token(0, "again"))], 4)
    assert cache.find(_digest(0)) == _token(0, "again")
    assert cache.pinned == 0


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
    cached = [digest for digest in (number.to_bytes(32) for number in range(11)) if cache.find(digest)]
    assert len(cached) == 5
    cache.apply([Change(2, number.to_bytes(32), _token(number, "new")) for number in range(1_000)], 2)
    assert [getattr(cache.find(digest), "name", None) for digest in cached] == ["new"] * 5
    assert len(cache) == 5


@pytest.mark.parametrize("limit", [1, 100])
def test_unknown_digests_take_no_memory(limit: int) -> None:
    """A flood of wrong tokens is not cached, whether or not the table fits into the cache."""
    cache = TokenCache(limit)
    cache.load(_tokens(3), 1)
    before = len(cache)
    for number in range(1_000):
        assert cache.fill(number.to_bytes(32), None, 1) is None
    assert len(cache) == before
    assert all(len(each) <= before for each in vars(cache).values() if isinstance(each, dict))


# --- concurrency


class _Watched(dict[bytes, Token]):
    """A half of the cache that checks readers after each step of a writer."""

    def __init__(self, tokens: State, check: Callable[[], None]) -> None:
        super().__init__(tokens)
        self.check = check

    def pop(self, *arguments: Any) -> Any:
        """Remove a token, and check."""
        token = super().pop(*arguments)
        self.check()
        return token

    def __delitem__(self, digest: bytes) -> None:
        super().__delitem__(digest)
        self.check()


class _WatchedCache(TokenCache):
    """A cache that checks readers after each assignment to its attributes."""

    watched: tuple[bytes, ...] = ()

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, dict) and name in ("_recent", "_older"):
            value = _Watched(value, self.check)
        super().__setattr__(name, value)
        self.check()

    def check(self) -> None:
        """Check that each token is found, or that the cache is not complete."""
        for digest in self.watched:
            assert self.find(digest) is not None or not self.complete


def test_reader_never_takes_a_token_for_unknown() -> None:
    """At each step of a change, a reload or a rotation, a request finds its token or looks it up in the database."""
    cache = _WatchedCache(4)
    cache.load(_tokens(4), 1)
    cache.watched = tuple(_tokens(4))
    cache.apply([Change(2, _digest(number), _token(number, "new")) for number in range(4)], 2)
    cache.load({**_tokens(4)}, 3)
    assert cache.complete
    cache.apply([Change(4, _digest(number), _token(number)) for number in (4, 5, 6)], 4)
    cache.apply([Change(5, _digest(number), None) for number in (4, 5, 6)], 5)
    assert not cache.complete
    cache.load(_tokens(4), 6)
    assert cache.complete
    cache.load(_tokens(5), 7)
    assert not cache.complete


def test_find_never_waits_for_a_lock() -> None:
    """While a thread changes the cache, requests on the event loop are still answered."""
    cache = TokenCache(2)
    cache.load(_tokens(3), 1)
    cache.fill(_digest(2), _token(2), 1)
    everything = {digest: cache.find(digest) for digest in _tokens(3)}
    cache.load(_tokens(3), 1)
    cache.fill(_digest(2), _token(2), 1)
    with ThreadPoolExecutor(1) as pool, cache._lock:
        looked = pool.submit(lambda: {digest: cache.find(digest) for digest in _tokens(3)})
        assert looked.result(timeout=30) == everything
    assert {digest: cache.find(digest) for digest in _tokens(3)} == everything


@pytest.mark.parametrize("meanwhile", ["revoked", "deleted"])
def test_promotion_does_not_restore_a_stale_token(meanwhile: str) -> None:
    """A request that found a token in the older half and was delayed does not undo a change made meanwhile."""
    cache = TokenCache(2)
    cache.load(_tokens(3), 1)
    cache.fill(_digest(2), _token(2), 1)
    assert _digest(0) in cache._older
    after = _token(0, revoked_at=NOW) if meanwhile == "revoked" else None

    class Slow:
        """A lock that another thread holds until it has changed the token."""

        def acquire(self, *, blocking: bool) -> bool:
            """Acquire the lock after the change."""
            assert not blocking
            cache._lock = lock
            cache.apply([Change(2, _digest(0), after)], 2)
            return lock.acquire(blocking=blocking)

    lock, cache._lock = cache._lock, Slow()  # type: ignore[assignment]
    assert cache._promote(_digest(0)) == after
    assert cache.find(_digest(0)) == after


def test_concurrently_promoted_token_is_found() -> None:
    """Two requests that promote the same token at the same time both find it."""
    cache = TokenCache(2)
    cache.load(_tokens(3), 1)
    cache.fill(_digest(2), _token(2), 1)

    class Moving(dict[bytes, Token]):
        """The older half, from which another request takes the token between two steps of this one."""

        def get(self, digest: bytes, default: Any = None) -> Any:
            """Return the token, and move it."""
            token = super().get(digest, default)
            cache._recent[digest] = super().pop(digest)
            return token

    cache._older = Moving(cache._older)
    assert cache.find(_digest(0)) is cache.find(_digest(0)) is not None


def test_threads_never_find_a_revoked_token_active() -> None:
    """With requests, stale rows and the follower's thread at the same time, a revoked token stays revoked."""
    cache = TokenCache(6)
    cache.load(_tokens(8), 0)
    revoked: dict[bytes, int] = {}
    stop = threading.Event()

    def use() -> int:
        count = 0
        while not stop.is_set():
            for digest in _tokens(8):
                since = revoked.get(digest)
                token = cache.find(digest)
                assert since is None or token is None or token.revoked_at is not None
                if token is None:
                    cache.fill(
                        digest, _token(digest[0] - 1), (since or 10**9) - 1
                    )  # the row from before the revocation
                count += 1
        return count

    with ThreadPoolExecutor(3) as pool:
        users = [pool.submit(use) for _ in range(3)]
        try:
            for revision, number in enumerate(range(8), start=1):
                token = _token(number, revoked_at=NOW)
                for _ in range(200):
                    cache.apply([Change(revision, _digest(number), token)], revision)
                revoked[_digest(number)] = revision
        finally:
            stop.set()
        assert all(user.result() for user in users)
