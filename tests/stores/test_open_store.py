"""How a location names a store."""

from __future__ import annotations

from pathlib import Path

import pytest

from freegpt_auth import ConfigurationError, FileTokenStore
from freegpt_auth.stores import open_store


@pytest.mark.parametrize("location", ["api_tokens.json", "missing folder/t.json", "C:/x"])
def test_a_path_names_a_token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str) -> None:
    """Whatever is no URL is the path of a token file in the directory of that moment; opening it touches nothing."""
    store = open_store(location)
    monkeypatch.chdir("/")
    assert isinstance(store, FileTokenStore)
    assert Path(store.path) == tmp_path / location
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("location", ["postgresql://user:hunter2@db/x", "file:///t.json", "://x"])
def test_a_url_of_no_known_store_is_a_configuration_error(location: str) -> None:
    """A store that this version does not know stops the server, and the password in its URL is not repeated."""
    with pytest.raises(ConfigurationError, match="names no store of this version; give the path") as caught:
        open_store(location)
    assert "hunter2" not in str(caught.value)
