"""The check of a token source at construction, and the defaults of its optional parts."""

from __future__ import annotations

import inspect
import math
from difflib import get_close_matches
from typing import TYPE_CHECKING, Final, Literal

from ..exceptions import ConfigurationError
from .base import CompleteSource

if TYPE_CHECKING:
    from ..tokens import Token
    from .base import Survey, TokenSource, Unresolved

_REQUIRED: Final = {"peek": (b"",), "resolve": (b"",), "survey": ()}
_OPTIONAL: Final = {"now": (), "close": (), "state": ()}
_METHODS: Final = {**_REQUIRED, **_OPTIONAL}  # by their arguments
_LIMITS: Final = ("look_up_limit", "cache_limit")
_ALIKE = 0.85  # of difflib; lookup_limit and look_up_limit have 0.96, cach_limit and cache_limit 0.95


def completed(source: TokenSource) -> CompleteSource:
    """Return *source* with the defaults of the optional parts that it lacks.

    Raises:
        ConfigurationError: it lacks a method, or a part of it is misspelt, of a wrong type or asynchronous.
    """
    subject = f"the token source {type(source).__name__}"
    if isinstance(source, type):
        raise ConfigurationError(f"the token source {source.__name__} is a class; pass an object of it")
    _check_names(source, subject)
    for name, arguments in _METHODS.items():
        if hasattr(source, name):
            _check_method(getattr(source, name), f"{subject}: its {name}", arguments)
    for name in _LIMITS:
        if hasattr(source, name):
            _check_limit(getattr(source, name), f"{subject}: its {name}")
    return source if CompleteSource in type(source).__mro__ else _Completed(source)  # type: ignore[return-value]


class _Completed(CompleteSource):
    """A token source with all parts: those of *source*, else the defaults."""

    def __init__(self, source: TokenSource) -> None:
        self._source = source
        for name in (*_OPTIONAL, *_LIMITS):
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))

    def peek(self, digest: bytes) -> Token | Literal[Unresolved.UNRESOLVED] | None:
        """Return the answer of the source."""
        return self._source.peek(digest)

    def resolve(self, digest: bytes) -> Token | None:
        """Return the answer of the source."""
        return self._source.resolve(digest)

    def survey(self) -> Survey:
        """Return the answer of the source."""
        return self._source.survey()


def _check_names(source: object, subject: str) -> None:
    lacking = [name for name in (*_METHODS, *_LIMITS) if not hasattr(source, name)]
    for name in dir(source):
        meant = [] if name.startswith("_") else get_close_matches(name, lacking, n=1, cutoff=_ALIKE)
        # A flag named closed is no misspelt close: it cannot be called.
        if meant and callable(inspect.getattr_static(source, name)) is (meant[0] in _METHODS):
            raise ConfigurationError(f"{subject} has no {meant[0]}, but a {name}; rename it to {meant[0]}")
    missing = [name for name in _REQUIRED if name in lacking]
    if missing:
        raise ConfigurationError(f"{subject} has no method {missing[0]}; give it {', '.join(_REQUIRED)}")


def _check_method(method: object, subject: str, arguments: tuple[object, ...]) -> None:
    if not callable(method):
        raise ConfigurationError(f"{subject} is {method!r}, which cannot be called; make it a method")
    if inspect.iscoroutinefunction(method):
        raise ConfigurationError(f"{subject} is asynchronous; make it synchronous: resolve runs in a thread")
    try:
        inspect.signature(method).bind(*arguments)
    except ValueError:  # some functions in C have no signature
        return
    except TypeError:
        arguments_taken = "one argument, the digest" if arguments else "no argument"
        raise ConfigurationError(f"{subject} must take {arguments_taken}; correct its parameters") from None


def _check_limit(limit: object, subject: str) -> None:
    if not isinstance(limit, (int, float)) or isinstance(limit, bool) or math.isnan(limit) or limit < 0:
        raise ConfigurationError(f"{subject} is {limit!r}; make it a number of at least 0")
