"""The environment key: the single key in an environment variable, or in a file named by one."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .exceptions import ConfigurationError
from .regular_file import UnsuitableFileError, open_regular
from .tokens import VALUE_LIMIT, digest_of
from .variables import VARIABLES, cleaned, is_off

if TYPE_CHECKING:
    from .variables import Variables

_SCHEME = "bearer "

FILE_LIMIT = 1024 * 1024
"""Largest size of a key file, in bytes."""


@dataclass(frozen=True)
class EnvironmentKey:
    """The environment key as its digest; the key itself is not kept.

    Attributes:
        digest: SHA-256 of the key.
        source: name of the variable.
    """

    digest: bytes = field(repr=False)
    source: str


def environment_key(variables: Variables) -> EnvironmentKey | None:
    """Return the key of the first set variable: ``FREEGPT_API_KEY``, ``FREEGPT_API_KEY_FILE``, ``OPENAI_API_KEY``.

    Raises:
        ConfigurationError: the key cannot be used. An empty variable is an error: it must not open a server.
    """
    if "FREEGPT_API_KEY" in variables and "FREEGPT_API_KEY_FILE" in variables:
        raise ConfigurationError("FREEGPT_API_KEY and FREEGPT_API_KEY_FILE are both set; unset one of them")
    for name in ("FREEGPT_API_KEY", "FREEGPT_API_KEY_FILE", "OPENAI_API_KEY"):
        value = _from_file(variables, name) if name == "FREEGPT_API_KEY_FILE" else variables.text(name)
        if value is not None:
            return EnvironmentKey(digest_of(_checked(name, value)), name)
    return None


def _from_file(variables: Variables, name: str) -> str | None:
    path = variables.location(name)
    return path and cleaned(f"the file of {name}", _content(path), VARIABLES[name].advice, kind="secret")


def _content(path: str) -> str:
    try:
        descriptor, _ = open_regular(path, FILE_LIMIT)
        with os.fdopen(descriptor, "rb") as file:
            return file.read(FILE_LIMIT).decode()
    except UnicodeDecodeError:
        problem = "it is not UTF-8 text"
    except UnsuitableFileError as error:
        problem = str(error)
    except OSError as error:
        problem = error.strerror or str(error)
    # The path is not shown: an operator may have put the key itself there.
    raise ConfigurationError(f"FREEGPT_API_KEY_FILE does not name a file that can be read: {problem}")


def _checked(name: str, key: str) -> str:
    if is_off(key):  # the word would be a valid credential
        raise ConfigurationError(f"{name} is a word for off; to have no environment key, unset it")
    if key[: len(_SCHEME)].lower() == _SCHEME:  # requests whose secret begins with the word are refused
        raise ConfigurationError(f"{name} begins with the word Bearer, which is no part of a key; remove it")
    if not key.isprintable():
        raise ConfigurationError(f"{name} holds a control character, which no client can send; give it another key")
    if len(key.encode("utf-8", "surrogateescape")) > VALUE_LIMIT:
        raise ConfigurationError(f"{name} is longer than {VALUE_LIMIT} bytes, which no request may be; shorten it")
    return key
