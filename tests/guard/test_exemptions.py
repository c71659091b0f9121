"""Requests that need no credentials. test_middleware.py and attacks/test_bypasses.py send them to applications."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from freegpt_auth.guard.exemptions import is_public

CHOSEN = {"path": "/v1/files/health", "root_path": "/v1/files"}
MOUNTED = {"path": "/llm/health", "root_path": "/llm", "app_root_path": ""}
BEHIND_A_ROOT = {"path": "/root/llm/health", "root_path": "/root/llm", "app_root_path": "/root"}
UNMOVED = {"path": "/health", "root_path": "/v1/files"}
HEADER = [(b"daphne-root-path", b"/v1/files")]


@pytest.mark.parametrize(
    ("scope", "headers", "daphne", "public"),
    [
        (CHOSEN, [], False, True),
        (CHOSEN, [], True, False),
        (CHOSEN, HEADER, False, False),
        (BEHIND_A_ROOT, [], False, True),
        (BEHIND_A_ROOT, [], True, False),
        (MOUNTED, [], True, True),
        (UNMOVED, [], True, False),
        (UNMOVED, [], False, True),
        ({"path": "/health"}, HEADER, False, True),
        ({"path": "/health", "root_path": "/he"}, [], False, True),
    ],
)
def test_clients_choose_no_root_path(
    monkeypatch: pytest.MonkeyPatch, scope: dict[str, Any], headers: Any, *, daphne: bool, public: bool
) -> None:
    """A mount point is removed in whole segments; behind daphne, where clients choose one, only the application's own."""
    monkeypatch.delitem(sys.modules, "daphne.server", raising=False)
    if daphne:
        monkeypatch.setitem(sys.modules, "daphne.server", ModuleType("daphne.server"))
    assert is_public({**scope, "headers": headers}, {"/health"}) is public
