"""Every error this library raises on purpose.

::

    FreeGPTAuthError
    ├── ConfigurationError         the settings contradict each other or cannot be used
    ├── StoreError                 the tokens cannot be read or changed
    │   ├── FileError         what is wrong with the token file, and where
    │   ├── StoreBusyError         somebody else held the lock for too long
    │   ├── StoreUnavailableError  whether a token is valid cannot be known now
    │   ├── TokenNotFoundError     no token answers to a reference
    │   └── AmbiguousTokenError    several tokens do
    └── UsageError                 usage cannot be read or written

Each message is one sentence for an operator: what is wrong, where, and what to do. No message ever holds a secret.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .tokens import Token


class FreeGPTAuthError(Exception):
    """The base of every error of this library."""


class ConfigurationError(FreeGPTAuthError):
    """The settings cannot be used; a server must not start on them."""


class StoreError(FreeGPTAuthError):
    """The tokens cannot be read or changed."""


class FileError(StoreError):
    """The token file cannot be read, understood or written.

    Attributes:
        path: the token file.
        problem: what is wrong with it, in words that follow the path.
        transient: the file could not be opened or read, which may hide a change of it; a later attempt may succeed.
    """

    def __init__(self, path: str, problem: str, *, transient: bool = False) -> None:
        super().__init__(f"{path}: {problem}")
        self.path: str = path
        self.problem: str = problem
        self.transient: bool = transient


class StoreBusyError(StoreError):
    """Another process held the store's lock for longer than this one would wait."""


class StoreUnavailableError(StoreError):
    """Whether a token is valid cannot be known now; the request may be tried again later."""


class TokenNotFoundError(StoreError):
    """No token answers to the reference that was given."""


class AmbiguousTokenError(StoreError):
    """Several tokens answer to the reference that was given, so nothing was done.

    Attributes:
        matches: the tokens that answer to it.
    """

    def __init__(self, message: str, matches: Sequence[Token]) -> None:
        super().__init__(message)
        self.matches: tuple[Token, ...] = tuple(matches)


class UsageError(FreeGPTAuthError):
    """Usage cannot be read or written; the message says why, in words that follow where it is."""
