"""Tokens and their usage in PostgreSQL, for servers on several hosts; with the extra ``freegpt-auth[postgres]``."""

from __future__ import annotations

from .store import PostgresTokenStore

__all__ = ["PostgresTokenStore"]
