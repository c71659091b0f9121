"""Environment variables: the table of known ones, and one reader for all."""

from __future__ import annotations

import math
import os.path
import re
import string
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from .exceptions import ConfigurationError
from .location import may_hold_password

if TYPE_CHECKING:
    from collections.abc import Mapping

OFF: Final = ("off", "false", "no", "0", "none")
"""Words that turn a setting off, in upper or lower case."""

LARGEST: Final = 100_000_000
"""Upper bound of a number."""

SHORTEST_LEASE: Final = 5
"""Lowest ``FREEGPT_AUTH_LEASE``, in seconds. The database is polled each second with a time limit of 2 s, so one dead
connection outlasts a shorter lease. Measured after a half-open link: the lease was lost for up to 43, 21 and 6 % of the
time with 1, 2 and 3 s, and never with 4 s or more."""

_ON = ("on", "true", "yes", "1")


class Variable(NamedTuple):
    """One environment variable of this library.

    Attributes:
        advice: remedy at the end of an error message.
        kind: a *secret* is not shown in messages; a *location* is shown unless it may hold a password.
        lowest: lower bound of a number.
    """

    advice: str
    kind: Literal["text", "location", "secret"] = "text"
    lowest: int = 1


def _number(lowest: int) -> Variable:
    return Variable(f"give it a number from {lowest} to {LARGEST:,}, or unset it", lowest=lowest)


VARIABLES: Final[Mapping[str, Variable]] = {
    "FREEGPT_API_KEY": Variable("give it a key, or unset it", "secret"),
    # Not a "location": an operator may have put the key itself there.
    "FREEGPT_API_KEY_FILE": Variable("name a file that holds the key, or unset it", "secret"),
    "OPENAI_API_KEY": Variable("give it a key, or unset it", "secret"),
    "FREEGPT_AUTH_STORE": Variable("name a token file or unset it", "location"),
    "FREEGPT_AUTH_USAGE": Variable("name a file, say off, or unset it", "location"),
    "FREEGPT_AUTH_PUBLIC_PATHS": Variable("list paths separated by commas, or unset it"),
    "FREEGPT_AUTH_REQUIRED": Variable("set it to 1 or 0"),
    "FREEGPT_AUTH_KEEP_CREDENTIALS": Variable("set it to 1 or 0"),
    "FREEGPT_AUTH_CORS_ORIGINS": Variable("list origins separated by commas, or unset it"),
    "FREEGPT_AUTH_LEASE": _number(SHORTEST_LEASE),
    "FREEGPT_AUTH_CACHE": _number(1),
}
"""Every variable read. Other ``FREEGPT_AUTH_`` names are a ``ConfigurationError``, except service links."""

_PREFIX = "FREEGPT_"
_OWN_PREFIX = "FREEGPT_AUTH_"
_MIN_SIMILARITY = 0.85  # ratio of difflib: AUTH_STOER and AUTH_STORE 0.90, AUTH_PORT and AUTH_STORE 0.74
# Kubernetes and Docker set these in every container beside a service named freegpt-auth, or freegpt-….
_SERVICE_LINK = re.compile(
    r"FREEGPT_\w+_(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)?)"
)
_STRIPPED = string.whitespace + "\ufeff"
_QUOTES = "\"'`\u201c\u201d\u201e\u2018\u2019\u201a\u00ab\u00bb"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Variables:
    """The values of :data:`VARIABLES`, all checked by the same rules.

    White space, CR, LF and a byte order mark at either end of a value are removed.

    Args:
        environ: the environment.

    Raises:
        ConfigurationError: the name of a variable is misspelt. Each method raises it for a value that is empty, wrapped
            in quotes, holds a control character or cannot be used. The message names the variable.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        for name in environ:
            if name not in VARIABLES:
                _check_unknown(name)

    def __contains__(self, name: str) -> bool:
        return name in self._environ

    def text(self, name: str) -> str | None:
        """Return the value; ``None`` if the variable is not set."""
        if name not in self._environ:
            return None
        variable = VARIABLES[name]
        return cleaned(name, self._environ[name], variable.advice, kind=variable.kind)

    def location(self, name: str) -> str | None:
        """Return the value as a location, with ``~`` expanded; ``None`` if the variable is not set."""
        value = self.text(name)
        return None if value is None else expanded(value)

    def flag(self, name: str) -> bool:
        """Return whether the value is a word for on; ``False`` if the variable is not set."""
        value = self.text(name)
        if value is None or is_off(value):
            return False
        if value.lower() not in _ON:
            raise ConfigurationError(f"{name} is {value!r}; {VARIABLES[name].advice}")
        return True

    def number(self, name: str, default: float) -> float:
        """Return the value as a number; *default* if the variable is not set."""
        value = self.text(name)
        if value is None:
            return default
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        variable = VARIABLES[name]
        if not variable.lowest <= number <= LARGEST:
            raise ConfigurationError(f"{name} is {value!r}; {variable.advice}")
        return number

    def listed(self, name: str) -> list[str]:
        """Return the items between commas; none for a word for off, or if the variable is not set."""
        value = self.text(name)
        if value is None or is_off(value):
            return []
        return [item for item in map(str.strip, value.split(",")) if item]


def cleaned(subject: str, value: str, advice: str, *, kind: Literal["text", "location", "secret"] = "text") -> str:
    """Return *value* without white space and byte order marks at its ends.

    Args:
        subject: name of the setting in error messages.
        value: of the setting.
        advice: remedy in the message for an empty value.
        kind: as in :class:`Variable`.

    Raises:
        ConfigurationError: the result is empty, wrapped in quotes, or holds a control character.
    """
    text = value.strip(_STRIPPED)
    if not text:
        raise ConfigurationError(f"{subject} is set but empty; {advice}")
    is_shown = kind == "text" or (kind == "location" and not may_hold_password(value))
    shown = f": {value!r}" if is_shown else ""
    if text[0] in _QUOTES and text[-1] in _QUOTES:
        raise ConfigurationError(
            f"{subject} is wrapped in quotes{shown}; remove them (docker --env-file passes quotes on)"
        )
    if _CONTROL.search(text):
        raise ConfigurationError(f"{subject} holds a control character{shown}; remove it")
    return text


def expanded(location: str) -> str:
    """Return *location* with a leading ``~`` replaced by the home directory."""
    return os.path.expanduser(location)  # noqa: PTH111  Path would merge the slashes of a URL


def is_off(value: str) -> bool:
    """Return whether *value* is a word for off."""
    return value.lower() in OFF


def _check_unknown(name: str) -> None:
    """Raise ``ConfigurationError`` for a misspelt or unknown ``FREEGPT_AUTH_`` name. The value is hidden."""
    bare = name.strip(_STRIPPED + _QUOTES)
    if bare in VARIABLES:
        raise ConfigurationError(
            f"the variable {name!r} is {bare} with a byte order mark, white space or quotes round its name; "
            "remove them in the file that sets it"
        )
    if not bare.upper().startswith(_PREFIX) or _SERVICE_LINK.fullmatch(bare):
        return
    meant = _most_similar(bare.upper())
    if meant is not None:
        raise ConfigurationError(f"the variable {name!r} is unknown; rename it to {meant}, or unset it")
    if bare.startswith(_OWN_PREFIX):
        raise ConfigurationError(f"the variable {name!r} is unknown to this version; correct its name, or unset it")


def _most_similar(name: str) -> str | None:
    from difflib import get_close_matches  # noqa: PLC0415  rarely needed

    known = [other.removeprefix(_PREFIX) for other in VARIABLES if other.startswith(_PREFIX)]
    found = get_close_matches(name.removeprefix(_PREFIX), known, n=1, cutoff=_MIN_SIMILARITY)
    return _PREFIX + found[0] if found else None
