"""Requests that need no credentials. attacks/test_bypasses.py sends more of them to real servers."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from freegpt_auth.guard.exemptions import is_preflight, is_public

NAMES = [b"host", b"x-original-url", b"x-rewrite-url", b"x-forwarded-prefix", b"x-forwarded-path", b"referer"]


@pytest.mark.parametrize(
    ("root", "public", "guarded"),
    [
        ("", "/health", "/health/ /healthsecret /health/../v1/models //health /HEALTH /v1/health health / /api/health"),
        ("", "/health", "/health%2f /health\x00 /health;x /health?x"),
        ("/api", "/api/health /health", "/api/health/ /apihealth /apix/health /api/api/health /api"),
    ],
)
def test_public_paths_are_exact(root: str, public: str, guarded: str) -> None:
    """A public path opens itself and no other, with or without a mount point, for any headers and query."""
    scope = {"root_path": root, "headers": [(name, b"/health") for name in NAMES], "query_string": b"/health"}
    paths = [*public.split(), *guarded.split(), ""]
    assert [path for path in paths if is_public({**scope, "path": path}, {"/health"})] == public.split()


@pytest.mark.parametrize(
    ("path", "roots", "header", "daphne", "public"),
    [
        ("/v1/files/health", ["/v1/files"], False, False, True),
        ("/v1/files/health", ["/v1/files"], False, True, False),
        ("/v1/files/health", ["/v1/files"], True, False, False),
        ("/root/llm/health", ["/root/llm", "/root"], False, False, True),
        ("/root/llm/health", ["/root/llm", "/root"], False, True, False),
        ("/llm/health", ["/llm", ""], False, True, True),
        ("/health", ["/v1/files"], False, True, False),
        ("/health", ["/v1/files"], False, False, True),
        ("/health", [], True, False, True),
        ("/health", ["/he"], False, False, True),
    ],
)
def test_clients_choose_no_root_path(
    monkeypatch: pytest.MonkeyPatch, path: str, roots: list[str], *, header: bool, daphne: bool, public: bool
) -> None:
    """Mount points are removed in whole segments; behind daphne, where clients can name one, only the app's own."""
    monkeypatch.delitem(sys.modules, "daphne.server", raising=False)
    if daphne:
        monkeypatch.setitem(sys.modules, "daphne.server", ModuleType("daphne.server"))
    headers = [(b"daphne-root-path", b"/v1/files")] * header
    scope = {"path": path, "headers": headers, **dict(zip(("root_path", "app_root_path"), roots, strict=False))}
    assert is_public(scope, {"/health"}) is public


@pytest.mark.parametrize(
    ("kind", "method", "names", "passes"),
    [
        ("http", "OPTIONS", "origin access-control-request-method authorization", True),
        ("http", "OPTIONS", "origin", False),
        ("http", "OPTIONS", "access-control-request-method", False),
        ("http", "POST", "origin access-control-request-method", False),
        ("http", "options", "origin access-control-request-method", False),
        ("websocket", "OPTIONS", "origin access-control-request-method", False),
    ],
)
def test_only_a_preflight_passes(kind: str, method: str, names: str, *, passes: bool) -> None:
    """A browser's question carries no token; an ordinary OPTIONS, or a method dressed up as a preflight, needs one."""
    headers = [(name.encode(), b"https://ui.test") for name in names.split()]
    assert is_preflight({"type": kind, "method": method, "headers": headers}) is passes
