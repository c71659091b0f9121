"""Settings, from the environment and from keyword arguments. The only reader of ``os.environ``."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .environment_key import environment_key
from .exceptions import ConfigurationError
from .guard.cors import checked_origins
from .location import Location
from .stores.base import CACHE_LIMIT, LEASE
from .variables import VARIABLES, Variables, cleaned, expanded, is_off

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .environment_key import EnvironmentKey

USAGE_INTERVAL = 2.0
"""Interval between two writes of usage, in seconds."""

DEFAULT_STORE = Location("api_tokens.json")
"""The default token file, in the working directory."""


@dataclass(frozen=True)
class Settings:
    """The settings of a middleware. ``repr`` leaves locations out: the URL of a database may hold a password.

    Attributes:
        store: location of the tokens.
        key: the environment key, if one is set.
        public_paths: exact paths that need no token.
        required: refuse to start in open mode.
        store_named: an argument or ``FREEGPT_AUTH_STORE`` names the store: the server is never open.
        usage: location of the usage; ``None`` to record none.
        usage_interval: seconds between two writes of usage.
        lease: seconds for which known tokens are accepted while the database cannot be reached.
        cache_limit: largest number of tokens of a database in memory.
        keep_credentials: leave the verified credential in the scope.
        cors_origins: origins of web pages that may read a denial.
    """

    store: Location = DEFAULT_STORE
    key: EnvironmentKey | None = None
    public_paths: frozenset[str] = frozenset()
    required: bool = False
    store_named: bool = False
    usage: Location | None = None
    usage_interval: float = USAGE_INTERVAL
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
        usage_interval: float = USAGE_INTERVAL,
        keep_credentials: bool | None = None,
        cors_origins: Iterable[str] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Settings:
        """Return the settings. An argument takes precedence over its variable.

        Args:
            store: ``FREEGPT_AUTH_STORE``, by default ``api_tokens.json`` in the working directory.
            public_paths: ``FREEGPT_AUTH_PUBLIC_PATHS``, separated by commas; by default none.
            required: ``FREEGPT_AUTH_REQUIRED``; by default no.
            usage: ``FREEGPT_AUTH_USAGE``, or ``off``; by default beside the tokens.
            usage_interval: seconds between two writes of usage; a killed process loses at most this much.
            keep_credentials: ``FREEGPT_AUTH_KEEP_CREDENTIALS``; by default no.
            cors_origins: ``FREEGPT_AUTH_CORS_ORIGINS``, separated by commas; by default none.
            environ: the environment; by default ``os.environ``.

        Raises:
            ConfigurationError: a value cannot be used. The message names the variable or the argument.
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


def store_location(store: str | os.PathLike[str] | None = None, environ: Mapping[str, str] | None = None) -> Location:
    """Return the location of the tokens: *store*, else ``FREEGPT_AUTH_STORE``, else ``api_tokens.json``.

    Raises:
        ConfigurationError: the value is rejected by :class:`~freegpt_auth.variables.Variables` or
            :meth:`~freegpt_auth.location.Location.of`, or is a word for off.
    """
    location, subject = _location("FREEGPT_AUTH_STORE", "the store", store, environ)
    if location is None:
        return DEFAULT_STORE
    if is_off(location):
        raise ConfigurationError(f"{subject} is a word for off, but a store cannot be turned off; name a token file")
    return Location.of(location, subject)


def copied_locations(origin: str, target: str, environ: Mapping[str, str] | None = None) -> tuple[Location, Location]:
    """Return the two locations of ``copy``; ``-`` stands for ``FREEGPT_AUTH_STORE``.

    A password belongs in the variable: every user of a host can read the arguments of a process, not its environment.

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
    store: Location, usage: str | os.PathLike[str] | None = None, environ: Mapping[str, str] | None = None
) -> Location | None:
    """Return the location of the usage: *usage*, else ``FREEGPT_AUTH_USAGE``, else beside the tokens in *store*.

    A word for off returns ``None``.

    Raises:
        ConfigurationError: the location cannot be used, is the token file, or is the URL, in the variable, of another
            database than the tokens'.
    """
    location, subject = _location("FREEGPT_AUTH_USAGE", "the usage database", usage, environ)
    if location is None:
        return store.default_usage()
    if is_off(location):
        return None
    place = Location.of(location, subject)
    if place.is_same_file(store):
        raise ConfigurationError(f"{subject} names the token file; name another file, say off, or unset it")
    if place.is_database and usage is None and place != store:  # it could not count these tokens
        raise ConfigurationError(
            "FREEGPT_AUTH_USAGE is the URL of another database than the tokens'; name a file, say off, or unset it"
        )
    return place


def _location(
    name: str, subject: str, argument: str | os.PathLike[str] | None, environ: Mapping[str, str] | None
) -> tuple[str | None, str]:
    """Return the location of *argument*, else of the variable *name*, and the subject of messages about it."""
    if argument is None:
        return Variables(os.environ if environ is None else environ).location(name), name
    return expanded(cleaned(subject, os.fsdecode(argument), VARIABLES[name].advice, kind="location")), subject


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
