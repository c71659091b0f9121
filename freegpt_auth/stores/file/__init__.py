"""Tokens in a JSON file on one host, and their usage in a SQLite database beside the file.

::

    store           FileTokenStore, the entry point of servers and commands
    servers read    snapshot (one state of the file) -> table (tokens in memory, loaded in steps) -> decoding
    commands write  editing (under the lock) -> document (the file being changed) -> decoding
    the format      decoding (bytes to tokens) · faults (the reason why bytes are no token file)
    any file        disk (read, replace) · access · timestamps · lock · reserve (of file descriptors)
    restarts        worker_notes
    usage           usage (UsageDatabase) · usage_schema · usage_header (is it our database?) · usage_faults
"""

from __future__ import annotations

from .store import FileTokenStore

__all__ = ["FileTokenStore"]
