"""What the operator decided, from the environment and from keyword arguments. The only reader of ``os.environ``."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .environment_key import environment_key
from .exceptions import ConfigurationError
from .guard.cors import checked_origins
from .location import is_url
from .stores.base import CACHE_LIMIT, LEASE
from .variables import VARIABLES, Variables, cleaned, expanded, is_off

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .environment_key import EnvironmentKey

FLUSH_INTERVAL = 2.0
"""Seconds between two writes of usage."""

DEFAULT_STORE = "api_tokens.json"
"""The token file when none is named: in the working directory."""


@dataclass(frozen=True)
class Settings:
    """What a middleware is built from. It shows no secret: the URL of a database may hold a password.

    Attributes:
        store: the location of the tokens.
        key: the environment key, if one is set.
        public_paths: exact paths that need no token.
        required: refuse to start in open mode.
        store_named: an argument or ``FREEGPT_AUTH_STORE`` names the store: the server is never open.
        usage: where usage is kept; ``None`` to record nothing.
        usage_interval: seconds between two writes to it.
        lease: seconds for which known tokens are accepted while the database cannot be reached.
        cache_limit: how many tokens of a database are kept in memory.
        keep_credentials: leave the verified credential in the scope.
        cors_origins: origins of web pages that may read a refusal.
    """

    store: str = field(default=DEFAULT_STORE, repr=False)
    key: EnvironmentKey | None = None
    public_paths: frozenset[str] = frozenset()
    required: bool = False
    store_named: bool = False
    usage: str | None = field(default=None, repr=False)
    usage_interval: float = FLUSH_INTERVAL
    lease: float = LEASE
    cache_limit: int = CACHE_LIMIT
    keep_credentials: bool = False
    cors_origins: frozenset[str] = frozenset()

    @classmethod
    def from_env(
        cls,
        *,
        store: str | os.PathLike[str] | None = None,
        public_paths: Iterable[str] | None = None,
        required: bool | None = None,
        usage: str | os.PathLike[str] | None = None,
        usage_interval: float = FLUSH_INTERVAL,
        keep_credentials: bool | None = None,
        cors_origins: Iterable[str] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Settings:
        """Read the settings. An argument that is given wins over its variable.

        Args:
            store: ``FREEGPT_AUTH_STORE``, by default ``api_tokens.json`` in the working directory.
            public_paths: ``FREEGPT_AUTH_PUBLIC_PATHS``, separated by commas there; by default none.
            required: ``FREEGPT_AUTH_REQUIRED``; by default no.
            usage: ``FREEGPT_AUTH_USAGE``, or ``off``; by default beside the tokens.
            usage_interval: seconds between two writes of usage: what a killed process can lose.
            keep_credentials: ``FREEGPT_AUTH_KEEP_CREDENTIALS``; by default no.
            cors_origins: ``FREEGPT_AUTH_CORS_ORIGINS``, separated by commas there; by default none.
            environ: the environment; by default ``os.environ``.

        Raises:
            ConfigurationError: a value cannot be used; the message names the variable or the argument.
        """
        env = os.environ if environ is None else environ
        variables = Variables(env)
        if not 0 < usage_interval <= threading.TIMEOUT_MAX:
            raise ConfigurationError(f"usage_interval is {usage_interval}; give it a number of seconds above 0")
        location = store_location(store, env)
        if public_paths is None:
            public_paths = variables.listed("FREEGPT_AUTH_PUBLIC_PATHS")
        if cors_origins is None:
            cors_origins = variables.listed("FREEGPT_AUTH_CORS_ORIGINS")
        return cls(
            store=location,
            store_named=store is not None or "FREEGPT_AUTH_STORE" in variables,
            key=environment_key(variables),
            public_paths=_checked_paths(public_paths),
            required=variables.flag("FREEGPT_AUTH_REQUIRED") if required is None else required,
            usage=usage_location(location, usage, env),
            usage_interval=usage_interval,
            lease=variables.number("FREEGPT_AUTH_LEASE", LEASE),
            cache_limit=int(variables.number("FREEGPT_AUTH_CACHE", CACHE_LIMIT)),
            keep_credentials=(
                variables.flag("FREEGPT_AUTH_KEEP_CREDENTIALS") if keep_credentials is None else keep_credentials
            ),
            cors_origins=checked_origins(cors_origins),
        )


def store_location(store: str | os.PathLike[str] | None = None, environ: Mapping[str, str] | None = None) -> str:
    """Return the location of the tokens: *store*, else ``FREEGPT_AUTH_STORE``, else ``api_tokens.json``.

    Raises:
        ConfigurationError: it cannot be used: see :class:`~freegpt_auth.variables.Variables` and
            :func:`~freegpt_auth.location.is_url`.
    """
    location, subject = _location("FREEGPT_AUTH_STORE", "the store", store, environ)
    if location is None:
        return DEFAULT_STORE
    if is_off(location):
        raise ConfigurationError(f"{subject} is a word for off, but a store cannot be turned off; name a token file")
    is_url(location, subject)
    return location


def copied_locations(origin: str, target: str, environ: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Return the locations of a copy; ``-`` stands for the one in ``FREEGPT_AUTH_STORE``.

    The arguments of a process are visible to every user of its host, its environment is not: a password belongs there.

    Raises:
        ConfigurationError: both are ``-``, the variable is not set, or a location cannot be used.
    """
    env = os.environ if environ is None else environ
    if origin == target == "-":
        raise ConfigurationError("FROM and TO are both -, which stands for FREEGPT_AUTH_STORE; name one of the stores")
    if "-" in (origin, target) and "FREEGPT_AUTH_STORE" not in env:
        raise ConfigurationError("- stands for FREEGPT_AUTH_STORE, which is not set; set it, or name the store")
    first, second = (store_location(None if each == "-" else each, env) for each in (origin, target))
    return first, second


def usage_location(
    store: str, usage: str | os.PathLike[str] | None = None, environ: Mapping[str, str] | None = None
) -> str | None:
    """Return the location of the usage: *usage*, else ``FREEGPT_AUTH_USAGE``, else beside the tokens in *store*.

    Returns:
        ``None`` for a word for off.

    Raises:
        ConfigurationError: the location cannot be used, it is the token file, or the variable names a database that does
            not hold the tokens.
    """
    location, subject = _location("FREEGPT_AUTH_USAGE", "the usage database", usage, environ)
    if location is None:
        return _beside(store)
    if is_off(location):
        return None
    if not is_url(location, subject):
        if os.path.realpath(location) == os.path.realpath(store):
            raise ConfigurationError(f"{subject} names the token file; name another file, say off, or unset it")
    elif usage is None and location != store:  # it could not count these tokens
        raise ConfigurationError(
            "FREEGPT_AUTH_USAGE is the URL of another database than the tokens'; name a file, say off, or unset it"
        )
    return location


def _location(
    name: str, subject: str, argument: str | os.PathLike[str] | None, environ: Mapping[str, str] | None
) -> tuple[str | None, str]:
    """Return the argument, else the value of the variable *name*, and its subject in a message."""
    if argument is None:
        return Variables(os.environ if environ is None else environ).location(name), name
    return expanded(cleaned(subject, os.fsdecode(argument), VARIABLES[name].advice, kind="location")), subject


def _beside(store: str) -> str:
    if is_url(store):
        return store
    try:
        return str(Path(store).with_suffix(".usage.db"))
    except ValueError:
        raise ConfigurationError(f"{store} is a folder; name a token file") from None


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
