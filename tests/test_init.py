"""The public names, and what importing them costs."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import freegpt_auth

if TYPE_CHECKING:
    from pathlib import Path

# Files of the interpreter and of installed packages, the package's own among them, are what an import reads.
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


def watched(statements: str) -> Any:
    """Run statements in a process of its own; return what they opened and which modules came with them."""
    program = WATCH.replace("PACKAGE", repr(freegpt_auth.__path__[0])).replace("IMPORT", statements)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_the_public_names_are_few_and_sorted() -> None:
    """The public surface is small, and this is all of it: adding or losing a name is a decision."""
    assert freegpt_auth.__all__ == sorted(freegpt_auth.__all__, key=lambda name: (not name.isupper(), name))
    assert len(freegpt_auth.__all__) == len(set(freegpt_auth.__all__)) <= 15
    assert set(freegpt_auth.__all__) == {
        "AuthMode",
        "BearerTokenMiddleware",
        "ConfigurationError",
        "FileTokenStore",
        "FreeGPTAuthError",
        "MemoryTokenStore",
        "Settings",
        "StoreError",
        "StoreUnavailableError",
        "Survey",
        "Token",
        "TokenStore",
        "TokenUser",
        "UNRESOLVED",
        "Verifier",
    }


@pytest.mark.parametrize("name", freegpt_auth.__all__)
def test_every_public_name_is_there(name: str) -> None:
    """What __all__ promises can be had, and is the same thing at every access."""
    value = freegpt_auth.__getattr__(name)
    assert value is getattr(freegpt_auth, name)
    assert getattr(value, "__name__", name) == name


@pytest.mark.parametrize("name", ["Nothing", "core", "__wrapped__"])
def test_an_unknown_name_is_an_attribute_error(name: str) -> None:
    """A mistyped name fails as it does in any module."""
    with pytest.raises(AttributeError, match=f"module 'freegpt_auth' has no attribute '{name}'"):
        getattr(freegpt_auth, name)


@pytest.mark.parametrize("name", [name for name in freegpt_auth.__all__ if name.endswith("Error")])
def test_every_error_has_one_base(name: str) -> None:
    """One except clause catches everything that this library raises on purpose."""
    assert issubclass(getattr(freegpt_auth, name), freegpt_auth.FreeGPTAuthError)


@pytest.mark.parametrize("module", ["freegpt_auth", "freegpt_auth.cli"])
def test_the_commands_do_not_import_the_server_side(module: str) -> None:
    """A command starts quickly: it waits for no web framework and no event loop to be imported."""
    modules = watched(f"import {module}")["modules"]
    assert module in modules
    assert not {"starlette", "anyio", "asyncio", "filelock", "sqlite3"} & set(modules)


def test_importing_touches_nothing() -> None:
    """Importing the package, and every name of it, opens no file but code, no socket and no database."""
    seen = watched("import freegpt_auth.cli\nfrom freegpt_auth import *")
    assert "starlette" in seen["modules"]
    assert seen["opened"] == []
    assert seen["others"] == []


def test_the_watch_sees_what_it_looks_for(tmp_path: Path) -> None:
    """The two tests above would notice a file or a database that an import opened."""
    file = tmp_path / "api_tokens.json"
    seen = watched(f"import sqlite3\nopen({str(file)!r}, 'w').close()\nsqlite3.connect(':memory:').close()")
    assert seen["opened"] == [str(file.resolve())]
    assert seen["others"] == ["sqlite3.connect"]
