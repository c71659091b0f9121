"""Tokens in a JSON file on one host, and their usage in a SQLite database beside the file."""

from __future__ import annotations

from .store import FileTokenStore

__all__ = ["FileTokenStore"]
