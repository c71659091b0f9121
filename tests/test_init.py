"""The public names, and the cost of importing them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import freegpt_auth

if TYPE_CHECKING:
    from pathlib import Path

# An import may read files of the interpreter and of installed packages, this package among them.
WATCH = """
import json, os, site, sys, sysconfig
folders = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *site.getsitepackages(), PACKAGE}
folders = tuple(os.path.realpath(folder) + os.sep for folder in folders)
opened, others, before = [], [], set(sys.modules)
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        path = os.path.realpath(arguments[0])
        if not path.startswith(folders):
            opened.append(path)
    elif event in ("socket.__new__", "subprocess.Popen", "sqlite3.connect"):
        others.append(event)
sys.addaudithook(watch)
IMPORT
print(json.dumps({"opened": list(opened), "others": list(others), "modules": sorted(set(sys.modules) - before)}))
"""
NAMES = """
    UNRESOLVED AuthMode BearerTokenMiddleware ConfigurationError FileTokenStore FreeGPTAuthError MemoryTokenStore
    Settings StoreError StoreUnavailableError Survey Token TokenSource TokenStore TokenUser
"""


def watched(statements: str) -> Any:
    """Run statements in a process of its own; return the files they opened and the modules they loaded."""
    program = WATCH.replace("PACKAGE", repr(freegpt_auth.__path__[0])).replace("IMPORT", statements)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_the_public_names() -> None:
    """This is the whole public surface: a change of it is a decision. One except clause catches every error."""
    assert freegpt_auth.__all__ == NAMES.split()
    for name in freegpt_auth.__all__:
        value = freegpt_auth.__getattr__(name)
        assert value is vars(freegpt_auth)[name]  # found at once from now on
        assert getattr(value, "__name__", name) == name
        assert not name.endswith("Error") or issubclass(value, freegpt_auth.FreeGPTAuthError)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A mistyped name fails as it does in any module."""
    with pytest.raises(AttributeError, match="module 'freegpt_auth' has no attribute 'core'"):
        freegpt_auth.core  # noqa: B018


def test_the_commands_do_not_import_the_server_side() -> None:
    """A command starts quickly: it waits for no web framework and no event loop to be imported."""
    modules = watched("import freegpt_auth.cli")["modules"]
    assert "freegpt_auth.cli" in modules
    assert not {"starlette", "anyio", "asyncio", "filelock", "sqlite3"} & set(modules)


def test_importing_touches_nothing(tmp_path: Path) -> None:
    """Importing every name of the package opens no file but code, no socket and no database."""
    seen = watched("from freegpt_auth import *")
    assert "starlette" in seen["modules"]
    assert (seen["opened"], seen["others"]) == ([], [])
    file = tmp_path / "api_tokens.json"  # a check of the audit hook itself
    seen = watched(f"import sqlite3\nopen({str(file)!r}, 'w').close()\nsqlite3.connect(':memory:').close()")
    assert (seen["opened"], seen["others"]) == ([str(file.resolve())], ["sqlite3.connect"])
