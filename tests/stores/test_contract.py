"""The contract that every store keeps: each sentence of ``freegpt_auth/stores/base.py``, for each store.

A further store takes one function that returns its opener, and one entry in ``OPENERS``.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import anyio.to_thread
import msgspec
import pytest

from freegpt_auth import UNRESOLVED, FileTokenStore, MemoryTokenStore, StoreError, Token, TokenStore
from freegpt_auth.exceptions import TokenNotFoundError
from freegpt_auth.tokens import digest_of, issue
from tests.helpers.watch import wait_until

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)
UNKNOWN = bytes(32)

Opener = Callable[[], TokenStore]
Keep = Callable[..., tuple[Token, str]]


def _memory(_: pytest.FixtureRequest) -> Opener:
    store = MemoryTokenStore()
    return lambda: store


def _file(_: pytest.FixtureRequest) -> Opener:
    return lambda: FileTokenStore("api_tokens.json")


def _postgres(request: pytest.FixtureRequest, **limits: Any) -> Opener:
    from freegpt_auth.stores.postgres import PostgresTokenStore  # noqa: PLC0415  its driver is an extra

    url = request.getfixturevalue("database")

    def open_another() -> TokenStore:
        store = PostgresTokenStore(url, **limits)
        request.addfinalizer(store.close)
        return store

    return open_another


OPENERS: dict[str, Callable[[pytest.FixtureRequest], Opener]] = {
    "memory": _memory,
    "file": _file,
    "postgres": _postgres,
    "postgres-in-part": partial(_postgres, cache_limit=2),
}


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.database] * name.startswith("postgres")) for name in OPENERS]
)
def opener(request: pytest.FixtureRequest) -> Opener:
    """Return a function that opens the same tokens once more, as another process does."""
    return OPENERS[request.param](request)


@pytest.fixture
def store(opener: Opener) -> TokenStore:
    """Return an empty store of each kind."""
    return opener()


def _look(store: TokenStore, digest: bytes) -> Token | None:
    """Ask a store as the middleware does."""
    token = store.peek(digest)
    return store.resolve(digest) if token is UNRESOLVED else token


def _facts(token: Token | None) -> dict[str, object]:
    """Return the fields of a record: a store may use a subclass."""
    return {name: getattr(token, name) for name in Token.__struct_fields__}


def _end(token: Token | None) -> datetime | None:
    """Return the instant at which a known token was revoked."""
    assert token
    return token.revoked_at


@contextlib.contextmanager
def _meanwhile(call: Callable[[], object], threads: int) -> Iterator[None]:
    """Call a function again and again, in several threads."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.is_set():
            call()

    with ThreadPoolExecutor(threads) as pool:
        repeated = [pool.submit(repeat) for _ in range(threads)]
        try:
            yield
        finally:
            stop.set()
        assert [each.result() for each in repeated] == [None] * threads


def _full(name: str = "full") -> tuple[bytes, Token]:
    """Return a token with every field set, which has expired, and its digest."""
    token, secret = issue(name, now=NOW, expires_at=LATER)
    token = msgspec.structs.replace(token, scopes=("chat", "models"), models=("gpt-4",), last_used_at=NOW)
    return digest_of(secret), token


# --- looking


def test_an_added_token_is_answered_with_every_field(opener: Opener) -> None:
    """A token is read back field by field, here and in every other process, also if it has expired."""
    store, other = opener(), opener()
    digest, token = _full()
    store.add(digest, token)
    for each in (store, other):
        assert isinstance(each.resolve(digest), Token)
        assert _facts(each.resolve(digest)) == _facts(_look(each, digest)) == _facts(each.tokens()[digest])
        assert _facts(each.resolve(digest)) == _facts(token)


def test_an_unknown_digest_has_no_token(store: TokenStore, keep: Keep) -> None:
    """A token that was never issued is nobody's, in an empty store and in a full one."""
    for _ in range(2):
        for digest in (UNKNOWN, b""):
            assert store.peek(digest) in (None, UNRESOLVED)
            assert _look(store, digest) is store.resolve(digest) is None
        keep(store)


def test_token_is_one_object_until_changed(store: TokenStore, keep: Keep) -> None:
    """An unchanged token is the same object, a changed one another: callers are cached by it."""
    token, secret = keep(store)
    first = store.resolve(digest_of(secret))
    for _ in range(3):
        assert store.peek(digest_of(secret)) is store.resolve(digest_of(secret)) is first
        assert store.peek(UNKNOWN) is None
        store.survey()
        store.tokens()
    store.revoke(token.id, NOW)
    assert _look(store, digest_of(secret)) is not first
    assert _end(first) is None


def _state(store: TokenStore, digest: bytes) -> object:
    """Return the state in which a store answers a token, once memory can answer it."""
    states: list[object | None] = []

    def is_certain() -> bool:
        _look(store, digest)
        states.append(store.state())
        return states[-1] is not None and store.peek(digest) is not UNRESOLVED

    wait_until(is_certain)
    return states[-1]


def test_each_change_replaces_the_state(store: TokenStore, keep: Keep) -> None:
    """A server that trusts an unchanged state misses no change: the state is replaced by each, and by nothing else."""
    (token, secret), (other, _) = keep(store), keep(store)
    digest = digest_of(secret)
    changes: list[Callable[[], object]] = [
        lambda: keep(store),
        lambda: store.merge({digest_of("merged"): msgspec.structs.replace(token, id="merged")}),
        lambda: store.delete(other.id),
        lambda: store.revoke(token.id, NOW),
    ]
    states = [_state(store, digest)]
    for change in changes:
        assert _state(store, digest) is states[-1]
        change()
        states.append(_state(store, digest))
    assert len({*map(id, states)}) == len(states)
    assert _end(_look(store, digest)) == NOW


@pytest.mark.anyio
async def test_peek_never_blocks_the_event_loop(store: TokenStore, keep: Keep) -> None:
    """``peek`` may run on the event loop in every state of the store: it never blocks."""
    assert store.peek(UNKNOWN) in (None, UNRESOLVED)
    token, secret = keep(store)
    for change in (store.revoke, lambda token_id, _: store.delete(token_id)):
        store.peek(digest_of(secret))
        await anyio.to_thread.run_sync(store.resolve, digest_of(secret))
        assert isinstance(store.peek(digest_of(secret)), Token)
        change(token.id, NOW)
    store.peek(digest_of(secret))
    assert await anyio.to_thread.run_sync(store.resolve, digest_of(secret)) is None


# --- the survey


def test_the_survey_counts_the_tokens_that_work_now(store: TokenStore, keep: Keep) -> None:
    """The line in the log at start names how many tokens work, and where they come from."""
    now = datetime.now(UTC)
    for seconds in (3600, -1, -(10**10)):
        keep(store, expires_at=now + timedelta(seconds=seconds))
    revoked, _ = keep(store)
    assert store.survey()[:2] == (True, 2)
    store.revoke(revoked.id, now)
    assert store.survey()[:2] == (True, 1)


def test_a_store_that_was_configured_stays_so(opener: Opener, keep: Keep) -> None:
    """Deleting the last token opens no server, neither a running one nor the next; only a missing file does."""
    store, other = opener(), opener()
    assert store.survey()[:2] == (not isinstance(store, FileTokenStore), 0)
    token, _ = keep(store)
    assert other.survey().configured
    store.delete(token.id)
    for each in (store, other, opener()):
        assert each.survey()[:2] == (True, 0)


# --- changing


def test_returned_change_is_in_force_everywhere(opener: Opener) -> None:
    """When a command has returned, no process of this host decides anything without it, however fresh its memory."""
    store, other = opener(), opener()
    digest, token = _full()
    with _meanwhile(lambda: _look(other, digest), 1):
        store.add(digest, token)
        assert other.peek(digest) is not None
        store.revoke(token.id, NOW)
        assert getattr(other.peek(digest), "revoked_at", NOW) == NOW
        assert _end(_look(other, digest)) == NOW
        store.delete(token.id)
        assert other.peek(digest) in (None, UNRESOLVED)
        assert _look(other, digest) is None


def test_tokens_are_listed_oldest_first(opener: Opener, keep: Keep) -> None:
    """A list keeps its order, a revoked token keeps its place, and a list being printed does not change."""
    store = opener()
    assert dict(store.tokens()) == {}
    ids = [keep(store)[0].id for _ in range(3)]
    before = store.tokens()
    store.revoke(ids[0], NOW)
    store.delete(ids[1])
    for each in (store, opener()):
        assert [token.id for token in each.tokens().values()] == [ids[0], ids[2]]
    assert [token.id for token in before.values()] == ids


@pytest.mark.parametrize("same", ["digest", "id", "both"])
def test_a_duplicate_is_refused_and_changes_nothing(store: TokenStore, same: str) -> None:
    """No second token takes the place of one that is there, by its secret or its id; so none is revived either."""
    digest, token = _full()
    store.add(digest, token)
    store.revoke(token.id, NOW)
    other_digest, other = _full("other")
    if same != "digest":
        other = msgspec.structs.replace(other, id=token.id)
    with pytest.raises(StoreError, match="is there already") as caught:
        store.add(other_digest if same == "id" else digest, other)
    assert digest.hex() not in str(caught.value)
    assert {key: each.revoked_at for key, each in store.tokens().items()} == {digest: NOW}


def test_revocation_keeps_its_first_instant(opener: Opener, keep: Keep) -> None:
    """A revoked or deleted token's record goes on saying when it stopped working; no other token is touched."""
    store = opener()
    digest, token = _full()
    store.add(digest, token)
    bystander, _ = keep(store, "bystander")
    expected = {**_facts(token), "revoked_at": NOW}
    assert _facts(store.revoke(token.id, NOW)) == expected
    assert _facts(opener().revoke(token.id, LATER)) == _facts(_look(store, digest)) == expected
    assert _facts(store.delete(token.id)) == expected
    assert _look(store, digest) is None
    assert [_facts(each) for each in store.tokens().values()] == [_facts(bystander)]


def test_an_unknown_id_is_named_and_changes_nothing(store: TokenStore, keep: Keep) -> None:
    """A wrong id revokes and deletes nothing, and the error says which id it was."""
    token, _ = keep(store)
    for call in (store.delete, lambda token_id: store.revoke(token_id, NOW)):
        with pytest.raises(TokenNotFoundError, match="no token with the id nobody"):
            call("nobody")
    assert [_facts(each) for each in store.tokens().values()] == [_facts(token)]


# --- finding


def test_a_reference_means_the_same_in_every_store(opener: Opener, keep: Keep) -> None:
    """A secret, an id, the shown prefix or more of the secret finds its token, and a mistyped one finds none."""
    store = opener()
    issued = [keep(store) for _ in range(3)]
    for token, secret in issued:
        for reference in (secret, token.id, token.prefix, token.prefix + "...", secret[:20], secret[:-1]):
            assert [_facts(each) for each in opener().find(reference)] == [_facts(token)]
        for reference in (secret[:-1] + "~", token.prefix[:-1], token.id + "x"):
            assert store.find(reference) == []
    for reference in ("", "...", "nobody", "\0", "\udcff", "%", "sk-"):
        assert store.find(reference) == []


def test_a_name_means_the_same_in_every_store(store: TokenStore) -> None:
    """A name or a prefix finds each token that has it, in order, none in place of more; a whole secret finds one."""
    names = ["ci", "twin", "twin", " ü ", "?", "t0", "sk-t1xxxxxxxxx", "short", "short"]
    for number, name in enumerate(names):
        prefix = "sk-" if name == "short" else f"sk-t{number}xxxxxxxxx"
        token = msgspec.structs.replace(_full(name)[1], id=f"t{number}", prefix=prefix)
        store.add(digest_of(f"secret {number}"), token)
    expected: dict[str, list[int]] = {reference: [] for reference in ("ü", "\0", "\udcff", "CI", "c")}
    expected |= {"ci": [0], "twin": [1, 2], " ü ": [3], "?": [4], "t0": [0, 5], "sk-": [7, 8], "secret 8": [8]}
    expected |= {"sk-t1xxxxxxxxx": [1, 6], "sk-t1xxxxxxxxx...": [1], "sk-t1xxxxxxxxxy": [1]}
    for reference, numbers in expected.items():
        assert [token.id for token in store.find(reference)] == [f"t{number}" for number in numbers], reference


def test_the_source_tells_where_the_tokens_are(opener: Opener, request: pytest.FixtureRequest) -> None:
    """The name of a store is the same in each process, and contains no password."""
    store = opener()
    assert store.source == opener().source == store.survey().source
    kind = request.node.callspec.params["opener"]
    start = {"memory": "memory", "file": "/"}.get(kind, "postgresql://postgres@")
    assert store.source.startswith(start)
    assert "password" not in store.source


# --- merging


def _given(*names: str) -> dict[bytes, Token]:
    return {digest_of(name): msgspec.structs.replace(_full(name)[1], id=name) for name in names}


def _revoked(tokens: dict[bytes, Token], at: datetime) -> dict[bytes, Token]:
    return {digest: msgspec.structs.replace(token, revoked_at=at) for digest, token in tokens.items()}


def _all_facts(store: TokenStore) -> dict[bytes, dict[str, object]]:
    return {digest: _facts(token) for digest, token in store.tokens().items()}


def test_what_is_merged_is_in_force_everywhere(opener: Opener) -> None:
    """New tokens arrive whole and in order, revocations change nothing else, and every process follows."""
    store, other = opener(), opener()
    bystander, known, new = _given("bystander"), _given("known"), _given("new 2", "new 1")
    assert store.merge({**known, **bystander}) == (2, 0)
    assert all(_look(other, digest) for digest in known)
    assert store.merge({**_revoked(new, LATER), **_revoked(_given("known"), NOW)}) == (2, 1)
    expected = {**_revoked(known, NOW), **bystander, **_revoked(new, LATER)}
    for each in (store, other, opener()):
        assert _all_facts(each) == {digest: _facts(token) for digest, token in expected.items()}
        assert list(each.tokens()) == list(expected)
        assert all(_end(_look(each, digest)) == token.revoked_at for digest, token in expected.items())


def test_to_merge_twice_makes_no_difference(opener: Opener) -> None:
    """A copy that was broken off, or is run every night, can be run again; nothing is un-revoked by an older one."""
    store = opener()
    active = _given("one", "two")
    assert store.merge(active) == (2, 0)
    assert store.merge(_revoked(active, NOW)) == (0, 2)
    before = _all_facts(store)
    for again in (active, _revoked(active, LATER), _revoked(active, NOW), {}):
        assert opener().merge(again) == (0, 0)
        assert _all_facts(opener()) == before
        assert all(_end(_look(store, digest)) == NOW for digest in active)


@pytest.mark.parametrize("clash", ["known", "new"])
def test_duplicate_id_ends_the_whole_merge(opener: Opener, clash: str) -> None:
    """Neither the tokens before it nor those after it are added, and none is revoked."""
    store = opener()
    known = _given("known", "bystander")
    store.merge(known)
    before = _all_facts(store)
    intruder = {digest_of("intruder"): msgspec.structs.replace(_full("intruder")[1], id=clash)}
    given = {**_given("new"), **intruder, **_revoked(_given("bystander"), NOW), **_given("newer")}
    with pytest.raises(StoreError, match="is there already"):
        store.merge(given)
    for each in (store, opener()):
        assert _all_facts(each) == before
        assert _look(each, digest_of("new")) is _look(each, digest_of("intruder")) is None
        assert _end(_look(each, digest_of("bystander"))) is None


def test_several_may_merge_the_same_at_once(opener: Opener) -> None:
    """Two simultaneous copies add each token once, and neither fails."""
    given = {**_given("one", "two"), **_revoked(_given("three"), NOW)}
    opener().merge(_given("three"))
    stores = [opener() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        merged = list(pool.map(lambda store: store.merge(given), stores))
    assert (sum(one.added for one in merged), sum(one.revoked for one in merged)) == (2, 1)
    assert list(opener().tokens()) == [digest_of(name) for name in ("three", "one", "two")]


# --- several threads


@pytest.fixture
def _switching() -> Iterator[None]:
    """Switch threads as often as possible: races show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_switching")
def test_many_threads_may_change_one_store(opener: Opener, keep: Keep) -> None:
    """Nothing is lost and nothing fails when several threads add, revoke, count and list at the same time."""
    store = opener()
    _, permanent = keep(store, "permanent")

    def look() -> None:
        assert _look(store, digest_of(permanent)) is not None
        assert store.survey().configured
        list(store.tokens().values())

    def change(_number: int) -> str:
        (revoked, secret), (deleted, _) = keep(store), keep(store)
        store.revoke(revoked.id, NOW)
        assert _end(_look(store, digest_of(secret))) == NOW
        store.delete(deleted.id)
        return revoked.id

    with _meanwhile(look, 2), ThreadPoolExecutor(4) as pool:
        changed = list(pool.map(change, range(100 if isinstance(store, MemoryTokenStore) else 4)))
    kept = [token.id for token in opener().tokens().values() if token.revoked_at is not None]
    assert sorted(kept) == sorted(changed)
    assert len(opener().tokens()) == len(changed) + 1


# --- the store in a file


def test_several_tokens_change_together(keep: Keep) -> None:
    """Several tokens are revoked or deleted in one change of the file: where one is not there, none is touched."""
    store = FileTokenStore("api_tokens.json")
    ids = [keep(store)[0].id for _ in range(3)]
    before = _all_facts(store)
    for call in (store.delete_all, lambda token_ids: store.revoke_all(token_ids, NOW)):
        with pytest.raises(TokenNotFoundError, match="no token with the id nobody"):
            call([ids[0], "nobody"])
        assert _all_facts(store) == before
    assert [token.revoked_at for token in store.revoke_all(ids[1:], NOW)] == [NOW, NOW]
    assert [token.id for token in store.delete_all([ids[2], ids[0]])] == [ids[2], ids[0]]
    assert [token.id for token in store.tokens().values()] == ids[1:2]
