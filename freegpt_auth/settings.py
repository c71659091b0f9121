"""What the operator decided, from the environment and from keyword arguments. The only reader of ``os.environ``."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .bearer import VALUE_LIMIT
from .exceptions import ConfigurationError
from .location import is_url
from .tokens import digest_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FLUSH_INTERVAL = 2.0
"""Seconds between two writes of usage."""

LEASE = 30.0
"""Seconds for which a process that cannot reach the database goes on to accept the tokens that it knows."""

SHORTEST_LEASE = 5.0
"""Lowest lease in seconds. The database is asked each second and has 2 s to answer, so a shorter lease ends while one dead
connection is noticed. Measured after a half-open link: no lease for 27-43 % of 8 s with 1 s, 18-21 % with 2, 5-6 % with 3,
0 % with 4 and more; with 1 s also 35 % of the time without any fault."""

CACHE_LIMIT = 100_000
"""Tokens of a database that a process keeps in memory, about 0.5 KB each."""

DEFAULT_STORE = "api_tokens.json"
"""The token file when none is named: in the working directory."""

_LARGEST = 100_000_000
_WHITE_SPACE = " \t\r\n"
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


@dataclass(frozen=True)
class EnvironmentKey:
    """The one key that is set in the environment, without the key itself.

    Attributes:
        digest: its SHA-256 digest.
        source: the variable it came from.
    """

    digest: bytes = field(repr=False)
    source: str


@dataclass(frozen=True)
class Settings:
    """What a middleware is built from. It shows no secret: the URL of a database may hold a password.

    Attributes:
        store: the location of the tokens.
        key: the environment key, if one is set.
        public_paths: exact paths that need no token.
        required: refuse to start in open mode.
        usage: where usage is kept; ``None`` to record nothing.
        usage_interval: seconds between two writes to it.
        lease: seconds for which known tokens are accepted while the database cannot be reached.
        cache_limit: how many tokens of a database are kept in memory.
    """

    store: str = field(default=DEFAULT_STORE, repr=False)
    key: EnvironmentKey | None = None
    public_paths: frozenset[str] = frozenset()
    required: bool = False
    usage: str | None = field(default=None, repr=False)
    usage_interval: float = FLUSH_INTERVAL
    lease: float = LEASE
    cache_limit: int = CACHE_LIMIT

    @classmethod
    def from_env(
        cls,
        *,
        store: str | os.PathLike[str] | None = None,
        public_paths: Iterable[str] | None = None,
        required: bool | None = None,
        usage: str | os.PathLike[str] | None = None,
        usage_interval: float = FLUSH_INTERVAL,
        environ: Mapping[str, str] | None = None,
    ) -> Settings:
        """Read the settings. An argument that is given wins over its variable.

        Args:
            store: ``FREEGPT_AUTH_STORE``, by default ``api_tokens.json`` in the working directory.
            public_paths: ``FREEGPT_AUTH_PUBLIC_PATHS``, separated by commas there; by default none.
            required: ``FREEGPT_AUTH_REQUIRED``; by default no.
            usage: ``FREEGPT_AUTH_USAGE``, or ``off``; by default beside the tokens.
            usage_interval: seconds between two writes of usage: what a killed process can lose.
            environ: the environment; by default ``os.environ``.

        Raises:
            ConfigurationError: a value cannot be used; the message names the variable or the argument.
        """
        env = os.environ if environ is None else environ
        if not 0 < usage_interval <= threading.TIMEOUT_MAX:
            raise ConfigurationError(f"usage_interval is {usage_interval}; give it a number of seconds above 0")
        location = store_location(store, env)
        if public_paths is None:
            public_paths = filter(None, (path.strip() for path in env.get("FREEGPT_AUTH_PUBLIC_PATHS", "").split(",")))
        return cls(
            store=location,
            key=_environment_key(env),
            public_paths=_checked_paths(public_paths),
            required=_flag(env, "FREEGPT_AUTH_REQUIRED") if required is None else required,
            usage=usage_location(location, usage, env),
            usage_interval=usage_interval,
            lease=_positive(env, "FREEGPT_AUTH_LEASE", LEASE, SHORTEST_LEASE),
            cache_limit=int(_positive(env, "FREEGPT_AUTH_CACHE", CACHE_LIMIT)),
        )


def store_location(store: str | os.PathLike[str] | None = None, environ: Mapping[str, str] | None = None) -> str:
    """Return where the tokens are: *store*, else ``FREEGPT_AUTH_STORE``, else ``api_tokens.json``.

    Raises:
        ConfigurationError: the location is empty.
    """
    env = os.environ if environ is None else environ
    location = env.get("FREEGPT_AUTH_STORE", DEFAULT_STORE) if store is None else os.fspath(store)
    if not location.strip():
        raise ConfigurationError("FREEGPT_AUTH_STORE is set but empty; name a token file or unset it")
    return location


def usage_location(
    store: str, usage: str | os.PathLike[str] | None = None, environ: Mapping[str, str] | None = None
) -> str | None:
    """Return where usage is kept: *usage*, else ``FREEGPT_AUTH_USAGE``, else beside the tokens in *store*.

    Raises:
        ConfigurationError: the location is empty, or the variable names a database that does not hold the tokens.
    """
    env = os.environ if environ is None else environ
    location = env.get("FREEGPT_AUTH_USAGE") if usage is None else os.fspath(usage)
    if location is None:
        if is_url(store):
            return store
        try:
            return str(Path(store).with_suffix(".usage.db"))
        except ValueError:
            raise ConfigurationError(f"{store} is a folder; name a token file") from None
    if not location.strip():
        raise ConfigurationError("FREEGPT_AUTH_USAGE is set but empty; name a file, say off, or unset it")
    if usage is None and is_url(location) and location != store:  # where these tokens are not, their use is not counted
        raise ConfigurationError(
            "FREEGPT_AUTH_USAGE is the URL of another database than the tokens'; name a file, say off, or unset it"
        )
    return None if location == "off" else location


def _environment_key(env: Mapping[str, str]) -> EnvironmentKey | None:
    """Return the first key that is set. A variable that is set but empty is a mistake: it must not open a server."""
    if "FREEGPT_API_KEY" in env and "FREEGPT_API_KEY_FILE" in env:
        raise ConfigurationError("FREEGPT_API_KEY and FREEGPT_API_KEY_FILE are both set; unset one of them")
    for name in ("FREEGPT_API_KEY", "FREEGPT_API_KEY_FILE", "OPENAI_API_KEY"):
        if name in env:
            value = _content(env[name]) if name == "FREEGPT_API_KEY_FILE" else env[name]
            return EnvironmentKey(digest_of(_checked_key(name, value.strip(_WHITE_SPACE))), name)
    return None


def _content(path: str) -> str:
    if not path.strip():
        raise ConfigurationError("FREEGPT_API_KEY_FILE is set but empty; name a file that holds the key, or unset it")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        # The value is not repeated: it may be the key itself, put there by mistake.
        raise ConfigurationError(f"FREEGPT_API_KEY_FILE does not name a file that can be read: {reason}") from None


def _checked_key(name: str, key: str) -> str:
    if not key:
        raise ConfigurationError(f"{name} is set but empty; give it a key, or unset it")
    if not key.isprintable():
        raise ConfigurationError(f"{name} holds a control character, which no client can send; give it another key")
    if len(key.encode("utf-8", "surrogateescape")) > VALUE_LIMIT:
        raise ConfigurationError(f"{name} is longer than {VALUE_LIMIT} bytes, which no request may be; shorten it")
    return key


def _flag(env: Mapping[str, str], name: str) -> bool:
    value = env.get(name, "").strip().lower()
    if value not in _YES + _NO:
        raise ConfigurationError(f"{name} is {value!r}; set it to 1 or 0")
    return value in _YES


def _positive(env: Mapping[str, str], name: str, default: float, lowest: float = 1) -> float:
    try:
        number = float(env.get(name, default))
    except ValueError:
        number = 0.0
    if not lowest <= number <= _LARGEST:
        raise ConfigurationError(
            f"{name} is {env[name]!r}; give it a number from {lowest:g} to {_LARGEST:,}, or unset it"
        )
    return number


def _checked_paths(paths: Iterable[str]) -> frozenset[str]:
    if isinstance(paths, str):
        raise ConfigurationError(f"public_paths must be a list of paths, not one string; write [{paths!r}]")
    checked = frozenset(paths)
    for path in checked:
        if not path.startswith("/"):
            raise ConfigurationError(f"the public path {path!r} does not start with a slash; write {'/' + path!r}")
        if "*" in path:
            raise ConfigurationError(f"the public path {path!r} has a *, but public paths are exact; list each of them")
    return checked
