"""Settings: the precedence of arguments and variables, and the mistakes that stop a server before it starts."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from freegpt_auth import ConfigurationError, Settings
from freegpt_auth.environment_key import FILE_LIMIT, EnvironmentKey
from freegpt_auth.location import Location
from freegpt_auth.settings import store_location, usage_location
from freegpt_auth.tokens import VALUE_LIMIT, digest_of

SECRET = "a-secret-key"
DATABASE = "postgresql://u:hunter2@h/d"
NO_NUMBERS = ("0", "-1", "nan", "inf", "1e9", "30s", "thirty")
FILES = {
    "filled": f"\ufeff{SECRET}\n".encode(),  # as a Windows editor saves it
    "blank": b" \n",
    "quoted": f'"{SECRET}"\n'.encode(),
    "binary": SECRET.encode() + b"\xff",
    "large": SECRET.encode() + b" " * FILE_LIMIT,
}


@pytest.fixture(autouse=True)
def _key_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the working directory the home directory, with files for FREEGPT_API_KEY_FILE in it."""
    monkeypatch.setenv("HOME", str(Path.cwd()))
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    os.mkfifo("pipe")


def test_defaults() -> None:
    """Without any setting, tokens are in the working directory, usage beside them, and nothing is public."""
    assert Settings.from_env(environ={}) == Settings(usage=Location("api_tokens.usage.db"))
    assert Settings() == Settings(
        Location("api_tokens.json"), None, frozenset(), required=False, usage=None, usage_interval=2.0
    )
    assert (Settings().lease, Settings().cache_limit) == (30.0, 100_000)


def test_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that the shell exports are read."""
    monkeypatch.setenv("FREEGPT_AUTH_STORE", "here.json")
    monkeypatch.setenv("FREEGPT_AUTH_USAGE", "counts.db")
    settings = Settings.from_env()
    assert settings.store == store_location() == Location("here.json")
    assert settings.usage == usage_location(settings.store) == Location("counts.db")


@pytest.mark.parametrize(
    ("environ", "source"),
    [
        ({"FREEGPT_API_KEY": SECRET, "OPENAI_API_KEY": "sk-of-the-upstream"}, "FREEGPT_API_KEY"),
        ({"OPENAI_API_KEY": f"\t {SECRET} \r\n"}, "OPENAI_API_KEY"),
        ({"FREEGPT_API_KEY_FILE": "filled", "OPENAI_API_KEY": "sk-of-the-upstream"}, "FREEGPT_API_KEY_FILE"),
        ({"FREEGPT_API_KEY_FILE": "~/filled\r"}, "FREEGPT_API_KEY_FILE"),
    ],
)
def test_one_environment_key(environ: dict[str, str], source: str) -> None:
    """Our own variable or file precedes the upstream's key; a copied line break is removed."""
    assert Settings.from_env(environ=environ).key == EnvironmentKey(digest_of(SECRET), source)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"FREEGPT_API_KEY": "", "OPENAI_API_KEY": SECRET}, "^FREEGPT_API_KEY is set but empty"),
        ({"FREEGPT_API_KEY_FILE": "blank"}, "^the file of FREEGPT_API_KEY_FILE is set but empty"),
        ({"FREEGPT_API_KEY_FILE": "quoted"}, "^the file of FREEGPT_API_KEY_FILE is wrapped in quotes; remove them"),
        *[
            ({"FREEGPT_API_KEY_FILE": name}, f"^FREEGPT_API_KEY_FILE does not name a file that can be read: {problem}$")
            for name, problem in (
                (SECRET, "No such file or directory"),
                (".", "it is a directory, as Docker makes one .*"),
                ("pipe", "it is not a regular file"),
                ("/dev/zero", "it is not a regular file"),
                ("binary", "it is not UTF-8 text"),
                ("large", "it is larger than 1 MiB"),
            )
        ],
        ({"FREEGPT_API_KEY": SECRET, "FREEGPT_API_KEY_FILE": "filled"}, "FREEGPT_API_KEY and FREEGPT_API_KEY_FILE are"),
        ({"FREEGPT_API_KEY": f"a\u200b{SECRET}"}, "^FREEGPT_API_KEY holds a control character"),
        ({"OPENAI_API_KEY": f"\u201c{SECRET}\u201c "}, "^OPENAI_API_KEY is wrapped in quotes; remove them"),
        *[({"FREEGPT_API_KEY": word}, "^FREEGPT_API_KEY is a word for off") for word in ("none", "OFF", "0")],
        ({"OPENAI_API_KEY": f"Bearer {SECRET}"}, "^OPENAI_API_KEY begins with the word Bearer"),
        ({"OPENAI_API_KEY": f"bearer {SECRET}"}, "^OPENAI_API_KEY begins with the word Bearer"),
    ],
)
def test_unusable_key_stops_the_start(environ: dict[str, str], message: str) -> None:
    """A mistake in a compose file does not open a server: the message names the fault and not the key."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        Settings.from_env(environ=environ)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(("character", "size"), [("a", 1), ("\u20ac", 3)])
def test_long_key_stops_the_start(character: str, size: int) -> None:
    """A key longer than the 4 KB of a credential could never be presented; the limit counts bytes."""
    longest = VALUE_LIMIT // size
    assert Settings.from_env(environ={"OPENAI_API_KEY": character * longest}).key is not None
    with pytest.raises(ConfigurationError, match=r"^OPENAI_API_KEY is longer than 4096 bytes"):
        Settings.from_env(environ={"OPENAI_API_KEY": character * (longest + 1)})


def test_settings_hold_no_secret_and_are_frozen() -> None:
    """A settings object can be logged, and code that holds a reference to it cannot open a running server."""
    settings = Settings.from_env(environ={"FREEGPT_API_KEY": SECRET}, store=DATABASE)
    assert SECRET not in repr(dataclasses.asdict(settings))
    assert "hunter2" not in repr(settings)
    assert repr(settings.key) == "EnvironmentKey(source='FREEGPT_API_KEY')"
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.required = False  # type: ignore[misc]


HOME_STORE = {"FREEGPT_AUTH_STORE": "~/t.json"}
THERE = {"FREEGPT_AUTH_STORE": "there.json"}
COUNTS = {"FREEGPT_AUTH_USAGE": "counts.db"}


@pytest.mark.parametrize(
    ("arguments", "environ", "store", "usage"),
    [
        ({}, THERE, "there.json", "there.usage.db"),
        ({"store": Path("mine.json")}, THERE, "mine.json", "mine.usage.db"),
        ({"usage": Path("mine.db")}, COUNTS, "api_tokens.json", "mine.db"),
        ({"usage": "off"}, COUNTS, "api_tokens.json", None),
        *[({}, {"FREEGPT_AUTH_USAGE": word}, "api_tokens.json", None) for word in ("off", "FALSE", "0", " no\n")],
        ({}, HOME_STORE, "{home}/t.json", "{home}/t.usage.db"),
        ({"store": "~/t.json\n", "usage": "~/u.db "}, {}, "{home}/t.json", "{home}/u.db"),
        ({}, {"FREEGPT_AUTH_USAGE": "~/u.db"}, "api_tokens.json", "{home}/u.db"),
        ({"store": DATABASE}, {}, DATABASE, DATABASE),
        ({"store": DATABASE}, {"FREEGPT_AUTH_USAGE": DATABASE}, DATABASE, DATABASE),
        ({"store": DATABASE}, COUNTS, DATABASE, "counts.db"),
        ({"store": DATABASE, "usage": "postgresql://other/d"}, {}, DATABASE, "postgresql://other/d"),
    ],
)
def test_locations(arguments: dict[str, Any], environ: dict[str, str], store: str, usage: str | None) -> None:
    """An argument precedes its variable; by default usage is beside the token file, or in the database."""
    settings = Settings.from_env(environ=environ, **arguments)
    home = Path.cwd()
    assert settings.store == Location.of(store.format(home=home))
    assert settings.usage == (Location.of(usage.format(home=home)) if usage else None)


def prefixed(environ: dict[str, str]) -> dict[str, str]:
    """Return variables with the prefix of this library."""
    return {f"FREEGPT_AUTH_{name}": value for name, value in environ.items()}


@pytest.mark.parametrize(
    ("arguments", "environ", "expected"),
    [
        ({}, {"USAGE": "counts.db"}, {"store_named": False}),
        ({}, {"STORE": "api_tokens.json"}, {"store_named": True}),
        ({"store": "api_tokens.json"}, {}, {"store_named": True}),
        ({}, {"LEASE": "7.5", "CACHE": " 1e6 "}, {"lease": 7.5, "cache_limit": 1_000_000}),
        ({}, {"LEASE": "5", "CACHE": "1"}, {"lease": 5.0, "cache_limit": 1}),
        *[({}, {"REQUIRED": yes}, {"required": True}) for yes in ("1", "YES", " on ")],
        *[({}, {"REQUIRED": no}, {"required": False}) for no in ("0", "False", "off", "NONE")],
        ({"required": False}, {"REQUIRED": "1"}, {"required": False}),
        ({"required": True}, {"REQUIRED": "0"}, {"required": True}),
        ({}, {"PUBLIC_PATHS": " /health , /metrics,, "}, {"public_paths": {"/health", "/metrics"}}),
        ({}, {"PUBLIC_PATHS": "none"}, {"public_paths": set()}),
        ({"public_paths": ["/a, b"]}, {"PUBLIC_PATHS": "/c"}, {"public_paths": {"/a, b"}}),
        ({"public_paths": []}, {"PUBLIC_PATHS": "/c"}, {"public_paths": set()}),
    ],
)
def test_argument_precedes_its_variable(
    arguments: dict[str, Any], environ: dict[str, str], expected: dict[str, Any]
) -> None:
    """A setting is its argument, else its variable: a number, a list, or one of the usual words for yes and no."""
    settings = Settings.from_env(environ=prefixed(environ), **arguments)
    assert {name: getattr(settings, name) for name in expected} == expected
    assert isinstance(settings.cache_limit, int)


OTHER_DATABASE = "^FREEGPT_AUTH_USAGE is the URL of another database than the tokens'"


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        ({"store": ""}, {}, "^the store is set but empty"),
        ({"store": "a\nb"}, {}, r"^the store holds a control character: 'a\\nb'; remove it"),
        ({"store": "/"}, {}, "^/ is a folder; name a token file"),
        ({"store": "t.json", "usage": "./t.json"}, {}, "^the usage database names the token file; name another file"),
        ({"usage": " "}, {}, "^the usage database is set but empty.*say off"),
        *[({"usage_interval": no}, {}, "^usage_interval is .* above 0") for no in (0, -1, float("nan"), 1e99)],
        ({"public_paths": "/health"}, {}, r"not one string; write \['/health'\]"),
        ({"public_paths": ["/a/*"]}, {}, r"'/a/\*' has a \*, but public paths are exact"),
        ({}, {"STORE": "host=h password=hunter2"}, "^FREEGPT_AUTH_STORE resembles the address"),
        ({}, {"USAGE": "postgresql:/u:hunter2@h"}, "^FREEGPT_AUTH_USAGE resembles the address"),
        ({}, {"STORE": "Off"}, "^FREEGPT_AUTH_STORE is a word for off"),
        ({}, {"REQUIRED": "treu"}, "^FREEGPT_AUTH_REQUIRED is 'treu'; set it to 1 or 0"),
        ({}, {"LEASE": "4.9"}, "^FREEGPT_AUTH_LEASE is '4.9'; give it a number from 5 to 100,000,000"),
        *[({}, {"LEASE": no}, "^FREEGPT_AUTH_LEASE is .* or unset it$") for no in NO_NUMBERS],
        *[({}, {"CACHE": no}, "^FREEGPT_AUTH_CACHE is .* or unset it$") for no in NO_NUMBERS],
        ({}, {"USAGE": DATABASE}, OTHER_DATABASE),
        ({}, {"STORE": DATABASE, "USAGE": "postgresql://u:hunter2@h/other"}, OTHER_DATABASE),
        ({}, {"PUBLIC_PATHS": "health"}, "'health' does not start with a slash; write '/health'"),
    ],
)
def test_mistake_stops_the_start(arguments: dict[str, Any], environ: dict[str, str], message: str) -> None:
    """A wrong value is not replaced by the default: the message names the setting and the remedy, and no password."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        Settings.from_env(environ=prefixed(environ), **arguments)
    assert "hunter2" not in str(caught.value)
