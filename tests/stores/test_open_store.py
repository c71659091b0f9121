"""How a location names a store."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from freegpt_auth import ConfigurationError, FileTokenStore
from freegpt_auth.stores import open_store, open_usage


@pytest.mark.parametrize("location", ["api_tokens.json", "missing folder/t.json", "C:/x"])
def test_a_path_names_a_token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str) -> None:
    """A location that is no URL is a path, relative to the present directory; opening touches nothing."""
    store = open_store(location)
    monkeypatch.chdir("/")
    assert isinstance(store, FileTokenStore)
    assert Path(store.path) == tmp_path / location
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("location", "problem"),
    [
        ("mysql://user:hunter2@db/x", "names no store of this version"),
        ("postgresql:/u:hunter2@h/d", "resembles the address"),
        ("postgresql://u:hunter2@[h/d", "the URL of the store cannot be read: write postgresql://"),
        ("postgresql://u:hunter2@h/d?what=ever", "the URL of the store cannot be read: write postgresql://"),
    ],
)
def test_address_of_no_store_is_refused(location: str, problem: str) -> None:
    """An unknown kind of store or a slip in a URL stops servers and commands, and its password is not repeated."""
    for opened in (open_store, open_usage):
        with pytest.raises(ConfigurationError, match=problem) as caught:
            opened(location)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("folder", ["missing", "file", "file/below"])
def test_named_file_needs_its_folder(folder: str) -> None:
    """A server whose volume is not mounted, or whose path is mistyped, does not start; a command may still look."""
    Path("file").touch()
    with pytest.raises(ConfigurationError, match=f"^the folder of the token file '{folder}/t.json' does not exist; "):
        open_store(f"{folder}/t.json", named=True)
    open_store(f"{folder}/t.json")


def test_folder_out_of_reach_is_no_missing_folder() -> None:
    """A fault that may end by itself leaves a server closed, not stopped."""
    Path("loop").symlink_to("loop")
    assert open_store("loop/t.json", named=True).survey().configured


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_a_url_of_postgresql_names_a_database(scheme: str) -> None:
    """Both usual schemes open a store and its usage with the given limits, and without a query."""
    from freegpt_auth.stores.postgres import PostgresTokenStore  # noqa: PLC0415  its driver is an extra
    from freegpt_auth.stores.postgres.usage import PostgresUsage  # noqa: PLC0415

    url = f"{scheme}://u:hunter2@db.invalid/d?sslmode=require"
    store, usage = open_store(url, lease=5.0, cache_limit=7), open_usage(url)
    assert isinstance(store, PostgresTokenStore)
    assert isinstance(usage, PostgresUsage)
    assert store.source == usage.source == "postgresql://u@db.invalid/d"
    assert (store._lease, store._cache.limit) == (5.0, 7)


WITHOUT_DRIVER = "import sys; sys.modules['psycopg'] = None; "
URL = "postgresql://u:hunter2@h/d"


def _run(program: str, *arguments: str) -> tuple[int, str, str]:
    """Run a program without the driver; return its status, its output and its errors."""
    line = [sys.executable, "-c", WITHOUT_DRIVER + program, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, done.stdout, done.stderr


def test_command_without_driver_explains() -> None:
    """Without the extra a command with a database ends in one line that names the package; a file needs none."""
    program = "from freegpt_auth.cli import main; sys.exit(main())"
    said = "freegpt-auth: a store in PostgreSQL needs a driver: run pip install 'freegpt-auth[postgres]'\n"
    for command in (f"--store {URL} list", f"--store {URL} create ci", f"--store {URL} migrate", f"copy t.json {URL}"):
        assert _run(program, *command.split()) == (1, "", said)
    assert _run(program, "list")[:2] == (0, "No tokens found.\n")


@pytest.mark.parametrize("opened", ["BearerTokenMiddleware(None)", "stores.open_usage('postgresql://h/d')"])
def test_server_without_driver_does_not_start(monkeypatch: pytest.MonkeyPatch, opened: str) -> None:
    """A server with a database and without its driver stops at once instead of guarding nothing."""
    monkeypatch.setenv("FREEGPT_AUTH_STORE", URL)
    status, _, errors = _run(f"from freegpt_auth import BearerTokenMiddleware, stores; {opened}")
    assert (status, "ConfigurationError: a store in PostgreSQL needs a driver" in errors) == (1, True)
    assert "hunter2" not in errors
