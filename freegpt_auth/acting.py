"""Root acts as the owner of the folder it works in, and so lends its rights to nobody.

A user may replace a lock, a temporary file or a journal in a folder of their own by a link to a file of root. A command of
root that works there with that user's rights does no more than the user could; its new files belong to the user's server.

In a folder of root it stays root, unless others may write there: then it acts as the owner of the file, or refuses.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import pwd
import stat
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .exceptions import StoreError
from .location import is_url
from .stores.file.access import written_by_others

if TYPE_CHECKING:
    from collections.abc import Generator

_OVERFLOW = 65534
"""Owner shown for files of users that do not exist in this user namespace (user_namespaces(7)), such as the real root."""

_LINK_LIMIT = 40  # as the kernel's (path_resolution(7))


class _Identity(NamedTuple):
    user: int
    group: int
    groups: tuple[int, ...]


_root: ContextVar[_Identity | None] = ContextVar("root", default=None)
"""The identity of root, while it acts as another."""


@contextlib.contextmanager
def as_owner_of(location: str) -> Generator[None]:
    """Let root act as the owner of the folder of *location* until the end of the block; any other user stays itself.

    The effective user and groups of the whole process change, in all threads: it is for commands, not for servers. Blocks
    may be nested. Within a block for the URL of a database root is root.

    Raises:
        StoreError: this process may not act as the owner, or others may write a folder of root.
    """
    before = _current()
    root = _root.get() or before
    if root.user != 0:
        yield
        return
    token = _root.set(root)
    try:
        _become(root)
        owner = root if is_url(location) else _owner_of(os.path.abspath(location), root)
        try:
            _become(owner)
        except OSError as error:
            problem = f"its folder belongs to user {owner.user}, and this process may not act as that user"
            raise StoreError(
                f"{location}: {problem} ({error.strerror}); run the command as user {owner.user}"
            ) from None
        yield
    finally:
        _become(root)
        _become(before)
        _root.reset(token)


@contextlib.contextmanager
def thread_as_owner_of(location: str) -> Generator[None]:
    """Let a server of root touch files as the owner of the folder of *location*, in this thread alone.

    Only the user and group that the kernel checks for files change: setfsuid(2) takes from the thread the capabilities of
    root that concern files, while other threads serve on. Supplementary groups stay.

    Raises:
        StoreError: the system does not offer that or forbids it, or others may write a folder of root.
    """
    root = _current()
    owner = root if root.user != 0 or is_url(location) else _owner_of(os.path.abspath(location), root)
    if owner == root:
        yield
        return
    import ctypes  # noqa: PLC0415  commands do without

    _load()
    libc = ctypes.CDLL(None)
    refusal = StoreError(f"{location}: its folder belongs to user {owner.user}; run the server as that user")
    if not hasattr(libc, "setfsuid"):  # not Linux
        raise refusal
    try:
        libc.setfsgid(owner.group)
        libc.setfsuid(owner.user)
        if libc.setfsuid(-1) != owner.user:  # changes nothing and returns the user
            raise refusal
        yield
    finally:
        libc.setfsuid(root.user)
        libc.setfsgid(root.group)


def _current() -> _Identity:
    return _Identity(os.geteuid(), os.getegid(), tuple(os.getgroups()))


def _become(identity: _Identity) -> None:
    current = _current()
    if identity == current:
        return
    _load()
    if current.user != 0:
        os.seteuid(0)
    os.setgroups(identity.groups)
    os.setegid(identity.group)
    os.seteuid(identity.user)


def _load() -> None:
    """Load each module and codec that is otherwise loaded on first use: the owner may not be able to read Python's files."""
    import filelock  # noqa: F401, PLC0415

    from .stores.file import store, usage  # noqa: F401, PLC0415

    for codec in ("ascii", "unicode_escape"):
        codecs.lookup(codec)


def _owner_of(path: str, root: _Identity) -> _Identity:
    try:
        way, place = _resolve(path)
    except OSError as error:
        raise StoreError(f"{path}: the way to it cannot be followed: {error.strerror}") from None
    status = _status_or_none(place)
    user = way.user
    if way.shared and not user:
        user = status.st_uid if status else 0
        if not user:
            advice = "use a folder that only one user may write, or run this as the user of the server"
            raise StoreError(f"{path}: others may write {way.shared}, so root does not work there; {advice}")
    return _identity_of(user, [status, _status_or_none(place.parent)]) if user else root


def _identity_of(user: int, files: list[os.stat_result | None]) -> _Identity:
    """Return the user with its groups; for a user without an entry, such as in a container, the group of its *files*."""
    try:
        entry = pwd.getpwuid(user)
    except KeyError:
        groups = [one.st_gid for one in files if one and one.st_uid == user]
        group = next(filter(None, groups), user)  # never root's
        return _Identity(user, group, (group,))
    return _Identity(user, entry.pw_gid, tuple(os.getgrouplist(entry.pw_name, entry.pw_gid)))


@dataclass
class _Way:
    """The user that decides the meaning of a path, by the folders passed so far.

    Attributes:
        user: owner of the last folder, or of the nearest one above that is not root's; 0 if all are.
        shared: a folder of root in which others may replace a name of the path.
    """

    user: int = 0
    shared: Path | None = None

    def enter(self, folder: Path, status: os.stat_result, *, is_last: bool) -> None:
        """Take a folder into account, in which the next name is looked up."""
        if status.st_uid and (is_last or status.st_uid != _OVERFLOW):
            self.user = status.st_uid
            return
        is_sticky = status.st_mode & stat.S_ISVTX and not is_last
        if not is_sticky and written_by_others(str(folder), status, trusted_group=0):
            self.shared = folder


def _resolve(path: str) -> tuple[_Way, Path]:
    """Follow *path* name by name; return the deciding user, and the place that the path means.

    A link in a folder of a user, or of a user, ends the way: its target is reached with that user's rights. So does a
    folder that is missing.

    Raises:
        OSError: a link or an ACL cannot be read.
    """
    way, links = _Way(), 0
    folder, place, names = Path("/"), Path(path), _names(path)
    while names and (status := _status_or_none(folder)):
        place = folder / names.pop()
        way.enter(folder, status, is_last=not names)
        entry = _status_or_none(place)
        if entry is None or not stat.S_ISLNK(entry.st_mode):
            folder = place
            continue
        way.user, links = way.user or entry.st_uid, links + 1
        if way.user or way.shared or links > _LINK_LIMIT:
            break
        target = place.readlink()
        names += _names(str(target))
        folder = Path("/") if target.is_absolute() else folder
    return way, place


def _names(path: str) -> list[str]:
    """Return the names of a path, the first of them last."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _status_or_none(place: Path) -> os.stat_result | None:
    try:
        return place.lstat()
    except OSError:
        return None
