"""Environment variables: the checks of every value and every name."""

from __future__ import annotations

import re

import pytest

from freegpt_auth import ConfigurationError, Settings
from freegpt_auth.settings import store_location
from freegpt_auth.variables import VARIABLES, Variables

SECRET = "a-secret-key"


@pytest.mark.parametrize("name", VARIABLES)
def test_every_value_is_cleaned(name: str) -> None:
    """White space and a byte order mark around a value are removed; quotes and control characters are errors."""
    assert Variables({name: "\ufeff \tvalue \v\r\n"}).text(name) == "value"
    assert Variables({name: "value's'"}).text(name) == "value's'"
    with pytest.raises(ConfigurationError, match=f"^{name} is set but empty; {re.escape(VARIABLES[name].advice)}$"):
        Variables({name: "\ufeff \r\n"}).text(name)
    for spoilt, message in (("'value'", "is wrapped in quotes"), ("val\x1fue", "holds a control character")):
        shown = "" if VARIABLES[name].kind == "secret" else f": {spoilt!r}"
        with pytest.raises(ConfigurationError, match=f"^{name} {re.escape(message + shown)}; remove"):
            Variables({name: spoilt}).text(name)


@pytest.mark.parametrize("value", ["'postgresql://u:hunter2@h/d'", "'u:hunter2@h'", "'password=hunter2'"])
def test_quoted_password_is_not_shown(value: str) -> None:
    """A message shows a location only if it cannot hold a password."""
    with pytest.raises(ConfigurationError, match=r"^FREEGPT_AUTH_STORE is wrapped in quotes; remove"):
        Variables({"FREEGPT_AUTH_STORE": value}).text("FREEGPT_AUTH_STORE")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("\ufeffFREEGPT_API_KEY", r"'\\ufeffFREEGPT_API_KEY' is FREEGPT_API_KEY with a byte order mark, white space"),
        ("\ufeffOPENAI_API_KEY", "is OPENAI_API_KEY with a byte order mark"),
        (" FREEGPT_AUTH_STORE", "is FREEGPT_AUTH_STORE with"),
        ("FREEGPT_AUTH_STOER", "^the variable 'FREEGPT_AUTH_STOER' is unknown; rename it to FREEGPT_AUTH_STORE, or"),
        ("freegpt_api_key", "rename it to FREEGPT_API_KEY"),
        ("FREEGPT_API_KY", "rename it to FREEGPT_API_KEY"),
        ("FREEGPT_API_KEYS", "rename it to FREEGPT_API_KEY"),
        ("FREEGPT_AUTH_TOKEN", "^the variable 'FREEGPT_AUTH_TOKEN' is unknown to this version; correct its name"),
    ],
)
def test_misspelt_name_stops_the_start(name: str, message: str) -> None:
    """A misspelt variable would leave a server open: the message has its name and not its value."""
    for read in (Settings.from_env, store_location):
        with pytest.raises(ConfigurationError, match=message) as caught:
            read(environ={name: SECRET})
        assert SECRET not in str(caught.value)


def test_foreign_names_are_ignored() -> None:
    """Variables of other programs, and of Kubernetes beside a service named freegpt-auth, are no misspellings."""
    links = ("SERVICE_HOST", "SERVICE_PORT_HTTP", "PORT", "PORT_8000_TCP", "PORT_8000_TCP_ADDR", "STORE_PORT")
    names = [f"FREEGPT_AUTH_{link}" for link in links] + ["FREEGPT_MODEL", "FREEGPT_API_URL", "openai_api_key", "PATH"]
    assert Settings.from_env(environ=dict.fromkeys(names, "x")) == Settings.from_env(environ={})
