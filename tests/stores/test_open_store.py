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


@pytest.mark.parametrize("location", ["mysql://user:hunter2@db/x", "postgresql:/u:hunter2@h/d"])
def test_address_of_no_known_store_is_refused(location: str) -> None:
    """A store that this version does not know stops the server, and the password in its URL is not repeated."""
    for opened in (open_store, open_usage):
        with pytest.raises(ConfigurationError, match=r"names no store of this version|resembles the address") as caught:
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


@pytest.mark.parametrize("url", ["postgresql://u:hunter2@[h/d", "postgresql://u:hunter2@h/d?what=ever"])
def test_unreadable_url_is_a_configuration_error(url: str) -> None:
    """A slip in the URL stops the server or the command, says how to write one and repeats nothing of it."""
    for opened in (open_store, open_usage):
        with pytest.raises(
            ConfigurationError, match="the URL of the store cannot be read: write postgresql://"
        ) as caught:
            opened(url)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments", [["list"], ["create", "ci"], ["migrate"], ["copy", "t.json", "postgresql://u:hunter2@h/d"]]
)
def test_command_without_driver_explains(arguments: list[str]) -> None:
    """Without the extra a command with a database ends in one line that names the package; a file needs none."""
    hidden = "import sys; sys.modules['psycopg'] = None; from freegpt_auth.cli import main; sys.exit(main())"
    program = [sys.executable, "-c", hidden]
    store = [] if arguments[0] == "copy" else ["--store", "postgresql://u:hunter2@h/d"]
    done = subprocess.run([*program, *store, *arguments], capture_output=True, text=True, timeout=30, check=False)
    said = "freegpt-auth: a store in PostgreSQL needs a driver: run pip install 'freegpt-auth[postgres]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)
    done = subprocess.run([*program, "list"], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (0, "No tokens found.\n")


@pytest.mark.parametrize("opened", ["BearerTokenMiddleware(None)", "open_usage('postgresql://h/d')"])
def test_server_without_driver_does_not_start(monkeypatch: pytest.MonkeyPatch, opened: str) -> None:
    """A server with a database and without its driver stops at once instead of guarding nothing."""
    monkeypatch.setenv("FREEGPT_AUTH_STORE", "postgresql://u:hunter2@h/d")
    hidden = (
        "import sys; sys.modules['psycopg'] = None; from freegpt_auth import BearerTokenMiddleware;"
        f"from freegpt_auth.stores import open_usage; {opened}"
    )
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "ConfigurationError: a store in PostgreSQL needs a driver" in done.stderr
    assert "hunter2" not in done.stderr
