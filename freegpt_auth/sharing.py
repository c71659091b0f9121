"""One store and one usage recorder for each location in a process, shared by the middlewares over it.

Litestar constructs one middleware for each route: 32 stores of 100,000 tokens took 1,511 MiB and 10.4 s, one takes 62
MiB and 1.5 s.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, TypeVar

from .forks import Lock

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")

_shared: weakref.WeakValueDictionary[tuple[object, ...], Any] = weakref.WeakValueDictionary()
_lock = Lock()


def shared(make: Callable[[], _T], *key: object) -> _T:
    """Return this process's object for *key*, made by *make* if there is none. It lives as long as its users.

    *make* runs without the lock, so that a slow source delays no other. Of two objects made at once, one is discarded.
    """
    with _lock:
        found: _T | None = _shared.get(key)
    if found is not None:
        return found
    made = make()
    with _lock:
        first: _T = _shared.setdefault(key, made)
    return first
