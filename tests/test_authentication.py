"""Who is calling: the modes, the environment key, the store, and what an application learns of its caller."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st
from starlette.authentication import UnauthenticatedUser

from freegpt_auth import (
    UNRESOLVED,
    AuthMode,
    ConfigurationError,
    FileTokenStore,
    MemoryTokenStore,
    StoreUnavailableError,
    Survey,
    Token,
    TokenUser,
    authentication,
)
from freegpt_auth.authentication import ANONYMOUS, Authenticator, Caller, Refusal
from freegpt_auth.settings import EnvironmentKey
from freegpt_auth.tokens import digest_of, issue

KEY = "the-environment-key"
KEY_SETTING = EnvironmentKey(digest_of(KEY), "FREEGPT_API_KEY")
NOW = datetime(2024, 5, 1, tzinfo=UTC)

Keep = Callable[..., tuple[Token, str]]


class Stub:
    """A verifier whose answers to ``peek`` and ``resolve`` are given by the secret."""

    def __init__(self, peeked: dict[str, Any], resolved: dict[str, Any] | None = None) -> None:
        self.peeked = {digest_of(secret): answer for secret, answer in peeked.items()}
        self.resolved = {digest_of(secret): answer for secret, answer in (resolved or {}).items()}

    def peek(self, digest: bytes) -> Any:
        """Give the answer prepared for memory."""
        return self._give(self.peeked.get(digest))

    def resolve(self, digest: bytes) -> Any:
        """Give the answer prepared for the store."""
        return self._give(self.resolved.get(digest))

    def survey(self) -> Survey:
        """Say that there are tokens."""
        return Survey(configured=True, active=1, source="a stub")

    @staticmethod
    def _give(answer: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer


def make_token(name: str = "live", **fields: Any) -> Token:
    """Return a token as a store would hold it."""
    return Token(**{"id": f"id-{name}", "name": name, "prefix": "sk-", "created_at": NOW, **fields})


LIVE = make_token()
REVOKED = make_token("revoked", revoked_at=NOW)
EXPIRED = make_token("expired", expires_at=NOW)
BROKEN = StoreUnavailableError("the disk is gone")


# The modes


@pytest.mark.parametrize(
    ("content", "key", "mode"),
    [
        (None, None, AuthMode.OPEN),
        ("{}", None, AuthMode.OPEN),
        (None, KEY_SETTING, AuthMode.ENVIRONMENT),
        ("{}", KEY_SETTING, AuthMode.ENVIRONMENT),
        ('{"version": 1, "tokens": []}', None, AuthMode.TOKEN_FILE),
        ('{"version": 1, "tokens": []}', KEY_SETTING, AuthMode.TOKEN_FILE),
        ("", None, AuthMode.TOKEN_FILE),
        ("not JSON", None, AuthMode.TOKEN_FILE),
    ],
)
def test_the_mode_is_found_at_the_start(
    tmp_path: Path, content: str | None, key: EnvironmentKey | None, mode: AuthMode
) -> None:
    """A server is open only where nothing at all is configured; a file that cannot be read counts as tokens."""
    path = tmp_path / "api_tokens.json"
    if content is not None:
        path.write_text(content)
    assert Authenticator(FileTokenStore(path), key).mode is mode


def test_modes_read_as_the_guide_writes_them() -> None:
    """What is logged of a mode is the word that the documentation uses."""
    assert [str(mode) for mode in AuthMode] == ["open", "environment", "token-file"]


def test_required_stops_an_open_start(tmp_path: Path, keep: Keep) -> None:
    """Where authentication is required, a server without tokens does not start, and says what to do."""
    store = FileTokenStore(tmp_path / "api_tokens.json")
    with pytest.raises(ConfigurationError, match=r"set FREEGPT_API_KEY, or run python -m freegpt_auth create NAME"):
        Authenticator(store, None, required=True)
    assert Authenticator(store, KEY_SETTING, required=True).mode is AuthMode.ENVIRONMENT
    keep(store)
    assert Authenticator(store, None, required=True).mode is AuthMode.TOKEN_FILE


@pytest.mark.parametrize(
    ("tokens", "key", "level", "words"),
    [
        (0, None, "WARNING", ["open mode: every request is let through", "python -m freegpt_auth create NAME"]),
        (0, KEY_SETTING, "INFO", ["environment mode: 0 active tokens", "the environment key from FREEGPT_API_KEY"]),
        (2, None, "INFO", ["token-file mode: 2 active tokens from ", "api_tokens.json", "no environment key"]),
        (1, KEY_SETTING, "INFO", ["token-file mode: 1 active", "the environment key from FREEGPT_API_KEY"]),
    ],
)
def test_the_start_is_said_in_one_line(
    request: pytest.FixtureRequest, tokens: int, key: EnvironmentKey | None, level: str, words: list[str]
) -> None:
    """An operator reads once, in one line, which mode a server is in, how many tokens it has and where from."""
    caplog, keep = request.getfixturevalue("caplog"), request.getfixturevalue("keep")
    caplog.set_level(logging.INFO, "freegpt_auth")
    store = FileTokenStore("api_tokens.json")
    for number in range(tokens):
        keep(store, f"token-{number}")
    Authenticator(store, key)
    [record] = caplog.records
    assert record.levelname == level
    assert all(word in record.getMessage() for word in words)
    assert KEY not in caplog.text
    assert digest_of(KEY).hex() not in caplog.text


def test_open_closes_and_never_opens_again(tmp_path: Path, keep: Keep, caplog: pytest.LogCaptureFixture) -> None:
    """The first token closes an open server for good, even if the file goes away again."""
    store = FileTokenStore(tmp_path / "api_tokens.json")
    authenticator = Authenticator(store, None)
    assert authenticator.peek_open() is True
    assert authenticator.resolve_open() is True
    keep(FileTokenStore(store.path))
    assert authenticator.peek_open() is UNRESOLVED
    assert authenticator.resolve_open() is False
    assert authenticator.mode is AuthMode.TOKEN_FILE
    assert "authentication is on from now: 1 active tokens" in caplog.text
    Path(store.path).unlink()
    assert authenticator.peek_open() is False
    assert authenticator.resolve_open() is False
    assert caplog.text.count("authentication is on from now") == 1


@pytest.mark.parametrize("content", ["", "{", '{"version": 2}'])
def test_a_broken_file_closes_an_open_server(tmp_path: Path, content: str) -> None:
    """A file that appears and cannot be read is a sign of tokens, not of their absence."""
    path = tmp_path / "api_tokens.json"
    authenticator = Authenticator(FileTokenStore(path), None)
    path.write_text(content)
    assert authenticator.resolve_open() is False


def test_an_open_server_whose_store_became_unavailable_asks_again() -> None:
    """Memory that knows of trouble does not let a request through; the store is asked."""
    stub = Stub({})
    authenticator = Authenticator(stub, None)
    authenticator.mode = AuthMode.OPEN
    stub.peeked[b""] = BROKEN
    assert authenticator.peek_open() is UNRESOLVED
    assert authenticator.resolve_open() is False


# The decision


def test_the_environment_key_is_accepted() -> None:
    """The caller with the environment key is known to the application as such."""
    caller = Authenticator(MemoryTokenStore(), KEY_SETTING).peek([KEY.encode()])
    assert isinstance(caller, Caller)
    assert caller.user.is_authenticated
    assert caller.user.display_name == caller.user.identity == "environment"
    assert caller.auth.scopes == ["authenticated"]
    assert caller.token is None


def test_a_token_is_accepted_with_its_name_id_and_scopes() -> None:
    """An application learns a token's name, its id and what it may do."""
    token = make_token("ci", scopes=("read", "write"))
    caller = Authenticator(Stub({"sk-1": token}), None).peek([b"sk-1"])
    assert isinstance(caller, Caller)
    assert isinstance(caller.user, TokenUser)
    assert caller.user.is_authenticated
    assert caller.user.display_name == "ci"
    assert caller.user.identity == "id-ci"
    assert caller.auth.scopes == ["authenticated", "read", "write"]
    assert caller.token is token


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
    """The log can say why a request was refused, and which token it was."""
    authenticator = Authenticator(Stub({"sk-1": token}, {"sk-1": token}), KEY_SETTING)
    assert authenticator.peek([b"sk-1"]) == refusal
    assert authenticator.resolve([b"sk-1"]) == refusal


def test_expiry_is_looked_at_on_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that was accepted a moment ago is refused from the instant at which it expires."""
    authenticator = Authenticator(Stub({"sk-1": make_token("short", expires_at=NOW)}), None)
    for seconds, refused in [(-0.001, False), (0.0, True), (1.0, True), (-0.001, False)]:
        instant = NOW.timestamp() + seconds
        monkeypatch.setattr(authentication.time, "time", lambda instant=instant: instant)
        assert isinstance(authenticator.peek([b"sk-1"]), Refusal) is refused


def test_no_secret_at_all_is_refused() -> None:
    """Nothing presented is nobody, whatever else is configured."""
    assert Authenticator(MemoryTokenStore(), KEY_SETTING).peek([]) == Refusal("unknown")


@pytest.mark.parametrize("wrong", ["sk-unknown", "sk-revoked", "sk-expired", "sk-broken", "sk-unresolved"])
@pytest.mark.parametrize("right", ["sk-live", KEY])
def test_any_secret_that_verifies_is_enough(wrong: str, right: str) -> None:
    """A client that sends a valid token and something else passes, in whichever order it sends them."""
    peeked = {
        "sk-live": LIVE,
        "sk-revoked": REVOKED,
        "sk-expired": EXPIRED,
        "sk-broken": BROKEN,
        "sk-unresolved": UNRESOLVED,
    }
    authenticator = Authenticator(Stub(peeked), KEY_SETTING)
    assert isinstance(authenticator.peek([wrong.encode(), right.encode()]), Caller)
    assert isinstance(authenticator.peek([right.encode(), wrong.encode()]), Caller)


@pytest.mark.parametrize("other", [None, REVOKED, EXPIRED, BROKEN])
@pytest.mark.parametrize("secrets", [[b"sk-later", b"sk-other"], [b"sk-other", b"sk-later"]])
def test_what_memory_cannot_tell_is_asked_of_the_store(other: Any, secrets: list[bytes]) -> None:
    """A valid token that memory does not know yet is accepted, in whichever order it stands beside a wrong one."""
    stub = Stub({"sk-later": UNRESOLVED, "sk-other": other}, {"sk-later": LIVE, "sk-other": other})
    authenticator = Authenticator(stub, None)
    assert authenticator.peek(secrets) is UNRESOLVED
    assert isinstance(authenticator.resolve(secrets), Caller)


@pytest.mark.parametrize("other", [None, REVOKED, EXPIRED])
@pytest.mark.parametrize("secrets", [[b"sk-broken", b"sk-other"], [b"sk-other", b"sk-broken"]])
def test_what_cannot_be_known_is_not_called_invalid(other: Any, secrets: list[bytes]) -> None:
    """A client whose token cannot be checked is asked to try again, in whichever order a wrong one stands beside it."""
    authenticator = Authenticator(Stub({"sk-broken": BROKEN, "sk-other": other}), None)
    assert authenticator.peek(secrets) == Refusal("unavailable")


def test_a_store_that_stays_unresolved_is_unavailable() -> None:
    """A verifier that answers neither yes nor no lets nobody through."""
    authenticator = Authenticator(Stub({}, {"sk-1": UNRESOLVED}), None)
    assert authenticator.resolve([b"sk-1"]) == Refusal("unavailable")


def test_an_overlong_secret_is_refused_whatever_the_store_holds() -> None:
    """What stands for a value over 4 KB is no secret, not even that of a token made from an empty string."""
    store = MemoryTokenStore()
    store.add(digest_of(""), make_token("empty"))
    assert Authenticator(store, None).peek([b""]) == Refusal("unknown")


SECRETS = [issue("a", now=NOW)[1] for _ in range(3)]


@hypothesis_settings(max_examples=100, deadline=None)
@given(
    presented=st.one_of(
        st.binary(max_size=60),
        st.sampled_from(SECRETS).map(str.encode),
        st.tuples(st.sampled_from(SECRETS), st.integers(0, 51), st.binary(max_size=2)).map(
            lambda parts: parts[0][: parts[1]].encode() + parts[2] + parts[0][parts[1] + 1 :].encode()
        ),
    )
)
def test_nothing_but_an_exact_secret_is_accepted(presented: bytes) -> None:
    """No byte string but a token's secret, to the last byte, is that token."""
    authenticator = Authenticator(Stub(dict.fromkeys(SECRETS, LIVE)), KEY_SETTING)
    exact = presented in [secret.encode() for secret in (*SECRETS, KEY)]
    assert isinstance(authenticator.peek([presented]), Caller) is exact


# What the application is told


def test_a_caller_is_made_once_for_each_token() -> None:
    """A request makes no new objects for a token that was seen before."""
    authenticator = Authenticator(Stub({"sk-1": LIVE}), None)
    assert authenticator.peek([b"sk-1"]) is authenticator.peek([b"sk-1"])


def test_a_changed_token_is_told_anew() -> None:
    """When a token's record changes, the application learns of it at the next request."""
    stub = Stub({"sk-1": make_token(scopes=("read",))})
    authenticator = Authenticator(stub, None)
    authenticator.peek([b"sk-1"])
    stub.peeked[digest_of("sk-1")] = make_token(scopes=("write",))
    caller = authenticator.peek([b"sk-1"])
    assert isinstance(caller, Caller)
    assert caller.auth.scopes == ["authenticated", "write"]
    stub.peeked[digest_of("sk-1")] = make_token(revoked_at=NOW)
    assert authenticator.peek([b"sk-1"]) == Refusal("revoked", "id-live")


def test_callers_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens are used, memory has a bound, and every one of them works."""
    monkeypatch.setattr(authentication, "CALLER_LIMIT", 3)
    authenticator = Authenticator(Stub({f"sk-{n}": make_token(f"n{n}") for n in range(10)}), None)
    for n in [*range(10), *range(10)]:
        caller = authenticator.peek([f"sk-{n}".encode()])
        assert isinstance(caller, Caller)
        assert caller.user.display_name == f"n{n}"
        assert 1 <= len(authenticator._callers) <= 3


def test_wrong_secrets_are_not_remembered() -> None:
    """Nobody can fill a server's memory by guessing."""
    authenticator = Authenticator(MemoryTokenStore(), KEY_SETTING)
    for n in range(100):
        authenticator.peek([f"sk-{n}".encode()])
    assert authenticator._callers == {}


def test_the_anonymous_caller_has_no_rights() -> None:
    """Where no token is asked for, the application sees Starlette's unauthenticated user without scopes."""
    assert isinstance(ANONYMOUS.user, UnauthenticatedUser)
    assert not ANONYMOUS.user.is_authenticated
    assert ANONYMOUS.auth.scopes == []


def test_users_and_authenticators_hold_no_secret(keep: Keep) -> None:
    """Objects that end in a log or a traceback give no secret away."""
    store = MemoryTokenStore()
    token, secret = keep(store, "ci", datetime.now(UTC) + timedelta(days=1))
    authenticator = Authenticator(store, KEY_SETTING)
    caller = authenticator.peek([secret.encode()])
    assert isinstance(caller, Caller)
    assert repr(caller.user) == f"TokenUser(identity={token.id!r}, display_name='ci')"
    seen = repr([caller, vars(authenticator), vars(store), vars(caller.auth)])
    assert secret not in seen
    assert KEY not in seen
