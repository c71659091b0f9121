"""The contract that every store keeps: each sentence of ``freegpt_auth/stores/base.py``, for each store.

A further store takes one function that yields its opener, and one entry in ``OPENERS``.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path  # noqa: TC003  beside the other annotations that pytest may resolve

import anyio
import anyio.to_thread
import msgspec
import pytest

from freegpt_auth import UNRESOLVED, FileTokenStore, MemoryTokenStore, StoreError, Token, TokenStore
from freegpt_auth.exceptions import TokenNotFoundError
from freegpt_auth.tokens import digest_of, issue

NOW = datetime(2025, 6, 1, 12, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)
UNKNOWN = bytes(32)

Opener = Callable[[], TokenStore]
Keep = Callable[..., tuple[Token, str]]


def _memory(_: Path) -> Opener:
    store = MemoryTokenStore()
    return lambda: store


def _file(folder: Path) -> Opener:
    return lambda: FileTokenStore(folder / "api_tokens.json")


OPENERS = {"memory": _memory, "file": _file}


@pytest.fixture(params=list(OPENERS))
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    """Return a function that opens the same tokens once more, as another process of this host does."""
    return OPENERS[request.param](tmp_path)


@pytest.fixture
def store(opener: Opener) -> TokenStore:
    """Return an empty store of each kind."""
    return opener()


def _look(store: TokenStore, digest: bytes) -> Token | None:
    """Ask a store as the middleware does."""
    token = store.peek(digest)
    return store.resolve(digest) if token is UNRESOLVED else token


def _facts(token: Token | None) -> dict[str, object]:
    """Return what a record says; a store may answer a type of its own."""
    return {name: getattr(token, name) for name in Token.__struct_fields__}


def _full(name: str = "full") -> tuple[bytes, Token]:
    """Return a token with every field set, and its digest."""
    token, secret = issue(name, now=NOW, expires_at=LATER)
    token = msgspec.structs.replace(token, scopes=("chat", "models"), models=("gpt-4",), last_used_at=NOW)
    return digest_of(secret), token


# --- looking


def test_an_added_token_is_answered_with_every_field(opener: Opener) -> None:
    """What is put in comes out, field for field, here and in every other process."""
    store, other = opener(), opener()
    digest, token = _full()
    store.add(digest, token)
    for each in (store, other):
        assert isinstance(each.resolve(digest), Token)
        assert _facts(each.resolve(digest)) == _facts(_look(each, digest)) == _facts(each.tokens()[digest])
        assert _facts(each.resolve(digest)) == _facts(token)


@pytest.mark.parametrize("digest", [UNKNOWN, b"", b"short"])
def test_an_unknown_digest_has_no_token(store: TokenStore, keep: Keep, digest: bytes) -> None:
    """A token that was never issued is nobody's, in an empty store and in a full one."""
    assert _look(store, digest) is None
    keep(store)
    assert _look(store, digest) is None
    assert store.resolve(digest) is None


def test_peek_says_nothing_false(store: TokenStore) -> None:
    """Memory answers the token or that it cannot tell, and never that an added token is unknown."""
    digest, token = _full()
    assert store.peek(digest) in (None, UNRESOLVED)
    store.add(digest, token)
    answer = store.peek(digest)
    assert answer is UNRESOLVED or answer is store.resolve(digest)


def test_peek_knows_what_was_resolved(store: TokenStore, keep: Keep) -> None:
    """After one answer from the store the next requests are answered from memory."""
    _, secret = keep(store)
    token = store.resolve(digest_of(secret))
    assert store.peek(digest_of(secret)) is token
    assert store.peek(UNKNOWN) is None


@pytest.mark.anyio
async def test_peek_never_blocks_the_event_loop(store: TokenStore, keep: Keep) -> None:
    """No request holds up the others: ``peek`` may run on the event loop whatever has happened to the store."""
    assert store.peek(UNKNOWN) in (None, UNRESOLVED)
    token, secret = keep(store)
    for change in (store.revoke, lambda token_id, _: store.delete(token_id)):
        store.peek(digest_of(secret))
        await anyio.to_thread.run_sync(store.resolve, digest_of(secret))
        assert isinstance(store.peek(digest_of(secret)), Token)
        change(token.id, NOW)
    store.peek(digest_of(secret))
    assert await anyio.to_thread.run_sync(store.resolve, digest_of(secret)) is None


def test_a_token_is_the_same_object_from_call_to_call(store: TokenStore, keep: Keep) -> None:
    """What is made once for each token, such as a user object, can be found again by the token's identity."""
    _, secret = keep(store)
    first = store.resolve(digest_of(secret))
    for _ in range(3):
        assert _look(store, digest_of(secret)) is first
        assert store.resolve(digest_of(secret)) is first
        store.survey()
        store.tokens()


def test_a_changed_token_is_another_object(store: TokenStore, keep: Keep) -> None:
    """What was made for a token before it was revoked is not taken for it afterwards."""
    token, secret = keep(store)
    before = _look(store, digest_of(secret))
    store.revoke(token.id, NOW)
    assert _look(store, digest_of(secret)) is not before
    assert before is not None
    assert before.revoked_at is None


@pytest.mark.parametrize("field", ["expires_at", "revoked_at"])
def test_tokens_that_no_longer_work_are_answered_as_they_are(store: TokenStore, field: str) -> None:
    """The log can say why a token is refused: a revoked or expired one is still answered."""
    digest, token = _full()
    token = msgspec.structs.replace(token, **{field: NOW - timedelta(days=400)})
    store.add(digest, token)
    assert _facts(_look(store, digest)) == _facts(token)
    assert _facts(store.resolve(digest)) == _facts(token)


# --- the survey


def test_the_survey_counts_the_tokens_that_work_now(store: TokenStore, keep: Keep) -> None:
    """The line in the log at start names how many tokens work, and where they come from."""
    now = datetime.now(UTC)
    keep(store)
    keep(store, expires_at=now + timedelta(hours=1))
    keep(store, expires_at=now - timedelta(seconds=1))
    revoked, _ = keep(store)
    store.revoke(revoked.id, now)
    survey = store.survey()
    assert (survey.configured, survey.active) == (True, 2)
    assert survey.source


def test_a_store_that_was_configured_stays_so(opener: Opener, keep: Keep) -> None:
    """Deleting the last token opens no server, neither a running one nor the next."""
    store, other = opener(), opener()
    token, _ = keep(store)
    assert store.survey().configured
    assert other.survey().configured
    store.delete(token.id)
    for each in (store, other, opener()):
        assert (each.survey().configured, each.survey().active) == (True, 0)


# --- changing


def test_every_change_is_in_force_everywhere_when_it_has_returned(opener: Opener) -> None:
    """When a command has returned, no process of this host decides anything without it, however fresh its memory."""
    store, other = opener(), opener()
    digest, token = _full()
    stop = threading.Event()

    def look_all_the_time() -> None:
        while not stop.is_set():
            _look(other, digest)

    with ThreadPoolExecutor() as pool:
        looking = pool.submit(look_all_the_time)
        try:
            store.add(digest, token)
            assert other.peek(digest) is not None
            store.revoke(token.id, NOW)
            assert getattr(other.peek(digest), "revoked_at", NOW) == NOW
            assert getattr(_look(other, digest), "revoked_at", None) == NOW
            store.delete(token.id)
            assert other.peek(digest) in (None, UNRESOLVED)
            assert _look(other, digest) is None
        finally:
            stop.set()
        looking.result()


def test_tokens_are_listed_oldest_first(opener: Opener) -> None:
    """A list keeps its order: a revoked token keeps its place, and a new one comes last."""
    store = opener()
    added = []
    for minute in range(4):
        token, secret = issue(f"token {minute}", now=NOW + timedelta(minutes=minute))
        store.add(digest_of(secret), token)
        added.append((digest_of(secret), token.id))
    store.revoke(added[1][1], LATER)
    store.delete(added[2][1])
    expected = [added[0], added[1], added[3]]
    for each in (store, opener()):
        assert [(digest, token.id) for digest, token in each.tokens().items()] == expected


def test_a_list_is_of_its_moment(store: TokenStore, keep: Keep) -> None:
    """A list that is being printed does not change under the hand that prints it."""
    assert dict(store.tokens()) == {}
    token, secret = keep(store)
    listed = store.tokens()
    store.delete(token.id)
    assert [each.id for each in listed.values()] == [token.id]
    assert list(listed) == [digest_of(secret)]


@pytest.mark.parametrize("same", ["digest", "id", "both"])
def test_a_duplicate_is_refused_and_changes_nothing(store: TokenStore, same: str) -> None:
    """No second token can take the place of one that is there: neither by its secret nor by its id."""
    digest, token = _full()
    store.add(digest, token)
    other_digest, other = _full("other")
    if same != "digest":
        other = msgspec.structs.replace(other, id=token.id)
    with pytest.raises(StoreError, match="is there already") as caught:
        store.add(other_digest if same == "id" else digest, other)
    assert digest.hex() not in str(caught.value)
    assert {key: _facts(value) for key, value in store.tokens().items()} == {digest: _facts(token)}


def test_a_revoked_token_cannot_be_added_again(store: TokenStore) -> None:
    """Revoking cannot be undone by issuing the same secret once more."""
    digest, token = _full()
    store.add(digest, token)
    store.revoke(token.id, NOW)
    with pytest.raises(StoreError):
        store.add(digest, token)
    assert getattr(_look(store, digest), "revoked_at", None) == NOW


def test_revoking_enters_the_instant_and_nothing_else(store: TokenStore, keep: Keep) -> None:
    """A revoked token's record is kept as it was, with the instant at which it was revoked."""
    digest, token = _full()
    store.add(digest, token)
    keep(store, "bystander")
    revoked = store.revoke(token.id, LATER)
    expected = {**_facts(token), "revoked_at": LATER}
    assert _facts(revoked) == _facts(_look(store, digest)) == _facts(store.tokens()[digest]) == expected
    assert [each.revoked_at for each in store.tokens().values()] == [LATER, None]


def test_revoking_again_keeps_the_first_instant(opener: Opener, keep: Keep) -> None:
    """The record goes on saying when a token really stopped working."""
    store = opener()
    token, secret = keep(store)
    store.revoke(token.id, NOW)
    assert store.revoke(token.id, LATER).revoked_at == NOW
    assert opener().revoke(token.id, LATER).revoked_at == NOW
    assert getattr(_look(store, digest_of(secret)), "revoked_at", None) == NOW


def test_deleting_returns_the_record_as_it_was(store: TokenStore, keep: Keep) -> None:
    """A deleted token leaves nothing behind but the answer of the call that deleted it."""
    digest, token = _full()
    store.add(digest, token)
    keep(store, "bystander")
    store.revoke(token.id, NOW)
    assert _facts(store.delete(token.id)) == {**_facts(token), "revoked_at": NOW}
    assert _look(store, digest) is None
    assert [each.name for each in store.tokens().values()] == ["bystander"]


def test_an_unknown_id_is_named_and_changes_nothing(store: TokenStore, keep: Keep) -> None:
    """A wrong id revokes and deletes nothing, and the error says which id it was."""
    token, secret = keep(store)
    with pytest.raises(TokenNotFoundError, match="no token with the id nobody"):
        store.revoke("nobody", NOW)
    with pytest.raises(TokenNotFoundError, match="no token with the id nobody"):
        store.delete("nobody")
    store.delete(token.id)
    with pytest.raises(TokenNotFoundError, match=token.id):
        store.delete(token.id)
    assert _look(store, digest_of(secret)) is None


# --- several threads


@pytest.fixture
def _switching() -> Iterator[None]:
    """Make threads take turns as often as they can, so that what may go wrong between two steps does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_switching")
def test_many_threads_may_change_one_store(opener: Opener, keep: Keep) -> None:
    """Nothing is lost and nothing fails when several threads add, revoke and look at the same time."""
    store = opener()
    _, permanent = keep(store, "permanent")
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            assert _look(store, digest_of(permanent)) is not None
            assert store.survey().configured

    def change(number: int) -> tuple[str, str]:
        revoked, secret = keep(store, f"revoked {number}")
        deleted, _ = keep(store, f"deleted {number}")
        store.revoke(revoked.id, NOW)
        assert getattr(_look(store, digest_of(secret)), "revoked_at", None) == NOW
        store.delete(deleted.id)
        return revoked.id, deleted.id

    with ThreadPoolExecutor(8) as pool:
        looking = [pool.submit(look) for _ in range(2)]
        try:
            changed = list(pool.map(change, range(6)))
        finally:
            stop.set()
        for each in looking:
            each.result()
    kept = {token.id for token in opener().tokens().values() if token.revoked_at is not None}
    assert kept == {revoked for revoked, _ in changed}
    assert len(opener().tokens()) == 7


@pytest.mark.usefixtures("_switching")
def test_a_survey_and_a_list_may_be_asked_for_while_tokens_come(store: TokenStore, keep: Keep) -> None:
    """Counting and listing never fail because another thread is adding tokens."""
    for number in range(10):
        keep(store, f"token {number}")
    stop = threading.Event()

    def count() -> None:
        while not stop.is_set():
            store.survey()
            list(store.tokens().values())

    with ThreadPoolExecutor() as pool:
        counting = pool.submit(count)
        try:
            for number in range(300 if isinstance(store, MemoryTokenStore) else 10):
                keep(store, f"more {number}")
        finally:
            stop.set()
        counting.result()


@pytest.mark.usefixtures("_switching")
def test_of_many_threads_one_adds_a_token(store: TokenStore) -> None:
    """The same token added from several threads at once is there once, and every other thread is told."""
    digest, token = _full()

    def add(_: int) -> bool:
        try:
            store.add(digest, token)
        except StoreError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(add, range(4))) == [False, False, False, True]
    assert list(store.tokens()) == [digest]
