"""The caller in the scope of the application."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from freegpt_auth import Token
from freegpt_auth.guard.callers import ANONYMOUS, Caller, caller_of, environment_caller

NOW = datetime(2025, 11, 26, tzinfo=UTC)
TOKEN = Token(id="id", name="a name", prefix="sk-", created_at=NOW, expires_at=NOW, scopes=("read", "write"))
DIGEST, STORE = b"d" * 32, object()


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
def test_applications_cannot_widen_scopes(caller: Caller) -> None:
    """The scopes of one request cannot be changed for later requests, nor for other callers with the same scopes."""
    with pytest.raises(AttributeError):
        caller.auth.scopes.append("admin")
    with pytest.raises(AttributeError, match=r"replace request.scope\['auth'\] instead"):
        caller.auth.scopes = ["admin"]
