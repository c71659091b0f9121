"""What the store in memory adds to the contract."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from freegpt_auth import MemoryTokenStore
from freegpt_auth.stores.memory import count_active
from freegpt_auth.tokens import digest_of, issue

NOW = datetime.now(UTC)


def test_it_is_configured_even_when_it_is_empty() -> None:
    """A server that was given a store in memory is never open."""
    assert MemoryTokenStore().survey() == (True, 0, "memory")


def test_it_always_answers_at_once(keep: Any) -> None:
    """Memory is all there is: ``peek`` knows every token from the first call on, as the object that was put in."""
    store = MemoryTokenStore()
    token, secret = keep(store)
    assert store.peek(digest_of(secret)) is store.resolve(digest_of(secret)) is token
    assert store.peek(b"") is None


def test_two_stores_share_nothing(keep: Any) -> None:
    """A token of one application does not work in another."""
    one, other = MemoryTokenStore(), MemoryTokenStore()
    keep(one)
    assert (len(one.tokens()), len(other.tokens())) == (1, 0)


@pytest.mark.parametrize(("seconds", "active"), [(None, 1), (60, 1), (-60, 0), (-(10**10), 0)])
def test_only_what_works_now_is_counted(seconds: int | None, active: int) -> None:
    """A token that has expired, even long before this epoch, is not counted."""
    expires_at = NOW + timedelta(seconds=seconds) if seconds else None
    token, secret = issue("ci", now=NOW, expires_at=expires_at)
    assert count_active({digest_of(secret): token}) == active
