"""The one clock of a fleet is the database's."""

from __future__ import annotations

import time

import pytest

from freegpt_auth.exceptions import StoreUnavailableError
from freegpt_auth.stores.postgres import PostgresTokenStore
from tests.helpers.ports import free_port


def test_time_is_the_databases_from_the_start(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command at a host whose clock is wrong makes tokens that end when they are to end."""
    right = time.time()
    monkeypatch.setattr(time, "time", lambda: right - 300)
    assert 0 <= PostgresTokenStore(database).now() - right < 60


def test_a_time_that_cannot_be_known_is_not_made_up() -> None:
    """Where the database cannot be asked no token is made or judged by another clock."""
    store = PostgresTokenStore(f"postgresql://127.0.0.1:{free_port()}/tokens")
    with pytest.raises(StoreUnavailableError, match="does not answer"):
        store.now()
