"""What a process remembers of the tokens in a database, against a model that knows every state the database ever had."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from unittest import mock

import msgspec
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from freegpt_auth import UNRESOLVED, Token
from freegpt_auth.stores.postgres import cache as caches, cache as module
from freegpt_auth.stores.postgres.cache import Change, TokenCache

if TYPE_CHECKING:
    from collections.abc import Callable

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
UNKNOWN = bytes(32)

State = dict[bytes, Token]
"""Every token that a database holds at one revision."""

whichever = st.integers(0, 7)


def _digest(number: int) -> bytes:
    return bytes([number + 1]) * 32


def _token(number: int, name: str = "", revoked_at: datetime | None = None) -> Token:
    return Token(id=str(number), name=name, prefix="", created_at=NOW, revoked_at=revoked_at)


def _tokens(count: int) -> State:
    return {_digest(number): _token(number) for number in range(count)}


def _held(cache: TokenCache) -> State:
    """Return what is remembered, by digest; the id of each token here is its number."""
    return {_digest(int(token.id)): token for token in cache.tokens()}


class Lives(RuleBasedStateMachine):
    """A database, what was read of it and is still on its way, and a memory that is told some of it."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(module, "CHANGES_KEPT", 4)
        self.patch.setattr(caches, "PAUSE", 0.0)
        self.states: list[State] = [{}]  # by revision
        self.log: list[tuple[int, bytes]] = []
        self.reads: list[tuple[bytes, Token | None, int]] = []
        self.pinned: State = {}
        self.cache = TokenCache(1)
        self.before: State = {}
        self.fresh: set[bytes] = set()

    def teardown(self) -> None:
        """Leave no patch behind."""
        self.patch.undo()

    @initialize(limit=st.integers(1, 8))
    def begin(self, limit: int) -> None:
        """Start a process with a larger or a smaller memory."""
        self.cache = TokenCache(limit)

    @property
    def head(self) -> int:
        """The revision of the database."""
        return len(self.states) - 1

    def expected(self, digest: bytes) -> Token | None:
        """Return the only state that memory may hold: what the database held at its revision, or revoked for good."""
        token = self.states[self.cache.revision].get(digest) if self.cache.revision >= 0 else None
        return token and self.pinned.get(digest, token)

    # --- the database

    def write(self, digest: bytes, token: Token | None) -> None:
        """Raise the revision with one change."""
        state = {**self.states[-1], digest: token}
        self.states.append({key: each for key, each in state.items() if each is not None})
        self.log.append((self.head, digest))

    @rule(number=whichever)
    def create_or_delete(self, number: int) -> None:
        """Add a token, or remove the one that is there; what was revoked and deleted may be added again."""
        there = self.states[-1].get(_digest(number))
        self.write(_digest(number), None if there else _token(number, f"since {self.head}"))

    @rule(number=whichever)
    def revoke_or_rename(self, number: int) -> None:
        """Revoke a token, or change something else of one that is revoked."""
        there = self.states[-1].get(_digest(number))
        if there is not None:
            revoked_at = there.revoked_at or NOW
            self.write(_digest(number), msgspec.structs.replace(there, revoked_at=revoked_at, name=f"at {self.head}"))

    # --- the process

    @rule()
    def follow(self) -> None:
        """Read the log of changes, each with the state that its token has by now."""
        if self.cache.revision < 0:
            self.reload(was_known=True)
            return
        new = [(revision, digest) for revision, digest in self.log if revision > self.cache.revision]
        self.fresh = {digest for _, digest in new}
        for digest in self.fresh:
            self.pinned.pop(digest, None)
        self.cache.apply((Change(*one, self.states[-1].get(one[1])) for one in new), self.head)

    @rule(was_known=st.booleans())
    def reload(self, *, was_known: bool) -> None:
        """Read everything afresh: so much was changed, or the log begins later than what is known."""
        self.fresh = {_digest(number) for number in range(8)}
        if not was_known:
            self.pinned.update({key: each for key, each in _held(self.cache).items() if each.revoked_at is not None})
        first = dict(list(self.states[-1].items())[: self.cache.limit + 1])
        self.cache.load(first, self.head, pin_revocations=pin_revocations)

    @precondition(lambda self: self.cache.revision > 0)
    @rule(lost=st.integers(1, 3), number=whichever, goes_on=st.booleans())
    def lose_changes(self, lost: int, number: int, *, goes_on: bool) -> None:
        """Another server takes the place of the database, on which the last changes never were; it may have gone on."""
        kept = max(1, len(self.states) - lost)
        self.states = self.states[:kept]
        self.log = [one for one in self.log if one[0] < kept]
        self.reads.clear()  # they came over connections that are gone
        if goes_on:
            self.create_or_delete(number)
        self.reload(pin_revocations=True)

    @rule(number=whichever)
    def begin_to_read(self, number: int) -> None:
        """Read one token that is not remembered; the answer takes its time."""
        if self.cache.find(_digest(number)) is None:
            self.reads.append((_digest(number), self.states[-1].get(_digest(number)), self.head))

    @precondition(lambda self: self.reads)
    @rule(data=st.data())
    def end_to_read(self, data: st.DataObject) -> None:
        """One of the answers arrives: it may be relied on if it is no older than memory, in what matters."""
        digest, token, revision = self.reads.pop(data.draw(st.integers(0, len(self.reads) - 1)))
        answer = self.cache.fill(digest, token, revision)
        is_worthless = answer is UNRESOLVED
        assert not is_worthless or revision < self.cache.revision
        assert is_worthless or answer == (token and self.pinned.get(digest, token))
        assert is_worthless or revision > self.cache.revision or answer == self.expected(digest)

    @rule(number=whichever)
    def find(self, number: int) -> None:
        """A request is answered by the state of memory's revision, or not from memory."""
        found = self.cache.find(_digest(number))
        assert found is None or found == self.expected(_digest(number))

    @rule()
    def use_everything(self) -> None:
        """Every token that is remembered is used again."""
        for digest in _held(self.cache):
            assert self.cache.find(digest) is not None

    @invariant()
    def memory_is_the_database_at_its_revision(self) -> None:
        """No state is older or newer than memory's revision, none is of another token, and there are not too many."""
        held = _held(self.cache)
        assert held == {digest: self.expected(digest) for digest in held}
        assert len(self.cache) == len(held) <= self.cache.limit
        assert self.cache.find(UNKNOWN) is None

    @invariant()
    def complete_means_complete(self) -> None:
        """A token that is not in a complete memory does not exist."""
        if self.cache.complete:
            assert _held(self.cache).keys() == self.states[self.cache.revision].keys()

    @invariant()
    def a_token_stays_the_same_object(self) -> None:
        """What is made for a token once is found again by it, until it is changed or everything is read afresh."""
        held = _held(self.cache)
        assert all(held[digest] is self.before[digest] for digest in held.keys() & self.before.keys() - self.fresh)
        self.before, self.fresh = held, set()


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_a_life_in_which_everything_happens() -> None:
    """Late answers, lost changes, memory that is full and used again: none of it is left to chance."""
    life = Lives()
    try:
        life.begin(limit=4)
        life.follow()
        for number in range(3):
            life.create_or_delete(number)
        life.follow()
        assert life.cache.complete
        life.revoke_or_rename(1)
        life.follow()
        for number in range(3, 8):
            life.create_or_delete(number)
        life.revoke_or_rename(7)
        life.follow()
        assert not life.cache.complete
        life.use_everything()
        life.begin_to_read(7)
        life.lose_changes(lost=1, number=7, goes_on=False)
        life.lose_changes(lost=8, number=1, goes_on=True)
        for check in (life.memory_is_the_database_at_its_revision, life.complete_means_complete):
            check()
        life.a_token_stays_the_same_object()
    finally:
        life.teardown()


# --- what is read too early


@settings(deadline=None)
@given(later=st.integers(1, 5), others=st.integers(0, 9))
def test_what_was_read_before_a_change_is_not_used(later: int, others: int) -> None:
    """A token that was read, revoked and forgotten meanwhile is not remembered as it was read."""
    with mock.patch.object(module, "CHANGES_KEPT", 4):
        cache = TokenCache(0)
        cache.load({_digest(0): _token(0)}, 10)
        cache.apply([Change(10 + later, _digest(0), _token(0, revoked_at=NOW))], 10 + later)
        cache.apply([Change(15 + n, _digest(1 + n), None) for n in range(others)], 15 + others)
        for revision in range(5, 10 + later):
            assert cache.fill(_digest(0), _token(0), revision) is UNRESOLVED
        revoked = _token(0, revoked_at=NOW)
        assert cache.fill(_digest(0), revoked, 15 + others) is revoked


def test_what_is_newer_than_memory_is_answered_and_not_remembered() -> None:
    """A request may know more than memory; the next one asks again, until memory has come so far."""
    cache = TokenCache(2)
    cache.load(_tokens(3), 1)
    revoked = _token(2, revoked_at=NOW)
    assert cache.fill(_digest(2), revoked, 2) is revoked
    assert cache.find(_digest(2)) is None
    cache.apply([Change(2, _digest(2), revoked)], 2)
    assert cache.find(_digest(2)) is None
    assert cache.fill(_digest(2), revoked, 2) is cache.find(_digest(2)) is revoked


def test_a_token_that_two_threads_read_is_one_object() -> None:
    """Two requests that looked the same token up at the same time get the same record, and so do all after them."""
    cache = TokenCache(2)
    cache.load(_tokens(3), 1)
    first = cache.fill(_digest(2), _token(2), 1)
    assert cache.fill(_digest(2), _token(2), 1) is first
    cache.fill(_digest(1), _token(1), 1)  # makes room: the first is not in the younger half any more
    assert cache.fill(_digest(2), _token(2), 1) is cache.find(_digest(2)) is first


def test_what_differs_at_the_same_revision_is_replaced() -> None:
    """Should a state ever differ from what is remembered, the one that was read is believed."""
    cache = TokenCache(4)
    cache.load(_tokens(5), 1)
    for name in ("another", "and another"):
        other = _token(1, name)
        assert cache.fill(_digest(1), other, 1) is cache.find(_digest(1)) is other
        assert len(_held(cache)) == len(cache)
        cache.fill(_digest(3), _token(3), 1)
        cache.fill(_digest(4), _token(4), 1)  # makes room: now it is in the older half


# --- what the database has lost


@pytest.mark.parametrize("limit", [1, 2, 9])
@pytest.mark.parametrize("revision", [3, 5, 7])
def test_a_token_revoked_here_stays_so_though_the_database_lost_that(limit: int, revision: int) -> None:
    """After a failover that lost a revocation no read and no reload brings the token back, in a memory of any size."""
    cache = TokenCache(limit)
    state = _tokens(4)
    cache.load(state, 4)
    revoked = _token(0, revoked_at=NOW)
    cache.fill(_digest(0), _token(0), 4)
    cache.apply([Change(5, _digest(0), revoked)], 5)
    cache.load(dict(state), revision, pin_revocations=True)
    assert cache.pinned == 1
    for ahead in (0, 1):  # at memory's revision, and at one that memory has not heard of yet
        assert cache.fill(_digest(0), _token(0), revision + ahead) == revoked
    for number in range(1, 4):
        cache.fill(_digest(number), _token(number), revision)
    assert cache.find(_digest(0)) in (None, revoked)
    cache.load(dict(state), revision + 1)
    assert cache.find(_digest(0)) in (None, revoked)
    assert cache.fill(_digest(0), _token(0), revision + 1) == revoked


def test_only_a_change_of_the_token_itself_ends_that() -> None:
    """An operator who has looked through what was lost can make a token work again: by changing that token."""
    cache = TokenCache(9)
    cache.load({_digest(0): _token(0, revoked_at=NOW), _digest(1): _token(1)}, 4)
    cache.load(_tokens(2), 2, pin_revocations=True)
    cache.apply([Change(3, _digest(1), _token(1, "other"))], 3)
    assert cache.find(_digest(0)) == _token(0, revoked_at=NOW)
    cache.apply([Change(4, _digest(0), _token(0, "again"))], 4)
    assert cache.find(_digest(0)) == _token(0, "again")
    assert cache.pinned == 0


# --- memory that is full


def test_memory_stays_within_its_limit_however_it_is_used() -> None:
    """A working set that grows and is used again and again does not make a process grow; one that shrinks is all there."""
    cache = TokenCache(20)
    cache.load(_tokens(21), 1)
    for size in range(1, 200):
        for number in range(size % 150):
            digest = number.to_bytes(32)
            if cache.find(digest) is None:
                cache.fill(digest, _token(number), 1)
        assert len(cache) <= 20
    for _ in range(3):
        for number in range(10):
            cache.fill(number.to_bytes(32), _token(number), 1)
    assert all(cache.find(number.to_bytes(32)) for number in range(10))


def test_memory_that_was_complete_is_kept_as_far_as_it_goes() -> None:
    """When the table outgrows memory, what is used goes on being answered from it, and unknown means unknown no more."""
    cache = TokenCache(4)
    cache.load(_tokens(4), 1)
    cache.apply([Change(2, _digest(4), _token(4))], 2)
    assert (cache.complete, len(cache)) == (False, 4)
    cache.apply([Change(3, _digest(5), _token(5))], 3)
    assert cache.find(_digest(5)) is None
    assert len(cache) == 4


def test_many_changes_at_once_neither_fill_memory_nor_empty_it() -> None:
    """A thousand changes of tokens that this process has not seen leave those it has where they are."""
    cache = TokenCache(10)
    cache.load({number.to_bytes(32): _token(number) for number in range(11)}, 1)
    known = [digest for digest in (number.to_bytes(32) for number in range(11)) if cache.find(digest)]
    assert len(known) == 5
    cache.apply([Change(2, number.to_bytes(32), _token(number, "new")) for number in range(1_000)], 2)
    assert [getattr(cache.find(digest), "name", None) for digest in known] == ["new"] * 5
    assert len(cache) == 5


def test_a_digest_that_no_token_has_is_not_remembered() -> None:
    """A flood of wrong tokens takes no memory, in a part of a table or in all of it."""
    for limit in (1, 100):
        cache = TokenCache(limit)
        cache.load(_tokens(3), 1)
        before = len(cache)
        for number in range(1_000):
            assert cache.fill(number.to_bytes(32), None, 1) is None
        assert len(cache) == before
        assert all(len(each) <= before for each in vars(cache).values() if isinstance(each, dict))


# --- while something else is going on


class _Watched(dict[bytes, Token]):
    """A table that looks, after each step of whoever changes it, whether a reader would now miss a token."""

    def __init__(self, tokens: State, look: Callable[[], None]) -> None:
        super().__init__(tokens)
        self.look = look

    def pop(self, *arguments: Any) -> Any:
        """Remove a token, and look."""
        token = super().pop(*arguments)
        self.look()
        return token

    def __delitem__(self, digest: bytes) -> None:
        super().__delitem__(digest)
        self.look()


class _WatchedCache(TokenCache):
    """A memory that looks the same after each of its own steps."""

    watched: tuple[bytes, ...] = ()

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, dict) and name in ("_recent", "_older"):
            value = _Watched(value, self.look)
        super().__setattr__(name, value)
        self.look()

    def look(self) -> None:
        """See that each token is found, or that it is not taken for unknown."""
        for digest in self.watched:
            assert self.find(digest) is not None or not self.complete


def test_no_valid_token_is_taken_for_unknown_while_memory_changes() -> None:
    """A request that comes at any moment of a change, a reload or of making room finds its token or has it looked up."""
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


def test_a_look_never_waits() -> None:
    """While a thread changes memory, requests are answered on the event loop from what there is."""
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
def test_a_token_that_is_used_again_is_not_kept_as_it_was(meanwhile: str) -> None:
    """A request that found a token of the older half, and was held up, does not bring back what was changed since."""
    cache = TokenCache(2)
    cache.load(_tokens(3), 1)
    cache.fill(_digest(2), _token(2), 1)
    assert _digest(0) in cache._older
    after = _token(0, revoked_at=NOW) if meanwhile == "revoked" else None

    class Slow:
        """A lock that is had only once somebody else has changed the token."""

        def acquire(self, *, blocking: bool) -> bool:
            """Have it, too late."""
            assert not blocking
            cache._lock = lock
            cache.apply([Change(2, _digest(0), after)], 2)
            return lock.acquire(blocking=blocking)

    lock, cache._lock = cache._lock, Slow()  # type: ignore[assignment]
    assert cache._promote(_digest(0)) == after
    assert cache.find(_digest(0)) == after


def test_a_token_that_moved_meanwhile_is_found_where_it_is() -> None:
    """Two requests that use the same old token at the same time both find it."""
    cache = TokenCache(2)
    cache.load(_tokens(3), 1)
    cache.fill(_digest(2), _token(2), 1)

    class Moving(dict[bytes, Token]):
        """The older half, out of which another request takes the token between two steps of this one."""

        def get(self, digest: bytes, default: Any = None) -> Any:
            """Find the token, which is then moved."""
            token = super().get(digest, default)
            cache._recent[digest] = super().pop(digest)
            return token

    cache._older = Moving(cache._older)
    assert cache.find(_digest(0)) is cache.find(_digest(0)) is not None


def test_threads_that_use_and_change_memory_never_see_a_revoked_token_work() -> None:
    """Requests, late answers and the thread that follows the database at the same time: revoked stays revoked."""
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
                    cache.fill(digest, _token(digest[0] - 1), (since or 10**9) - 1)  # as it was when it still worked
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
