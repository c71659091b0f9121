"""Who is calling: the modes, the environment key, the store, and what an application learns of its caller."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from freegpt_auth import UNRESOLVED, AuthMode, ConfigurationError, FileTokenStore, StoreUnavailableError, Survey, Token
from freegpt_auth.environment_key import EnvironmentKey
from freegpt_auth.guard import authenticator as authenticators
from freegpt_auth.guard.authenticator import Authenticator, Decision, Refusal
from freegpt_auth.guard.callers import Caller
from freegpt_auth.tokens import digest_of

KEY = "the-environment-key"
EMPTY = '{"version": 1, "tokens": []}'
KEY_SETTING = EnvironmentKey(digest_of(KEY), "FREEGPT_API_KEY")
NOW = datetime(2024, 5, 1, tzinfo=UTC)
FILE = Path("api_tokens.json")

Keep = Callable[..., tuple[Token, str]]


class Stub:
    """A verifier whose answers to ``peek`` and ``resolve`` are given by the secret."""

    def __init__(self, peeked: dict[str, Any], resolved: dict[str, Any] | None = None) -> None:
        self.peeked = {digest_of(secret): answer for secret, answer in peeked.items()}
        self.resolved = {digest_of(secret): answer for secret, answer in (resolved or peeked).items()}

    def peek(self, digest: bytes, *, resolve: bool = False) -> Any:
        """Give the answer prepared for memory, or for the store."""
        answer = (self.resolved if resolve else self.peeked).get(digest)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def resolve(self, digest: bytes) -> Any:
        """Give the answer prepared for the store."""
        return self.peek(digest, resolve=True)

    def survey(self) -> Survey:
        """Say that there are tokens."""
        return Survey(configured=True, active=1, source="a stub")


def make_token(name: str = "live", **fields: Any) -> Token:
    """Return a token as a store would hold it."""
    return Token(**{"id": f"id-{name}", "name": name, "prefix": "sk-", "created_at": NOW, **fields})


LIVE = make_token(scopes=("read", "write"))
REVOKED = make_token("revoked", revoked_at=NOW)
EXPIRED = make_token("expired", expires_at=NOW)
BROKEN = StoreUnavailableError("the disk is gone")


def decide(authenticator: Authenticator, *secrets: str) -> Decision:
    """Decide from memory as the middleware does: callers that are known are recognised first."""
    digests = [digest_of(secret) for secret in secrets]
    known = authenticator.recognise(digests[0]) if len(digests) == 1 else None
    return known or authenticator.peek(digests)


@pytest.mark.parametrize(
    ("content", "key", "mode", "line"),
    [
        (None, None, "open", "WARNING open mode: every request is let through, .* run: .* create NAME"),
        ("{}", None, "open", "WARNING open mode"),
        ("{}", KEY_SETTING, "environment", "INFO environment mode: 0 active .* the .* key from FREEGPT_API_KEY"),
        (
            EMPTY,
            None,
            "token-file",
            r"INFO token-file mode: 0 active token\(s\) from .*tokens\.json.* no environment key",
        ),
        ("not JSON", KEY_SETTING, "token-file", "INFO token-file mode: .* the environment key from FREEGPT_API_KEY"),
    ],
)
def test_the_mode_is_found_at_the_start(
    request: pytest.FixtureRequest, content: str | None, key: EnvironmentKey | None, mode: str, line: str
) -> None:
    """A server is open only where nothing at all is configured and nothing is required; one line in the log says so."""
    caplog = request.getfixturevalue("caplog")
    caplog.set_level(logging.INFO, "freegpt_auth")
    if content is not None:
        FILE.write_text(content)
    assert str(Authenticator(FileTokenStore(FILE), key).mode) == mode
    [record] = [record for record in caplog.records if record.module == "modes"]
    assert re.match(line, f"{record.levelname} {record.getMessage()}")
    assert not any(secret in caplog.text for secret in (KEY, digest_of(KEY).hex()))
    opens = pytest.raises(ConfigurationError, match="set FREEGPT_API_KEY, or run python -m freegpt_auth create NAME")
    with opens if mode == "open" else contextlib.nullcontext():
        Authenticator(FileTokenStore(FILE), key, required=True)


@pytest.mark.parametrize("content", [None, "{}"])
@pytest.mark.parametrize("key", [None, KEY_SETTING])
def test_named_store_is_never_open(
    keep: Keep, caplog: pytest.LogCaptureFixture, content: str | None, key: EnvironmentKey | None
) -> None:
    """A named file that is missing or blank refuses every request but the key's, and the log says what to do."""
    if content is not None:
        FILE.write_text(content)
        FILE.chmod(0o600)
    authenticator = Authenticator(FileTokenStore(FILE), key, required=True, named=True)
    [(_, level, line)] = caplog.record_tuples
    assert level == logging.WARNING
    origin = "the environment key from FREEGPT_API_KEY" if key else "no environment key"
    assert line == (
        f"token-file mode: {FILE.absolute()} is missing or holds no tokens, so requests are refused (there is {origin}). "
        f"To create a first token, run: python -m freegpt_auth --store {FILE.absolute()} create NAME"
    )
    assert authenticator.peek_open() is authenticator.resolve_open() is False
    assert isinstance(authenticator.resolve([digest_of(KEY)]), Caller) is (key is not None)
    _, secret = keep(FileTokenStore(FILE))
    assert isinstance(authenticator.resolve([digest_of(secret)]), Caller)


def test_token_source_is_never_open() -> None:
    """A token source of one's own counts as named, even if it says that it is not configured."""

    class Blank(Stub):
        def survey(self) -> Survey:
            """Hold nothing."""
            return Survey(configured=False, active=0, source="a table")

    assert Authenticator(Blank({}), None, named=True).mode is AuthMode.TOKEN_FILE
    assert Authenticator(Blank({}), None).mode is AuthMode.OPEN


@pytest.mark.parametrize("content", [None, "", '{"version": 2}'])
def test_open_closes_and_never_opens_again(keep: Keep, caplog: pytest.LogCaptureFixture, content: str | None) -> None:
    """The first token, or a file that cannot be read, closes an open server for good, even if the file goes away."""
    authenticator = Authenticator(FileTokenStore(FILE), None)
    assert authenticator.peek_open() is authenticator.resolve_open() is True
    if content is None:
        keep(FileTokenStore(FILE))
        assert authenticator.peek_open() is UNRESOLVED
    else:
        FILE.write_text(content)
    assert authenticator.resolve_open() is False
    FILE.unlink()
    assert authenticator.peek_open() is authenticator.resolve_open() is False
    assert authenticator.mode is AuthMode.TOKEN_FILE
    assert caplog.text.count(f"is now on: {int(content is None)} active token(s) from") == 1


def test_that_authentication_is_on_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """However many requests find at the same moment that the first token was created."""
    together = threading.Barrier(8)

    class Found(Stub):
        configured = False

        def survey(self) -> Survey:
            """Answer all who ask at the same moment."""
            if self.configured:
                together.wait(10)
            return Survey(self.configured, active=1, source="a stub")

    verifier = Found({})
    authenticator = Authenticator(verifier, None)
    verifier.configured = True
    caplog.clear()
    with ThreadPoolExecutor(together.parties) as threads:
        passed = list(threads.map(lambda _: authenticator.resolve_open(), range(together.parties)))
    assert not any(passed)
    assert caplog.messages == ["authentication is now on: 1 active token(s) from a stub"]


@pytest.mark.parametrize(
    ("token", "accepted"), [(LIVE, True), (EXPIRED, True), (REVOKED, False), (BROKEN, True), (None, True)]
)
def test_a_key_that_is_a_tokens_secret_is_refused_once_that_was_revoked(token: Any, *, accepted: bool) -> None:
    """Who revokes a token turns it off as an environment key too; nothing else that befalls the store turns the key off."""
    authenticator = Authenticator(Stub({KEY: token}), KEY_SETTING)
    for _ in range(2):
        decision = decide(authenticator, KEY)
        assert isinstance(decision, Caller) is accepted
        assert decision == (authenticator.resolve([digest_of(KEY)]) if accepted else Refusal("revoked", REVOKED.id))


@pytest.mark.parametrize("is_presented", [False, True])
@pytest.mark.parametrize("fate", ["missing", "restored", "broken"])
def test_revoked_key_stays_refused(keep: Keep, fate: str, *, is_presented: bool) -> None:
    """A process that once read the revocation of the key refuses it, whatever happens to the file and whoever asked."""
    store = FileTokenStore(FILE)
    token, secret = keep(store)
    before = FILE.read_bytes()
    authenticator = Authenticator(FileTokenStore(FILE), EnvironmentKey(digest_of(secret), "FREEGPT_API_KEY"))
    assert isinstance(authenticator.resolve([digest_of(secret)]), Caller)
    store.revoke(token.id, NOW)
    authenticator.resolve([digest_of(secret if is_presented else "another")])
    FILE.unlink()
    if fate != "missing":
        FILE.write_bytes(before if fate == "restored" else b"")
    for _ in range(2):
        assert authenticator.resolve([digest_of(secret)]) == Refusal("revoked", token.id)
        # A file changed this recently is looked at again.
        assert decide(authenticator, secret) in {Refusal("revoked", token.id), UNRESOLVED}
    assert authenticator.recognise(digest_of(secret)) is None


def test_key_revoked_before_the_start_stays_refused(keep: Keep) -> None:
    """The revocation need not have been met by a request: the start of the server reads it."""
    store = FileTokenStore(FILE)
    token, secret = keep(store)
    store.revoke(token.id, NOW)
    authenticator = Authenticator(store, EnvironmentKey(digest_of(secret), "FREEGPT_API_KEY"))
    FILE.unlink()
    assert authenticator.resolve([digest_of(secret)]) == Refusal("revoked", token.id)


def test_a_caller_that_was_known_is_looked_up_all_the_same() -> None:
    """Who was let in before is not let in by a store that cannot tell any more whether the token is good."""
    stub = Stub({"sk-live": LIVE})
    authenticator = Authenticator(stub, None)
    assert isinstance(decide(authenticator, "sk-live"), Caller)
    stub.peeked[digest_of("sk-live")] = BROKEN
    assert decide(authenticator, "sk-live") == Refusal("unavailable")


def test_an_open_server_whose_store_cannot_be_surveyed_lets_nobody_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be known must not let a request through."""
    stub = Stub({})
    authenticator = Authenticator(stub, None)
    authenticator.mode = AuthMode.OPEN

    def survey() -> Survey:
        raise BROKEN

    monkeypatch.setattr(stub, "survey", survey)
    assert authenticator.resolve_open() is False


def test_nobody_passes_once_the_first_token_was_read(keep: Keep) -> None:
    """While one request finds the first token, no other passes on what memory said before the server was told of it."""
    meanwhile: list[object] = []

    class Watched(FileTokenStore):
        def survey(self) -> Survey:
            survey = super().survey()
            meanwhile.append(self.peek(b""))
            return survey

    store = Watched(FILE)
    authenticator = Authenticator(store, None)
    assert authenticator.peek_open() is True
    keep(FileTokenStore(FILE))
    assert authenticator.resolve_open() is authenticator.peek_open() is False
    assert meanwhile == [None, UNRESOLVED]


def test_an_open_server_whose_store_became_unavailable_asks_again() -> None:
    """Memory that knows of trouble does not let a request through; the store is asked."""
    stub = Stub({})
    authenticator = Authenticator(stub, None)
    authenticator.mode = AuthMode.OPEN
    stub.peeked[b""] = BROKEN
    assert authenticator.peek_open() is UNRESOLVED


@pytest.mark.parametrize(("secret", "identity", "token"), [(KEY, "environment", None), ("sk-live", "live", LIVE)])
def test_who_is_accepted(secret: str, identity: str, token: Token | None) -> None:
    """An application learns the name, the id and the scopes of its caller; it is told at once, and never the secret."""
    authenticator = Authenticator(Stub({"sk-live": LIVE}), KEY_SETTING)
    caller = decide(authenticator, secret)
    assert isinstance(caller, Caller)
    assert caller.token is token
    assert caller.user.is_authenticated
    assert (
        repr(caller.user) == f"TokenUser(identity={caller.user.identity!r}, display_name={caller.user.display_name!r})"
    )
    assert (caller.user.display_name, caller.user.identity) == (identity, token.id if token else identity)
    assert tuple(caller.auth.scopes) == ("authenticated", *(token.scopes if token else ()))
    assert decide(authenticator, secret) is caller


@pytest.mark.parametrize(
    ("token", "refusal"),
    [
        (None, Refusal("unknown")),
        (REVOKED, Refusal("revoked", "id-revoked")),
        (EXPIRED, Refusal("expired", "id-expired")),
        (make_token("both", revoked_at=NOW, expires_at=NOW), Refusal("revoked", "id-both")),
        (BROKEN, Refusal("unavailable")),
    ],
)
def test_why_a_secret_is_refused(token: Any, refusal: Refusal) -> None:
    """The log can say why a request was refused; that a token cannot be checked comes first, in whichever order."""
    stub = Stub({"sk-1": token, "sk-broken": BROKEN})
    authenticator = Authenticator(stub, KEY_SETTING)
    assert decide(authenticator, "sk-1") == authenticator.resolve([digest_of("sk-1")]) == refusal
    for secrets in (("sk-1", "sk-broken"), ("sk-broken", "sk-1")):
        assert decide(authenticator, *secrets) == Refusal("unavailable")
    # b"" stands for a value over 4 KB: no store is asked for it.
    stub.peeked[b""] = LIVE
    assert authenticator.peek([]) == authenticator.peek([b""]) == Refusal("unknown")


@pytest.mark.parametrize("own_clock", [False, True])
def test_expiry_is_looked_at_on_every_request(monkeypatch: pytest.MonkeyPatch, *, own_clock: bool) -> None:
    """A token that was accepted a moment ago is refused from when it expires, by the store's own clock if it has one."""
    seconds = 0.0
    stub = Stub({"sk-1": make_token("short", expires_at=NOW)})
    if own_clock:
        stub.now = lambda: NOW.timestamp() + seconds  # type: ignore[attr-defined]
    else:
        monkeypatch.setattr(authenticators.time, "time", lambda: NOW.timestamp() + seconds)
    authenticator = Authenticator(stub, None)
    for seconds, refused in [(-0.001, False), (0.0, True), (1.0, True), (-0.001, False)]:  # noqa: B007
        assert isinstance(decide(authenticator, "sk-1"), Refusal) is refused


@pytest.mark.parametrize("wrong", [None, REVOKED, EXPIRED, BROKEN, UNRESOLVED])
@pytest.mark.parametrize("right", ["sk-live", KEY])
def test_any_secret_that_verifies_is_enough(wrong: Any, right: str) -> None:
    """A client that sends a valid token and something else passes, in whichever order it sends them."""
    authenticator = Authenticator(Stub({"sk-live": LIVE, "sk-wrong": wrong}), KEY_SETTING)
    for secrets in (("sk-wrong", right), (right, "sk-wrong")):
        assert isinstance(decide(authenticator, *secrets), Caller)


@pytest.mark.parametrize("other", [None, REVOKED, EXPIRED, BROKEN])
def test_what_memory_cannot_tell_is_asked_of_the_store(other: Any) -> None:
    """A token that memory does not know yet is looked up, whatever stands beside it; without an answer it is refused."""
    stub = Stub({"sk-later": UNRESOLVED, "sk-other": other}, {"sk-later": LIVE, "sk-other": other})
    authenticator = Authenticator(stub, None)
    later, others = digest_of("sk-later"), digest_of("sk-other")
    for digests in ([later, others], [others, later]):
        assert authenticator.peek(digests) is UNRESOLVED
        assert isinstance(authenticator.resolve(digests), Caller)
    stub.resolved = stub.peeked
    assert authenticator.resolve([later]) == Refusal("unavailable")


def test_a_changed_token_is_told_anew() -> None:
    """When a token's record changes, the application learns of it at the next request."""
    stub = Stub({"sk-1": LIVE})
    authenticator = Authenticator(stub, None)
    for token in (LIVE, make_token(scopes=("delete",))):
        stub.peeked[digest_of("sk-1")] = token
        caller = decide(authenticator, "sk-1")
        assert isinstance(caller, Caller)
        assert tuple(caller.auth.scopes) == ("authenticated", *token.scopes)
    stub.peeked[digest_of("sk-1")] = make_token(revoked_at=NOW)
    assert decide(authenticator, "sk-1") == Refusal("revoked", "id-live")


def test_callers_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens are used, memory has a bound and each of them works; wrong ones are not remembered."""
    monkeypatch.setattr(authenticators, "CALLER_LIMIT", 3)
    authenticator = Authenticator(Stub({f"sk-{n}": make_token(f"n{n}") for n in range(10)}), None)
    decide(authenticator, "sk-wrong")
    assert authenticator._callers == {}
    for n in [*range(10), *range(10)]:
        caller = decide(authenticator, f"sk-{n}")
        assert isinstance(caller, Caller)
        assert caller.user.display_name == f"n{n}"
        assert 1 <= len(authenticator._callers) <= 3


def test_memory_is_bounded_by_what_the_store_keeps_in_memory() -> None:
    """Of a store that keeps few tokens in memory, no more are kept for it here, and each of them works."""
    stub = Stub({f"sk-{n}": make_token(f"n{n}") for n in range(10)})
    stub.cache_limit = 3  # type: ignore[attr-defined]
    authenticator = Authenticator(stub, None)
    for n in range(10):
        assert isinstance(decide(authenticator, f"sk-{n}"), Caller)
        assert 1 <= len(authenticator._callers) <= 3
