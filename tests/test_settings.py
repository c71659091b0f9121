"""What the operator decided: which variable wins, and which mistakes stop a server before it starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from freegpt_auth import ConfigurationError, Settings
from freegpt_auth.bearer import VALUE_LIMIT
from freegpt_auth.settings import FLUSH_INTERVAL, EnvironmentKey, store_location, usage_location
from freegpt_auth.tokens import digest_of

SECRET = "a-key-that-nobody-may-see"


def key_from(**environ: str) -> EnvironmentKey | None:
    """Return the environment key that an environment sets."""
    return Settings.from_env(environ=environ).key


def test_nothing_set() -> None:
    """Without any setting, tokens are in the working directory, usage beside them, and nothing is public."""
    assert Settings.from_env(environ={}) == Settings(usage="api_tokens.usage.db")
    assert Settings() == Settings("api_tokens.json", None, frozenset(), required=False, usage=None)


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is exported in the shell is what counts."""
    monkeypatch.setenv("FREEGPT_API_KEY", SECRET)
    monkeypatch.setenv("FREEGPT_AUTH_STORE", "here.json")
    settings = Settings.from_env()
    assert settings.key == EnvironmentKey(digest_of(SECRET), "FREEGPT_API_KEY")
    assert settings.store == store_location() == "here.json"
    assert usage_location("here.json") == "here.usage.db"


def test_settings_cannot_be_changed() -> None:
    """Nothing that holds a reference to the settings can open a running server."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().required = False  # type: ignore[misc]


# The key


@pytest.mark.parametrize("name", ["FREEGPT_API_KEY", "OPENAI_API_KEY"])
@pytest.mark.parametrize("value", [SECRET, f"  {SECRET}\n", f"\t{SECRET} \r\n"])
def test_a_key_is_read_without_the_white_space_round_it(name: str, value: str) -> None:
    """A line break that came with a copied key does no harm."""
    assert key_from(**{name: value}) == EnvironmentKey(digest_of(SECRET), name)


def test_our_own_variable_wins() -> None:
    """Only one key is ever accepted: FREEGPT_API_KEY, where both are set."""
    key = key_from(FREEGPT_API_KEY=SECRET, OPENAI_API_KEY="sk-the-key-of-the-upstream")
    assert key == EnvironmentKey(digest_of(SECRET), "FREEGPT_API_KEY")


def test_the_key_file_wins_over_openai(tmp_path: Path) -> None:
    """A Docker secret is preferred to the key of an upstream."""
    file = tmp_path / "secret"
    file.write_text(f"{SECRET}\n")
    key = key_from(FREEGPT_API_KEY_FILE=str(file), OPENAI_API_KEY="sk-the-key-of-the-upstream")
    assert key == EnvironmentKey(digest_of(SECRET), "FREEGPT_API_KEY_FILE")


def test_a_key_and_a_key_file_contradict_each_other(tmp_path: Path) -> None:
    """Two places for one key are a mistake, and both are named."""
    with pytest.raises(ConfigurationError, match="FREEGPT_API_KEY and FREEGPT_API_KEY_FILE are both set"):
        key_from(FREEGPT_API_KEY=SECRET, FREEGPT_API_KEY_FILE=str(tmp_path))


@pytest.mark.parametrize("value", ["", " ", "\t\r\n "])
@pytest.mark.parametrize("name", ["FREEGPT_API_KEY", "OPENAI_API_KEY", "FREEGPT_API_KEY_FILE"])
def test_set_but_empty_stops_the_start(name: str, value: str) -> None:
    """A typing error in a compose file does not open a server, and the message names the variable."""
    with pytest.raises(ConfigurationError, match=f"^{name} is set but empty"):
        key_from(**{name: value})


def test_an_empty_variable_does_not_fall_through_to_the_next() -> None:
    """An empty FREEGPT_API_KEY is a mistake even where OPENAI_API_KEY is set."""
    with pytest.raises(ConfigurationError, match=r"^FREEGPT_API_KEY is set but empty"):
        key_from(FREEGPT_API_KEY="", OPENAI_API_KEY=SECRET)


def test_an_empty_key_file_stops_the_start(tmp_path: Path) -> None:
    """A secret that was mounted but never filled does not open a server."""
    file = tmp_path / "secret"
    file.write_text(" \n")
    with pytest.raises(ConfigurationError, match=r"^FREEGPT_API_KEY_FILE is set but empty"):
        key_from(FREEGPT_API_KEY_FILE=str(file))


def test_a_key_file_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    """A secret that is not there, is a directory or is not text is said, with its path and without its content."""
    with pytest.raises(ConfigurationError, match=r"^FREEGPT_API_KEY_FILE: .*absent cannot be read: No such file"):
        key_from(FREEGPT_API_KEY_FILE=str(tmp_path / "absent"))
    with pytest.raises(ConfigurationError, match=r"^FREEGPT_API_KEY_FILE: .* cannot be read: Is a directory"):
        key_from(FREEGPT_API_KEY_FILE=str(tmp_path))
    binary = tmp_path / "binary"
    binary.write_bytes(SECRET.encode() + b"\xff")
    with pytest.raises(ConfigurationError, match=r"it is not text$") as caught:
        key_from(FREEGPT_API_KEY_FILE=str(binary))
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("key", [f"{SECRET}\x00", f"a\n{SECRET}", f"{SECRET}\x1b[m", f"{SECRET}\xa0"])
def test_a_key_that_no_client_can_send_stops_the_start(key: str) -> None:
    """A key with a control character is refused at start rather than refusing every request, and is not repeated."""
    with pytest.raises(ConfigurationError, match=r"^FREEGPT_API_KEY holds a control character") as caught:
        key_from(FREEGPT_API_KEY=key)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(("character", "size"), [("a", 1), ("\u20ac", 3)])
def test_a_key_that_is_too_long_stops_the_start(character: str, size: int) -> None:
    """A key longer than the 4 KB that are looked at could never be used; the limit counts bytes."""
    longest = VALUE_LIMIT // size
    assert key_from(OPENAI_API_KEY=character * longest) is not None
    with pytest.raises(ConfigurationError, match=r"^OPENAI_API_KEY is longer than 4096 bytes"):
        key_from(OPENAI_API_KEY=character * (longest + 1))


def test_settings_hold_no_secret() -> None:
    """A settings object can be logged."""
    settings = Settings.from_env(environ={"FREEGPT_API_KEY": SECRET})
    assert SECRET not in repr(settings)
    assert SECRET not in repr(dataclasses.asdict(settings))
    assert SECRET.encode() not in vars(settings.key).values()


# The store and the usage database


@pytest.mark.parametrize("store", ["mine.json", Path("mine.json")])
def test_the_store_argument_wins(store: str | Path) -> None:
    """What a program says wins over the environment, for the tokens and the usage beside them."""
    settings = Settings.from_env(store=store, environ={"FREEGPT_AUTH_STORE": "other.json"})
    assert settings.store == "mine.json"
    assert settings.usage == "mine.usage.db"


@pytest.mark.parametrize("arguments", [{"store": ""}, {"environ": {"FREEGPT_AUTH_STORE": " "}}])
def test_an_empty_store_stops_the_start(arguments: dict[str, Any]) -> None:
    """An empty location is a mistake, not the default."""
    with pytest.raises(ConfigurationError, match="FREEGPT_AUTH_STORE is set but empty"):
        Settings.from_env(**{"environ": {}, **arguments})


@pytest.mark.parametrize(
    ("usage", "variable", "expected"),
    [
        (None, {}, "there.usage.db"),
        (None, {"FREEGPT_AUTH_USAGE": "counts.db"}, "counts.db"),
        ("mine.db", {"FREEGPT_AUTH_USAGE": "counts.db"}, "mine.db"),
        (Path("mine.db"), {}, "mine.db"),
        (None, {"FREEGPT_AUTH_USAGE": "off"}, None),
        ("off", {"FREEGPT_AUTH_USAGE": "counts.db"}, None),
    ],
)
def test_where_usage_is_kept(usage: str | Path | None, variable: dict[str, str], expected: str | None) -> None:
    """Usage is beside the token file unless it is put elsewhere or turned off."""
    assert Settings.from_env(store="there.json", usage=usage, environ=variable).usage == expected


@pytest.mark.parametrize("arguments", [{"usage": " "}, {"environ": {"FREEGPT_AUTH_USAGE": ""}}])
def test_an_empty_usage_location_stops_the_start(arguments: dict[str, Any]) -> None:
    """An empty location is a mistake, and the message says how to turn usage off."""
    with pytest.raises(ConfigurationError, match=r"FREEGPT_AUTH_USAGE is set but empty.*say off"):
        Settings.from_env(**{"environ": {}, **arguments})


@pytest.mark.parametrize("interval", [0, 0.0, -1, float("nan")])
def test_an_interval_that_is_none_stops_the_start(interval: float) -> None:
    """Usage cannot be written without end, and the message names the argument."""
    with pytest.raises(ConfigurationError, match=r"^usage_interval is .*; give it a number of seconds above 0"):
        Settings.from_env(usage_interval=interval, environ={})


def test_the_usage_interval() -> None:
    """Usage is written every two seconds, or as often as the argument says."""
    assert Settings.from_env(environ={}).usage_interval == FLUSH_INTERVAL == 2.0
    assert Settings.from_env(usage_interval=0.5, environ={}).usage_interval == 0.5


# Flags and paths


@pytest.mark.parametrize(
    ("value", "required"),
    [
        *[(value, True) for value in ("1", "true", "YES", " on ")],
        *[(value, False) for value in ("0", "False", "no", "off", "")],
    ],
)
def test_required(value: str, required: bool) -> None:  # noqa: FBT001
    """The usual words for yes and no are understood, and an argument wins over them."""
    environ = {"FREEGPT_AUTH_REQUIRED": value}
    assert Settings.from_env(environ=environ).required is required
    assert Settings.from_env(required=not required, environ=environ).required is not required


@pytest.mark.parametrize("value", ["2", "ja", "treu"])
def test_a_flag_that_means_nothing_stops_the_start(value: str) -> None:
    """A mistyped yes is not taken for a no."""
    with pytest.raises(ConfigurationError, match=f"^FREEGPT_AUTH_REQUIRED is '{value}'; set it to 1 or 0"):
        Settings.from_env(environ={"FREEGPT_AUTH_REQUIRED": value})


@pytest.mark.parametrize(
    ("argument", "variable", "expected"),
    [
        (None, "", set()),
        (None, "/health", {"/health"}),
        (None, " /health , /metrics,, ", {"/health", "/metrics"}),
        (["/health"], "/metrics", {"/health"}),
        ([], "/metrics", set()),
        (("/a, b",), "", {"/a, b"}),
    ],
)
def test_public_paths(argument: list[str] | None, variable: str, expected: set[str]) -> None:
    """Public paths come from the variable, separated by commas, or from the argument alone."""
    settings = Settings.from_env(public_paths=argument, environ={"FREEGPT_AUTH_PUBLIC_PATHS": variable})
    assert settings.public_paths == expected


def test_a_string_is_no_list_of_paths() -> None:
    """A forgotten pair of brackets does not make single letters public."""
    with pytest.raises(ConfigurationError, match=r"not one string; write \['/health'\]"):
        Settings.from_env(public_paths="/health", environ={})


def test_a_public_path_starts_with_a_slash() -> None:
    """A path that can never match is a mistake, and the message writes it out right."""
    with pytest.raises(ConfigurationError, match="'health' does not start with a slash; write '/health'"):
        Settings.from_env(environ={"FREEGPT_AUTH_PUBLIC_PATHS": "health"})
