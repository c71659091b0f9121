"""Every error that this library raises on purpose.

::

    FreeGPTAuthError
    ├── ConfigurationError         the settings contradict each other or cannot be used
    ├── StoreError                 the tokens cannot be read or changed
    │   ├── FileError              a file cannot be read, understood, locked or written
    │   ├── StoreBusyError         another process held the lock for too long
    │   ├── StoreUnavailableError  the store cannot be read now, so a token may be valid or not
    │   ├── TokenNotFoundError     no token matches a reference
    │   └── AmbiguousTokenError    several tokens match a reference
    └── UsageError                 usage cannot be read or written

Each message is one sentence for an operator: the fault, its place and the remedy. No message holds a secret.
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
    """A file cannot be read, understood, locked or written.

    Attributes:
        path: of the file.
        problem: the fault, in words that follow the path in the message.
        transient: the file could not be opened or read: it may have changed unseen, and a later attempt may succeed.
    """

    def __init__(self, path: str, problem: str, *, transient: bool = False) -> None:
        super().__init__(f"{path}: {problem}")
        self.path: str = path
        self.problem: str = problem
        self.transient: bool = transient


class StoreBusyError(StoreError):
    """Another process held the store's lock for longer than the time limit of this one."""


class StoreUnavailableError(StoreError):
    """The store cannot be read now, so a token may be valid or not; the client may retry later."""


class TokenNotFoundError(StoreError):
    """No token matches the reference."""


class AmbiguousTokenError(StoreError):
    """Several tokens match the reference, so nothing was done.

    Attributes:
        matches: the tokens.
    """

    def __init__(self, message: str, matches: Sequence[Token]) -> None:
        super().__init__(message)
        self.matches: tuple[Token, ...] = tuple(matches)


class UsageError(FreeGPTAuthError):
    """Usage cannot be read or written. The message is the reason, in words that follow the location."""
