"""What the operator decided: which variable wins, and which mistakes stop a server before it starts."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from freegpt_auth import ConfigurationError, Settings
from freegpt_auth.environment_key import FILE_LIMIT, EnvironmentKey
from freegpt_auth.guard.credentials import VALUE_LIMIT
from freegpt_auth.settings import store_location, usage_location
from freegpt_auth.tokens import digest_of

SECRET = "a-key-that-nobody-may-see"
DATABASE = "postgresql://u:hunter2@h/d"
NO_NUMBERS = ("", " ", "0", "-1", "nan", "inf", "1e9", "30s", "thirty")
FILES = {
    "filled": f"\ufeff{SECRET}\n".encode(),  # as a Windows editor saves it
    "blank": b" \n",
    "quoted": f'"{SECRET}"\n'.encode(),
    "binary": SECRET.encode() + b"\xff",
    "large": SECRET.encode() + b" " * FILE_LIMIT,
}


@pytest.fixture(autouse=True)
def _key_files() -> None:
    """Put some files for FREEGPT_API_KEY_FILE into the working directory."""
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    os.mkfifo("pipe")


def test_nothing_set() -> None:
    """Without any setting, tokens are in the working directory, usage beside them, and nothing is public."""
    assert Settings.from_env(environ={}) == Settings(usage="api_tokens.usage.db")
    assert Settings() == Settings("api_tokens.json", None, frozenset(), required=False, usage=None, usage_interval=2.0)


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is exported in the shell is what counts."""
    monkeypatch.setenv("FREEGPT_AUTH_STORE", "here.json")
    monkeypatch.setenv("FREEGPT_AUTH_USAGE", "counts.db")
    settings = Settings.from_env()
    assert settings.store == store_location() == "here.json"
    assert settings.usage == usage_location("here.json") == "counts.db"


@pytest.mark.parametrize(
    ("environ", "source"),
    [
        ({"FREEGPT_API_KEY": SECRET}, "FREEGPT_API_KEY"),
        ({"OPENAI_API_KEY": f"\t {SECRET} \r\n"}, "OPENAI_API_KEY"),
        ({"FREEGPT_API_KEY": SECRET, "OPENAI_API_KEY": "sk-of-the-upstream"}, "FREEGPT_API_KEY"),
        ({"FREEGPT_API_KEY_FILE": "filled", "OPENAI_API_KEY": "sk-of-the-upstream"}, "FREEGPT_API_KEY_FILE"),
        ({"FREEGPT_API_KEY_FILE": "~/filled\r"}, "FREEGPT_API_KEY_FILE"),
    ],
)
def test_one_key_is_accepted(environ: dict[str, str], source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own variable or file wins over an upstream's key; a line break that came with a copied key does no harm."""
    monkeypatch.setenv("HOME", str(Path.cwd()))
    assert Settings.from_env(environ=environ).key == EnvironmentKey(digest_of(SECRET), source)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"FREEGPT_API_KEY": ""}, "^FREEGPT_API_KEY is set but empty"),
        ({"FREEGPT_API_KEY": "", "OPENAI_API_KEY": SECRET}, "^FREEGPT_API_KEY is set but empty"),
        ({"OPENAI_API_KEY": "\t\r\n "}, "^OPENAI_API_KEY is set but empty"),
        ({"FREEGPT_API_KEY_FILE": " "}, "^FREEGPT_API_KEY_FILE is set but empty"),
        ({"FREEGPT_API_KEY_FILE": "blank"}, "^the file of FREEGPT_API_KEY_FILE is set but empty"),
        ({"FREEGPT_API_KEY_FILE": "quoted"}, "^the file of FREEGPT_API_KEY_FILE is wrapped in quotes; remove them"),
        ({"FREEGPT_API_KEY_FILE": SECRET}, "^FREEGPT_API_KEY_FILE does not name a file that can be read: No such file"),
        (
            {"FREEGPT_API_KEY_FILE": "absent"},
            "^FREEGPT_API_KEY_FILE does not name a file that can be read: No such file",
        ),
        *[
            ({"FREEGPT_API_KEY_FILE": name}, f"^FREEGPT_API_KEY_FILE does not name a file that can be read: {problem}$")
            for name, problem in (
                (".", "it is a directory, as Docker makes one .*"),
                *((irregular, "it is not a regular file") for irregular in ("pipe", "/dev/zero")),
                ("binary", "it is not UTF-8 text"),
                ("large", "it is larger than 1 MiB"),
            )
        ],
        ({"FREEGPT_API_KEY": SECRET, "FREEGPT_API_KEY_FILE": "filled"}, "FREEGPT_API_KEY and FREEGPT_API_KEY_FILE are"),
        ({"FREEGPT_API_KEY": f"{SECRET}\x00"}, "^FREEGPT_API_KEY holds a control character"),
        ({"FREEGPT_API_KEY": f"a\n{SECRET}"}, "^FREEGPT_API_KEY holds a control character"),
        ({"FREEGPT_API_KEY": f"a\u200b{SECRET}"}, "^FREEGPT_API_KEY holds a control character"),
        *[
            ({"OPENAI_API_KEY": f"{mark}{SECRET}{mark} "}, "^OPENAI_API_KEY is wrapped in quotes; remove them")
            for mark in ("'", '"', "\u201c")
        ],
        *[({"FREEGPT_API_KEY": word}, "^FREEGPT_API_KEY is a word for off") for word in ("none", "OFF", "0")],
        *[
            ({"OPENAI_API_KEY": f"{word} {SECRET}"}, "^OPENAI_API_KEY begins with the word Bearer")
            for word in ("Bearer", "bearer")
        ],
    ],
)
def test_a_key_that_cannot_be_used_stops_the_start(environ: dict[str, str], message: str) -> None:
    """A typing error in a compose file does not open a server: what is wrong is said, and never the key."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        Settings.from_env(environ=environ)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(("character", "size"), [("a", 1), ("\u20ac", 3)])
def test_a_key_that_is_too_long_stops_the_start(character: str, size: int) -> None:
    """A key longer than the 4 KB that are looked at could never be used; the limit counts bytes."""
    longest = VALUE_LIMIT // size
    assert Settings.from_env(environ={"OPENAI_API_KEY": character * longest}).key is not None
    with pytest.raises(ConfigurationError, match=r"^OPENAI_API_KEY is longer than 4096 bytes"):
        Settings.from_env(environ={"OPENAI_API_KEY": character * (longest + 1)})


def test_settings_hold_no_secret_and_cannot_be_changed() -> None:
    """A settings object can be logged, and nothing that holds a reference to it can open a running server."""
    settings = Settings.from_env(environ={"FREEGPT_API_KEY": SECRET})
    assert SECRET not in repr(dataclasses.asdict(settings))
    assert repr(settings.key) == "EnvironmentKey(source='FREEGPT_API_KEY')"
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.required = False  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "store", "usage"),
    [
        ({"environ": {"FREEGPT_AUTH_STORE": "there.json"}}, "there.json", "there.usage.db"),
        ({"store": "mine.json", "environ": {"FREEGPT_AUTH_STORE": "there.json"}}, "mine.json", "mine.usage.db"),
        ({"store": Path("mine.json"), "usage": Path("mine.db")}, "mine.json", "mine.db"),
        ({"usage": "mine.db", "environ": {"FREEGPT_AUTH_USAGE": "counts.db"}}, "api_tokens.json", "mine.db"),
        *[
            ({"environ": {"FREEGPT_AUTH_USAGE": word}}, "api_tokens.json", None)
            for word in ("off", "false", "OFF", "0", "no", "None", " off\n")
        ],
        ({"usage": "None"}, "api_tokens.json", None),
        ({"environ": {"FREEGPT_AUTH_STORE": "~/t.json"}}, "/home/u/t.json", "/home/u/t.usage.db"),
        ({"store": "~/t.json\n", "usage": "~/u.db "}, "/home/u/t.json", "/home/u/u.db"),
        ({"environ": {"FREEGPT_AUTH_USAGE": "~/u.db"}}, "api_tokens.json", "/home/u/u.db"),
        ({"usage": "off", "environ": {"FREEGPT_AUTH_USAGE": "counts.db"}}, "api_tokens.json", None),
    ],
)
def test_where_tokens_and_usage_are(
    arguments: dict[str, Any], store: str, usage: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An argument wins over its variable; usage is beside the token file unless it is put elsewhere or turned off."""
    monkeypatch.setenv("HOME", "/home/u")
    settings = Settings.from_env(**{"environ": {}, **arguments})
    assert (settings.store, settings.usage) == (store, usage)


@pytest.mark.parametrize(
    ("arguments", "is_named"),
    [
        ({}, False),
        ({"environ": {"FREEGPT_AUTH_USAGE": "u.db"}}, False),
        ({"environ": {"FREEGPT_AUTH_STORE": "api_tokens.json"}}, True),
        ({"store": "api_tokens.json"}, True),
    ],
)
def test_named_store(arguments: dict[str, Any], *, is_named: bool) -> None:
    """An argument or the variable names the store, also where it names the default place."""
    assert Settings.from_env(**{"environ": {}, **arguments}).store_named is is_named


@pytest.mark.parametrize(
    ("arguments", "usage"),
    [
        ({}, DATABASE),
        ({"environ": {"FREEGPT_AUTH_USAGE": DATABASE}}, DATABASE),
        ({"environ": {"FREEGPT_AUTH_USAGE": "off"}}, None),
        ({"environ": {"FREEGPT_AUTH_USAGE": "counts.db"}}, "counts.db"),
        ({"usage": "postgresql://of-my-own/d"}, "postgresql://of-my-own/d"),
    ],
)
def test_usage_of_a_database_is_beside_its_tokens(arguments: dict[str, Any], usage: str | None) -> None:
    """With a database usage is in it, unless each host is to have its own or none; and no password is shown."""
    settings = Settings.from_env(**{"environ": {}, "store": DATABASE, **arguments})
    assert (settings.store, settings.usage) == (DATABASE, usage)
    assert "hunter2" not in repr(settings)


def test_the_lease_and_the_cache() -> None:
    """How long a server that is cut off goes on, and how much it remembers, are 30 s and 100,000 tokens, or as it is set."""
    settings = Settings.from_env(environ={})
    assert (settings.lease, settings.cache_limit) == (30.0, 100_000)
    environ = {"FREEGPT_AUTH_LEASE": "7.5", "FREEGPT_AUTH_CACHE": " 1e6 "}
    settings = Settings.from_env(environ=environ)
    assert (settings.lease, settings.cache_limit) == (7.5, 1_000_000)
    assert isinstance(settings.cache_limit, int)
    least = Settings.from_env(environ={"FREEGPT_AUTH_LEASE": "5", "FREEGPT_AUTH_CACHE": "1"})
    assert (least.lease, least.cache_limit) == (5.0, 1)


@pytest.mark.parametrize(
    ("variable", "argument", "required"),
    [
        *[(yes, None, True) for yes in ("1", "YES", " on ")],
        *[(no, None, False) for no in ("0", "False", "off", "NONE")],
        ("1", False, False),
        ("0", True, True),
    ],
)
def test_required(variable: str, argument: bool | None, required: bool) -> None:  # noqa: FBT001
    """The usual words for yes and no are understood, and an argument wins over them."""
    environ = {"FREEGPT_AUTH_REQUIRED": variable}
    assert Settings.from_env(required=argument, environ=environ).required is required


@pytest.mark.parametrize(
    ("argument", "variable", "expected"),
    [
        (None, " /health , /metrics,, ", {"/health", "/metrics"}),
        (None, "none", set()),
        (["/a, b"], "/c", {"/a, b"}),
        ([], "/c", set()),
    ],
)
def test_public_paths(argument: list[str] | None, variable: str, expected: set[str]) -> None:
    """Public paths come from the variable, separated by commas, or from the argument alone."""
    settings = Settings.from_env(public_paths=argument, environ={"FREEGPT_AUTH_PUBLIC_PATHS": variable})
    assert settings.public_paths == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"store": ""}, "^the store is set but empty"),
        ({"store": "a\nb"}, r"^the store holds a control character: 'a\\nb'; remove it"),
        ({"store": "'postgresql://u:hunter2@h/d'"}, "^the store is wrapped in quotes; remove them"),
        ({"environ": {"FREEGPT_AUTH_STORE": "host=h password=hunter2"}}, "^FREEGPT_AUTH_STORE resembles the address"),
        ({"environ": {"FREEGPT_AUTH_USAGE": "postgresql:/u:hunter2@h"}}, "^FREEGPT_AUTH_USAGE resembles the address"),
        ({"environ": {"FREEGPT_AUTH_STORE": "Off"}}, "^FREEGPT_AUTH_STORE is a word for off"),
        ({"environ": {"FREEGPT_AUTH_STORE": " "}}, "^FREEGPT_AUTH_STORE is set but empty"),
        ({"store": "/"}, "^/ is a folder; name a token file"),
        ({"store": "t.json", "usage": "./t.json"}, "^the usage database names the token file; name another file"),
        ({"usage": " "}, "^the usage database is set but empty.*say off"),
        *[({"usage_interval": interval}, "^usage_interval is .* above 0") for interval in (0, -1, float("nan"), 1e99)],
        ({"environ": {"FREEGPT_AUTH_REQUIRED": "treu"}}, "^FREEGPT_AUTH_REQUIRED is 'treu'; set it to 1 or 0"),
        (
            {"environ": {"FREEGPT_AUTH_LEASE": "4.9"}},
            "^FREEGPT_AUTH_LEASE is '4.9'; give it a number from 5 to 100,000,000",
        ),
        *[({"environ": {"FREEGPT_AUTH_LEASE": no}}, "^FREEGPT_AUTH_LEASE is .* or unset it$") for no in NO_NUMBERS],
        *[({"environ": {"FREEGPT_AUTH_CACHE": no}}, "^FREEGPT_AUTH_CACHE is .* or unset it$") for no in NO_NUMBERS],
        (
            {"environ": {"FREEGPT_AUTH_USAGE": DATABASE}},
            "^FREEGPT_AUTH_USAGE is the URL of another database than the tokens'",
        ),
        (
            {"store": DATABASE, "environ": {"FREEGPT_AUTH_USAGE": "postgresql://u:hunter2@h/other"}},
            "^FREEGPT_AUTH_USAGE is the URL of another database than the tokens'",
        ),
        ({"public_paths": "/health"}, r"not one string; write \['/health'\]"),
        ({"public_paths": ["/a/*"]}, r"'/a/\*' has a \*, but public paths are exact"),
        ({"environ": {"FREEGPT_AUTH_PUBLIC_PATHS": "health"}}, "'health' does not start with a slash; write '/health'"),
    ],
)
def test_a_mistake_stops_the_start(arguments: dict[str, Any], message: str) -> None:
    """A setting that means nothing is not taken for the default, and the message names it and says what to do."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        Settings.from_env(**{"environ": {}, **arguments})
    assert "hunter2" not in str(caught.value)
