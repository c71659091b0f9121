"""Look-ups in a partly cached table while the database does not answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from freegpt_auth.exceptions import StoreUnavailableError
from freegpt_auth.stores.postgres import PostgresTokenStore

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("error", [psycopg.OperationalError("gone"), StoreUnavailableError("is slow")])
def test_failed_look_up_pauses_the_others(
    database: str, keep: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """After a look-up that failed the others are answered at once, and after a moment the database is asked again."""
    store = PostgresTokenStore(database, cache_limit=1)
    asked: list[object] = []

    def fail(question: object) -> None:
        asked.append(question)
        raise error

    try:
        for _ in range(3):
            keep(store)
        assert store.resolve(b"unknown") is None
        with monkeypatch.context() as broken:
            broken.setattr(store._pool, "run", fail)
            for _ in range(100):
                with pytest.raises(StoreUnavailableError, match=f"{error}|a moment ago"):
                    store.resolve(b"unknown")
        assert len(asked) <= 2
        monkeypatch.setattr(store, "_paused_until", 0.0)
        assert store.resolve(b"unknown") is None
    finally:
        store.close()
