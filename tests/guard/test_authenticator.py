"""Decisions: the modes, the environment key, the token source, and the caller that an application finds."""

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
from freegpt_auth.guard.authenticator import Authenticator
from freegpt_auth.guard.callers import ANONYMOUS, Caller
from freegpt_auth.guard.credentials import Presented
from freegpt_auth.guard.refusal import Decision, Refusal
from freegpt_auth.stores.base import CompleteSource
from freegpt_auth.tokens import digest_of

KEY = "the-environment-key"
EMPTY = '{"version": 1, "tokens": []}'
KEY_SETTING = EnvironmentKey(digest_of(KEY), "FREEGPT_API_KEY")
NOW = datetime(2024, 5, 1, tzinfo=UTC)
FILE = Path("api_tokens.json")

Keep = Callable[..., tuple[Token, str]]


class Stub(CompleteSource):
    """A source with prepared answers, by the secret: an unresolved one is *later* in the store.

    Attributes:
        seconds: its time, after the expiry of :data:`EXPIRED`.
        stamp: its state.
        peeks: number of its look-ups in memory.
    """

    seconds, peeks = 0.0, 0
    later: Any = UNRESOLVED
    stamp: object = None

    def __init__(self, answers: dict[str, Any], *, configured: bool = True) -> None:
        self.configured = configured
        self.answers = {digest_of(secret): answer for secret, answer in answers.items()}

    def now(self) -> float:
        """Return its own time."""
        return NOW.timestamp() + self.seconds

    def state(self) -> object:
        """Return the prepared state."""
        return self.stamp

    def peek(self, digest: bytes) -> Any:
        """Return the prepared answer."""
        self.peeks += 1
        answer = self.answers.get(digest)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def resolve(self, digest: bytes) -> Any:
        """Return the prepared answer of the store."""
        answer = self.peek(digest)
        return self.later if answer is UNRESOLVED else answer

    def survey(self) -> Survey:
        """Return the prepared survey."""
        self.peek(b"")
        return Survey(self.configured, active=1, source="a stub")


def make_token(name: str = "live", **fields: Any) -> Token:
    """Return a token as a store would hold it."""
    return Token(**{"id": f"id-{name}", "name": name, "prefix": "sk-", "created_at": NOW, **fields})


LIVE = make_token(scopes=("read", "write"))
REVOKED = make_token("revoked", revoked_at=NOW)
EXPIRED = make_token("expired", expires_at=NOW)
BROKEN = StoreUnavailableError("the disk is gone")


def scope_of(secret: str) -> dict[str, Any]:
    """Return the scope of a request with a secret."""
    return {"headers": [(b"x-api-key", secret.encode())]}


def presenting(*secrets: str) -> Presented:
    """Return the credentials of a request with these secrets."""
    return Presented([digest_of(secret) for secret in secrets])


def over(answers: dict[str, Any]) -> tuple[Stub, Authenticator]:
    """Return a source with these answers, and an authenticator over it with an environment key."""
    stub = Stub(answers)
    return stub, Authenticator(stub, KEY_SETTING)


def decide(authenticator: Authenticator, *secrets: str) -> Decision:
    """Decide from memory as the middleware does: a single secret may be recognised."""
    known = authenticator.recognise(scope_of(secrets[0]))[0] if len(secrets) == 1 else None
    return known or authenticator.peek(presenting(*secrets))


def passes(authenticator: Authenticator) -> list[bool]:
    """Return whether a request without credentials passes, by memory and by the store."""
    nothing = Presented([])
    return [decision is ANONYMOUS for decision in (authenticator.peek(nothing), authenticator.resolve(nothing))]


@pytest.mark.parametrize(
    ("content", "key", "mode", "line"),
    [
        (None, None, "open", "WARNING open mode: every request is let through, .* run: .* create NAME"),
        ("{}", None, "open", "WARNING open mode"),
        ("{}", KEY_SETTING, "environment", "INFO environment mode: 0 active .* the .* key from FREEGPT_API_KEY"),
        (EMPTY, None, "token-file", r"INFO token-file mode: 0 active token\(s\) from .*s\.json.* no environment key"),
        ("not JSON", KEY_SETTING, "token-file", "INFO token-file mode: .* the environment key from FREEGPT_API_KEY"),
    ],
)
def test_mode_is_found_at_the_start(
    caplog: pytest.LogCaptureFixture, content: str | None, key: EnvironmentKey | None, mode: str, line: str
) -> None:
    """A server is open only where nothing at all is configured and nothing is required; one line in the log says so."""
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
    """With a named file that is missing or blank only the key is accepted, and the log names the remedy."""
    if content is not None:
        FILE.touch(0o600)
        FILE.write_text(content)
    authenticator = Authenticator(FileTokenStore(FILE), key, required=True, named=True)
    origin = "the environment key from FREEGPT_API_KEY" if key else "no environment key"
    file = FILE.absolute()
    line = f"token-file mode: {file} is missing or holds no tokens, so requests are refused (there is {origin})"
    remedy = f"To create a first token, run: python -m freegpt_auth --store {file} create NAME"
    assert caplog.record_tuples == [("freegpt_auth", logging.WARNING, f"{line}. {remedy}")]
    assert not any(passes(authenticator))
    assert isinstance(authenticator.resolve(presenting(KEY)), Caller) is (key is not None)
    _, secret = keep(FileTokenStore(FILE))
    assert isinstance(authenticator.resolve(presenting(secret)), Caller)


@pytest.mark.parametrize("content", [None, "", '{"version": 2}'])
def test_closed_server_never_opens_again(keep: Keep, caplog: pytest.LogCaptureFixture, content: str | None) -> None:
    """The first token, or a file that cannot be read, closes an open server for good, even if the file goes away."""
    authenticator = Authenticator(FileTokenStore(FILE), None)
    assert all(passes(authenticator))
    if content is None:
        keep(FileTokenStore(FILE))
        assert authenticator.peek(Presented([])) is UNRESOLVED
    else:
        FILE.write_text(content)
    assert authenticator.resolve(Presented([])) == Refusal("missing")
    assert not any(passes(authenticator))
    FILE.unlink()
    assert not any(passes(authenticator))
    assert authenticator.mode is AuthMode.TOKEN_FILE
    assert caplog.text.count(f"is now on: {int(content is None)} active token(s) from") == 1


def test_closing_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """However many requests survey the first token at the same moment, authentication is reported once."""
    together = threading.Barrier(8)

    class Simultaneous(Stub):
        def survey(self) -> Survey:
            if self.configured:
                together.wait(10)
            return super().survey()

    source = Simultaneous({}, configured=False)
    authenticator = Authenticator(source, None)
    source.configured = True
    with ThreadPoolExecutor(together.parties) as threads:
        refusals = threads.map(authenticator.resolve, [Presented([])] * together.parties)
        assert [*refusals] == [Refusal("missing")] * together.parties
    assert caplog.messages[1:] == ["authentication is now on: 1 active token(s) from a stub"]


def test_first_token_closes_before_the_survey(keep: Keep) -> None:
    """While one request surveys the first token, memory lets no other pass."""
    store = FileTokenStore(FILE)
    authenticator = Authenticator(store, None)
    assert authenticator.peek(Presented([])) is ANONYMOUS
    keep(FileTokenStore(FILE))
    assert store.survey().configured
    assert authenticator.mode is AuthMode.OPEN
    assert authenticator.peek(Presented([])) is UNRESOLVED


def test_fault_lets_no_request_pass_an_open_server() -> None:
    """An open server whose store cannot be read refuses: neither memory nor a failed survey lets a request pass."""
    stub = Stub({}, configured=False)
    authenticator = Authenticator(stub, None)
    stub.answers[b""] = BROKEN
    assert authenticator.peek(Presented([])) is UNRESOLVED
    assert not any(passes(authenticator))


@pytest.mark.parametrize(
    ("token", "refused", "token_id"),
    [(LIVE, False, LIVE.id), (EXPIRED, False, None), (REVOKED, True, None), (BROKEN, False, None), (None, False, None)],
)
def test_key_that_is_a_token(token: Any, token_id: str | None, *, refused: bool) -> None:
    """A key that is an active token is that token, so its use is counted; a revoked token is refused as a key too.

    No other fault of the token or the store turns the key off.
    """
    stub, authenticator = over({KEY: token})
    for _ in range(2):
        decision = decide(authenticator, KEY)
        assert isinstance(decision, Caller) is not refused
        assert decision == (Refusal("revoked", REVOKED.id) if refused else authenticator.resolve(presenting(KEY)))
        assert isinstance(decision, Refusal) or decision.token_id == token_id
    stub.answers[digest_of(KEY)] = REVOKED
    assert decide(authenticator, KEY) == Refusal("revoked", REVOKED.id)


@pytest.mark.parametrize("reader", ["start", "request", "request with the key"])
@pytest.mark.parametrize("fate", ["missing", "restored", "broken"])
def test_revoked_key_stays_refused(keep: Keep, fate: str, reader: str) -> None:
    """A process that has read the revocation of the key refuses the key, also after every later change of the file."""
    store = FileTokenStore(FILE)
    token, secret = keep(store)
    before = FILE.read_bytes()
    if reader == "start":
        store.revoke(token.id, NOW)
    authenticator = Authenticator(FileTokenStore(FILE), EnvironmentKey(digest_of(secret), "FREEGPT_API_KEY"))
    if reader != "start":
        assert isinstance(authenticator.resolve(presenting(secret)), Caller)
        store.revoke(token.id, NOW)
        authenticator.resolve(presenting("another" if reader == "request" else secret))
    FILE.unlink()
    if fate != "missing":
        FILE.write_bytes(before if fate == "restored" else b"")
    for _ in range(2):
        assert authenticator.resolve(presenting(secret)) == Refusal("revoked", token.id)
        # A file changed this recently is read again.
        assert decide(authenticator, secret) in {Refusal("revoked", token.id), UNRESOLVED}
    assert authenticator.recognise(scope_of(secret))[0] is None


@pytest.mark.parametrize("secret", ["sk-live", KEY])
@pytest.mark.parametrize(("stamps", "peeks"), [([object(), object()], 1), ([None], 3)])
def test_one_state_needs_one_look_up(stamps: list[object], peeks: int, secret: str) -> None:
    """While the source's state is the same object, an accepted secret is not looked up; without one it always is."""
    stub, authenticator = over({"sk-live": LIVE})
    assert isinstance(decide(authenticator, secret), Caller)
    for stub.stamp in stamps:
        stub.peeks = 0
        assert [isinstance(decide(authenticator, secret), Caller) for _ in range(3)] == [True] * 3
        assert stub.peeks == peeks
    stub.stamp, stub.answers[digest_of(secret)] = object(), REVOKED
    assert decide(authenticator, secret) == Refusal("revoked", REVOKED.id)


@pytest.mark.parametrize("secret", [KEY, "sk-live"])
def test_accepted_caller_is_named(secret: str) -> None:
    """An application finds the name, the id and the scopes of its caller, never the secret, and cannot change them."""
    _, authenticator = over({"sk-live": LIVE})
    caller = decide(authenticator, secret)
    assert isinstance(caller, Caller)
    token, user = caller.token, caller.user
    assert token is (None if secret == KEY else LIVE)
    name, identity = (token.name, token.id) if token else ("environment", "environment")
    assert (user.is_authenticated, user.display_name, user.identity) == (True, name, identity)
    assert repr(user) == f"TokenUser(identity={identity!r}, display_name={name!r})"
    assert caller.auth.scopes == ("authenticated", *(token.scopes if token else ()))  # type: ignore[comparison-overlap]
    assert ANONYMOUS.auth.scopes == ()  # type: ignore[comparison-overlap]
    assert decide(authenticator, secret) is caller
    with pytest.raises(AttributeError, match=r"replace request.scope\['auth'\] instead"):
        caller.auth.scopes = ["admin"]  # all callers with the same scopes share it


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
def test_refusal_has_a_reason(token: Any, refusal: Refusal) -> None:
    """The log can say why a request was refused; an unavailable store comes first, in whichever order."""
    stub, authenticator = over({"sk-1": token, "sk-broken": BROKEN})
    assert decide(authenticator, "sk-1") == authenticator.resolve(presenting("sk-1")) == refusal
    for secrets in (("sk-1", "sk-broken"), ("sk-broken", "sk-1")):
        assert decide(authenticator, *secrets) == Refusal("unavailable")
    stub.answers[b""] = LIVE  # the digest of a value over 4 KB, which no source is asked for
    for presented, reason in [
        (Presented([]), "missing"),
        (Presented([b""]), "unknown"),
        (Presented([b""], "quoted"), "quoted"),
        (Presented([], "malformed"), "malformed"),
    ]:
        assert authenticator.peek(presented) == Refusal(reason)  # type: ignore[arg-type]


def test_expiry_is_checked_on_every_request() -> None:
    """A token that was accepted a moment ago is refused from its expiry on, by the clock of its source."""
    stub, authenticator = over({"sk-1": EXPIRED})
    stub.stamp = object()
    for stub.seconds, refused in [(-0.001, False), (0.0, True), (1.0, True), (-0.001, False)]:
        assert isinstance(decide(authenticator, "sk-1"), Refusal) is refused


@pytest.mark.parametrize("wrong", [None, REVOKED, EXPIRED, BROKEN, UNRESOLVED])
@pytest.mark.parametrize("right", ["sk-live", KEY])
def test_any_verified_secret_is_enough(wrong: Any, right: str) -> None:
    """A client that sends a valid token and something else passes, in whichever order it sends them."""
    _, authenticator = over({"sk-live": LIVE, "sk-wrong": wrong})
    for secrets in (("sk-wrong", right), (right, "sk-wrong")):
        assert isinstance(decide(authenticator, *secrets), Caller)


@pytest.mark.parametrize("other", [None, REVOKED, EXPIRED, BROKEN])
def test_unresolved_secret_is_left_to_the_store(other: Any) -> None:
    """A token that is not in memory is looked up, also beside other credentials; without an answer it is refused."""
    stub, authenticator = over({"sk-later": UNRESOLVED, "sk-other": other})
    assert authenticator.resolve(presenting("sk-later")) == Refusal("unavailable")
    stub.later = LIVE
    for presented in (presenting("sk-later", "sk-other"), presenting("sk-other", "sk-later")):
        assert authenticator.peek(presented) is UNRESOLVED
        assert isinstance(authenticator.resolve(presented), Caller)


def test_changed_token_changes_its_caller() -> None:
    """The application finds a changed record of a token at the next request; an unreadable one is refused."""
    stub, authenticator = over({"sk-1": LIVE})
    for token in (LIVE, make_token(scopes=("delete",))):
        stub.answers[digest_of("sk-1")] = token
        caller = decide(authenticator, "sk-1")
        assert isinstance(caller, Caller)
        assert tuple(caller.auth.scopes) == ("authenticated", *token.scopes)
    stub.answers[digest_of("sk-1")] = BROKEN
    assert decide(authenticator, "sk-1") == Refusal("unavailable")


@pytest.mark.parametrize(("cache_limit", "caller_limit"), [(3, 100), (100, 3)])
def test_callers_are_bounded(cache_limit: int, caller_limit: int) -> None:
    """However many tokens are used, memory has a bound and each of them works; wrong ones are not remembered."""
    stub = Stub({f"sk-{n}": make_token(f"n{n}") for n in range(10)})
    stub.cache_limit = cache_limit
    authenticator = Authenticator(stub, None, caller_limit=caller_limit)
    decide(authenticator, "sk-wrong")
    for n in [*range(10), *range(10)]:
        caller = decide(authenticator, f"sk-{n}")
        assert isinstance(caller, Caller)
        assert caller.user.display_name == f"n{n}"
        assert sum(authenticator.recognise(scope_of(f"sk-{each}"))[0] is not None for each in range(10)) <= 3
