"""How a location names a store."""

from __future__ import annotations

from pathlib import Path

import pytest

from freegpt_auth import ConfigurationError, FileTokenStore
from freegpt_auth.stores import open_store


@pytest.mark.parametrize(
    "location", ["api_tokens.json", "a folder/t.json", "../t.json", "C:/x", "a:b", "//double/t.json"]
)
def test_a_path_names_a_token_file(location: str) -> None:
    """Whatever is no URL is the path of a token file."""
    store = open_store(location)
    assert isinstance(store, FileTokenStore)
    assert Path(store.path) == Path(location).absolute() or ".." in location


def test_a_relative_path_is_of_the_directory_of_that_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that changes its directory goes on reading the same file."""
    store = open_store("api_tokens.json")
    assert isinstance(store, FileTokenStore)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert store.path == str(tmp_path / "api_tokens.json")


def test_opening_touches_nothing(tmp_path: Path) -> None:
    """Naming a store neither reads nor makes a file: not even a missing folder is noticed."""
    open_store(str(tmp_path / "missing" / "api_tokens.json"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("location", ["postgresql://user:hunter2@db/x", "file:///t.json", "redis://", "://x"])
def test_a_url_of_no_known_store_is_a_configuration_error(location: str) -> None:
    """A store that this version does not know stops the server, and the password in its URL is not repeated."""
    with pytest.raises(ConfigurationError, match="names no store of this version; give the path") as caught:
        open_store(location)
    assert "hunter2" not in str(caught.value)
