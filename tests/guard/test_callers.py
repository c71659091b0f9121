"""What the application is told of its caller."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from freegpt_auth import Token
from freegpt_auth.guard.callers import ANONYMOUS, NEVER, caller_of, environment_caller

NOW = datetime(2025, 11, 26, tzinfo=UTC)
TOKEN = Token(id="id", name="a name", prefix="sk-", created_at=NOW, expires_at=NOW, scopes=("read", "write"))
DIGEST, STORE = b"d" * 32, object()


def test_a_caller_is_a_token_in_starlettes_terms() -> None:
    """The user has the token's name and id, the credentials have its scopes, and the instant of its end is kept ready."""
    caller = caller_of(TOKEN, DIGEST, STORE)
    assert (caller.user.is_authenticated, caller.user.display_name, caller.user.identity) == (True, "a name", "id")
    assert tuple(caller.auth.scopes) == ("authenticated", "read", "write")
    assert (caller.token, caller.expires) == (TOKEN, NOW.timestamp())
    assert (caller.digest, caller.source) == (DIGEST, STORE)


def test_the_environment_key_is_a_caller_without_a_token() -> None:
    """Whoever presents the environment key is called so, and no use of a token is counted."""
    caller = environment_caller(DIGEST, STORE)
    assert (caller.user.display_name, caller.user.identity) == ("environment", "environment")
    assert (caller.token, caller.expires) == (None, NEVER)
    assert (caller.digest, caller.source) == (DIGEST, STORE)


def test_callers_hide_the_digest() -> None:
    """The digest, from which a key that a person chose could be guessed, stands in no log or traceback of a scope."""
    shown = repr([caller_of(TOKEN, DIGEST, STORE), environment_caller(DIGEST, STORE)])
    assert "digest" not in shown
    assert repr(DIGEST) not in shown


@pytest.mark.parametrize(
    "caller",
    [ANONYMOUS, environment_caller(DIGEST, STORE), caller_of(TOKEN, DIGEST, STORE)],
    ids=["nobody", "key", "token"],
)
def test_an_application_cannot_widen_what_others_may(caller: object) -> None:
    """The scopes that one request is told cannot be added to for the requests after it."""
    with pytest.raises(AttributeError):
        caller.auth.scopes.append("admin")  # type: ignore[attr-defined]
