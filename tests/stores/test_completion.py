"""The check of a token source of one's own, and the defaults of its optional parts."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from freegpt_auth import ConfigurationError, MemoryTokenStore, Survey
from freegpt_auth.stores.base import CompleteSource
from freegpt_auth.stores.completion import completed

SURVEY = Survey(configured=True, active=1, source="a table")
REQUIRED = {"peek": lambda digest: digest, "resolve": lambda digest: digest * 2, "survey": lambda: SURVEY}


def source(**parts: Any) -> Any:
    """Return a source with the required methods and *parts*; without those that are ``None``."""
    return SimpleNamespace(**{name: part for name, part in {**REQUIRED, **parts}.items() if part is not None})


def test_defaults_complete_a_source() -> None:
    """Three methods are enough: the clock is the host's, nothing is limited or closed, each request is looked up."""
    whole: Any = completed(source())
    assert (whole.peek(b"d"), whole.resolve(b"d"), whole.survey()) == (b"d", b"dd", SURVEY)
    assert (whole.look_up_limit, whole.cache_limit, whole.state()) == (math.inf, math.inf, None)
    assert abs(whole.now() - time.time()) < 60
    whole.close()


def test_parts_of_a_source_are_used() -> None:
    """An optional part that a source has replaces the default; a flag that resembles one is left alone."""
    closed: list[bool] = []
    parts = {"now": lambda: 5.0, "state": lambda: "one", "close": lambda: closed.append(True), "closed": False}
    whole = completed(source(look_up_limit=3, cache_limit=2.0, resolver="dns", lookups=dict, **parts))
    assert (whole.now(), whole.state(), whole.look_up_limit, whole.cache_limit) == (5.0, "one", 3, 2.0)
    whole.close()
    assert closed == [True]


def test_complete_source_is_used_itself() -> None:
    """A store, or a source that inherits the defaults, is not wrapped: it pays for no further call."""
    store = MemoryTokenStore()
    assert completed(store) is store


def test_another_peek_drops_the_state() -> None:
    """A subclass with a ``peek`` of its own is looked up at each request: its base's state may hide a revocation."""

    class Other(MemoryTokenStore):
        def peek(self, digest: bytes) -> None:
            """Find nothing."""

    class Same(MemoryTokenStore):
        """Another survey alone would change nothing."""

    assert Other().state() is CompleteSource.state(Other()) is None
    assert Same().state() is not None


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({"resolve": None}, "has no method resolve; give it peek, resolve, survey"),
        ({"resolve": None, "resolv": print}, "has no resolve, but a resolv; rename it to resolve"),
        ({"lookup_limit": 4}, "has no look_up_limit, but a lookup_limit; rename it to look_up_limit"),
        ({"cach_limit": 4}, "has no cache_limit, but a cach_limit; rename it to cache_limit"),
        ({"closes": print}, "has no close, but a closes; rename it to close"),
        ({"now": 3}, "its now is 3, which cannot be called; make it a method"),
        ({"resolve": anyio.sleep}, "its resolve is asynchronous; make it synchronous: resolve runs in a thread"),
        ({"peek": lambda: None}, "its peek must take one argument, the digest; correct its parameters"),
        ({"state": lambda digest: digest}, "its state must take no argument; correct its parameters"),
        *[({"look_up_limit": limit}, f"its look_up_limit is {limit!r}; make it") for limit in ("4", True, -1)],
        ({"cache_limit": math.nan}, "its cache_limit is nan; make it a number of at least 0"),
    ],
)
def test_faulty_source_is_refused(parts: dict[str, Any], problem: str) -> None:
    """A part that is missing, misspelt or of a wrong type stops the server at its start, in one sentence."""
    with pytest.raises(ConfigurationError) as caught:
        completed(source(**parts))
    assert str(caught.value).startswith("the token source SimpleNamespace")
    assert problem in str(caught.value)


def test_class_is_no_source() -> None:
    """A class in the place of its object is named as that."""
    with pytest.raises(ConfigurationError, match="the token source MemoryTokenStore is a class; pass an object of it"):
        completed(MemoryTokenStore)  # type: ignore[arg-type]


def test_function_without_signature_is_accepted() -> None:
    """A method in C may have no signature: its arguments cannot be checked."""
    assert completed(source(now=time.time, close=type)).now() > 0
