"""Who is calling: the modes, the environment key, the store, and what an application learns of its caller."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from freegpt_auth import (
    UNRESOLVED,
    AuthMode,
    ConfigurationError,
    FileTokenStore,
    StoreUnavailableError,
    Survey,
    Token,
    authentication,
)
from freegpt_auth.authentication import Authenticator, Caller, Refusal
from freegpt_auth.settings import EnvironmentKey
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
    [record] = [record for record in caplog.records if record.module == "authentication"]
    assert re.match(line, f"{record.levelname} {record.getMessage()}")
    assert not any(secret in caplog.text for secret in (KEY, digest_of(KEY).hex()))
    opens = pytest.raises(ConfigurationError, match="set FREEGPT_API_KEY, or run python -m freegpt_auth create NAME")
    with opens if mode == "open" else contextlib.nullcontext():
        Authenticator(FileTokenStore(FILE), key, required=True)


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


@pytest.mark.parametrize(
    ("token", "accepted"), [(LIVE, True), (EXPIRED, True), (REVOKED, False), (BROKEN, True), (None, True)]
)
def test_a_key_that_is_a_tokens_secret_is_refused_once_that_was_revoked(token: Any, *, accepted: bool) -> None:
    """Who revokes a token turns it off as an environment key too; nothing else that befalls the store turns the key off."""
    authenticator = Authenticator(Stub({KEY: token}), KEY_SETTING)
    decision = authenticator.peek([KEY.encode()])
    assert isinstance(decision, Caller) is accepted
    assert decision == (authenticator.resolve([KEY.encode()]) if accepted else Refusal("revoked", REVOKED.id))


def test_an_application_cannot_widen_what_others_may() -> None:
    """The scopes that one request is told cannot be added to for the requests after it."""
    caller = Authenticator(Stub({"sk-live": LIVE}), KEY_SETTING).peek([b"sk-live"])
    for known in (caller, authentication.ANONYMOUS):
        assert isinstance(known, Caller)
        with pytest.raises(AttributeError):
            known.auth.scopes.append("admin")


def test_an_open_server_whose_store_cannot_be_surveyed_lets_nobody_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be known must not let a request through."""
    stub = Stub({})
    authenticator = Authenticator(stub, None)
    authenticator.mode = AuthMode.OPEN

    def survey() -> Survey:
        raise BROKEN

    monkeypatch.setattr(stub, "survey", survey)
    assert authenticator.resolve_open() is False


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
    caller = authenticator.peek([secret.encode()])
    assert isinstance(caller, Caller)
    assert caller.token is token
    assert caller.user.is_authenticated
    assert (
        repr(caller.user) == f"TokenUser(identity={caller.user.identity!r}, display_name={caller.user.display_name!r})"
    )
    assert (caller.user.display_name, caller.user.identity) == (identity, token.id if token else identity)
    assert tuple(caller.auth.scopes) == ("authenticated", *(token.scopes if token else ()))
    assert authenticator.peek([secret.encode()]) is caller


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
    authenticator = Authenticator(Stub({"sk-1": token, "sk-broken": BROKEN, "": LIVE}), KEY_SETTING)
    assert authenticator.peek([b"sk-1"]) == authenticator.resolve([b"sk-1"]) == refusal
    for secrets in ([b"sk-1", b"sk-broken"], [b"sk-broken", b"sk-1"]):
        assert authenticator.peek(secrets) == Refusal("unavailable")
    # b"" stands for a value over 4 KB: it is no secret, not even that of a token made from an empty string.
    assert authenticator.peek([]) == authenticator.peek([b""]) == Refusal("unknown")


def test_expiry_is_looked_at_on_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that was accepted a moment ago is refused from the instant at which it expires."""
    authenticator = Authenticator(Stub({"sk-1": make_token("short", expires_at=NOW)}), None)
    for seconds, refused in [(-0.001, False), (0.0, True), (1.0, True), (-0.001, False)]:
        instant = NOW.timestamp() + seconds
        monkeypatch.setattr(authentication.time, "time", lambda instant=instant: instant)
        assert isinstance(authenticator.peek([b"sk-1"]), Refusal) is refused


@pytest.mark.parametrize("wrong", [None, REVOKED, EXPIRED, BROKEN, UNRESOLVED])
@pytest.mark.parametrize("right", ["sk-live", KEY])
def test_any_secret_that_verifies_is_enough(wrong: Any, right: str) -> None:
    """A client that sends a valid token and something else passes, in whichever order it sends them."""
    authenticator = Authenticator(Stub({"sk-live": LIVE, "sk-wrong": wrong}), KEY_SETTING)
    for secrets in ([b"sk-wrong", right.encode()], [right.encode(), b"sk-wrong"]):
        assert isinstance(authenticator.peek(secrets), Caller)


@pytest.mark.parametrize("other", [None, REVOKED, EXPIRED, BROKEN])
def test_what_memory_cannot_tell_is_asked_of_the_store(other: Any) -> None:
    """A token that memory does not know yet is looked up, whatever stands beside it; without an answer it is refused."""
    stub = Stub({"sk-later": UNRESOLVED, "sk-other": other}, {"sk-later": LIVE, "sk-other": other})
    authenticator = Authenticator(stub, None)
    for secrets in ([b"sk-later", b"sk-other"], [b"sk-other", b"sk-later"]):
        assert authenticator.peek(secrets) is UNRESOLVED
        assert isinstance(authenticator.resolve(secrets), Caller)
    stub.resolved = stub.peeked
    assert authenticator.resolve([b"sk-later"]) == Refusal("unavailable")


def test_a_changed_token_is_told_anew() -> None:
    """When a token's record changes, the application learns of it at the next request."""
    stub = Stub({"sk-1": LIVE})
    authenticator = Authenticator(stub, None)
    for token in (LIVE, make_token(scopes=("delete",))):
        stub.peeked[digest_of("sk-1")] = token
        caller = authenticator.peek([b"sk-1"])
        assert isinstance(caller, Caller)
        assert tuple(caller.auth.scopes) == ("authenticated", *token.scopes)
    stub.peeked[digest_of("sk-1")] = make_token(revoked_at=NOW)
    assert authenticator.peek([b"sk-1"]) == Refusal("revoked", "id-live")


def test_callers_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens are used, memory has a bound and each of them works; wrong ones are not remembered."""
    monkeypatch.setattr(authentication, "CALLER_LIMIT", 3)
    authenticator = Authenticator(Stub({f"sk-{n}": make_token(f"n{n}") for n in range(10)}), None)
    authenticator.peek([b"sk-wrong"])
    assert authenticator._callers == {}
    for n in [*range(10), *range(10)]:
        caller = authenticator.peek([f"sk-{n}".encode()])
        assert isinstance(caller, Caller)
        assert caller.user.display_name == f"n{n}"
        assert 1 <= len(authenticator._callers) <= 3
