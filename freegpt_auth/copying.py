"""Copies of a middleware: within the process they share its parts, another process constructs its own."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any, Self

from .guard.modes import AuthMode

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp

    from .construction import Unusable
    from .guard.authenticator import Authenticator
    from .settings import Settings
    from .stores.base import TokenSource


class Copyable:
    """Copies and pickles the middleware that inherits from it.

    A pickle holds settings and no token: the other process reads the environment key and the store itself. Unless the
    pickled one is open, the other process refuses open mode. The URL of a database is pickled with its password.

    Raises:
        TypeError: on pickling, if the token source is an object of this process, or the settings cannot be used.
    """

    app: ASGIApp
    _settings: Settings
    _source: TokenSource | None
    _unusable: Unusable | None
    _authenticator: Authenticator

    def __copy__(self) -> Self:
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = memo[id(self)] = copy.copy(self)
        twin.app = copy.deepcopy(self.app, memo)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        if self._unusable is not None:
            raise TypeError(f"this middleware cannot be pickled: {self._unusable.message}")
        if self._source is not None:
            raise TypeError(
                f"this middleware cannot be pickled: its token source is a {type(self._source).__name__} object of "
                "this process. Give it the path or URL of a store, or construct it in the other process"
            )
        settings, is_open = self._settings, self._authenticator.mode is AuthMode.OPEN
        construct: Callable[..., Copyable] = type(self)
        elsewhere = functools.partial(
            construct,
            # The other process may run in another directory.
            store=None if is_open else settings.store.absolute().text,
            required=not is_open,
            public_paths=settings.public_paths,
            usage="off" if settings.usage is None else settings.usage.absolute().text,
            usage_interval=settings.usage_interval,
            keep_credentials=settings.keep_credentials,
            cors_origins=settings.cors_origins,
        )
        return elsewhere, (self.app,)
