"""Root drops its rights: it acts as the owner of the folder it works in.

In a folder of their own, users can replace a lock, a temporary file or a journal by a link to a file of root. With the
user's rights, a command of root can do no more there than the user, and its new files belong to the user's server.

In a folder of root, root stays root unless others may write there: then it acts as the owner of the file, or fails.
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
from .location import Location
from .stores.file.access import written_by_others

if TYPE_CHECKING:
    from collections.abc import Generator

_OVERFLOW = 65534
"""Owner of files whose user, such as the real root, does not exist in this user namespace (user_namespaces(7))."""

_LINK_LIMIT = 40  # the limit of the kernel (path_resolution(7))


class _Identity(NamedTuple):
    user: int
    group: int
    groups: tuple[int, ...]


_root: ContextVar[_Identity | None] = ContextVar("root", default=None)
"""The identity of root, while the process acts as another user."""


@contextlib.contextmanager
def as_owner_of(location: Location | str) -> Generator[None]:
    """Run the block as the owner of the folder of *location*, if the process is root; else run it unchanged.

    The effective user and groups of the whole process change, in all threads: for commands, not for servers. Blocks may
    be nested. In a block for the URL of a database, root stays root.

    Raises:
        StoreError: the process is not permitted to act as the owner, or others may write a folder of root.
    """
    before = _current()
    root = _root.get() or before
    if root.user != 0:
        yield
        return
    token = _root.set(root)
    try:
        _become(root)
        place = Location.of(location)
        owner = root if place.is_database else _owner_of(place.absolute().text, root)
        try:
            _become(owner)
        except OSError as error:
            problem = f"its folder belongs to user {owner.user}, and this process may not act as that user"
            raise StoreError(
                f"{place.text}: {problem} ({error.strerror}); run the command as user {owner.user}"
            ) from None
        yield
    finally:
        _become(root)
        _become(before)
        _root.reset(token)


@contextlib.contextmanager
def thread_as_owner_of(location: Location | str) -> Generator[None]:
    """Access files as the owner of the folder of *location*, in this thread only, if the process is root.

    Only the user and group of file access change: setfsuid(2) drops root's file capabilities in this thread, and the
    other threads of the server keep theirs. Supplementary groups stay.

    Raises:
        StoreError: the system has no setfsuid(2) or forbids it, or others may write a folder of root.
    """
    root, place = _current(), Location.of(location)
    owner = root if root.user != 0 or place.is_database else _owner_of(place.absolute().text, root)
    if owner == root:
        yield
        return
    import ctypes  # noqa: PLC0415  commands do not need it

    _preload()
    libc = ctypes.CDLL(None)
    refusal = StoreError(f"{place.text}: its folder belongs to user {owner.user}; run the server as that user")
    if not hasattr(libc, "setfsuid"):  # not Linux
        raise refusal
    try:
        libc.setfsgid(owner.group)
        libc.setfsuid(owner.user)
        if libc.setfsuid(-1) != owner.user:  # -1 changes nothing and returns the current user
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
    _preload()
    if current.user != 0:
        os.seteuid(0)
    os.setgroups(identity.groups)
    os.setegid(identity.group)
    os.seteuid(identity.user)


def _preload() -> None:
    """Load the modules and codecs that are used later: the owner may have no access to their files."""
    import filelock  # noqa: F401, PLC0415

    from .stores.file import store, usage  # noqa: F401, PLC0415

    for codec in ("ascii", "unicode_escape"):
        codecs.lookup(codec)


def _owner_of(path: str, root: _Identity) -> _Identity:
    try:
        owner, place = _resolve(path)
    except OSError as error:
        raise StoreError(f"{path}: the way to it cannot be followed: {error.strerror}") from None
    status = _status_or_none(place)
    user = owner.user
    if owner.shared and not user:
        user = status.st_uid if status else 0
        if not user:
            advice = "use a folder that only one user may write, or run this as the user of the server"
            raise StoreError(f"{path}: others may write {owner.shared}, so root does not work there; {advice}")
    return _identity_of(user, [status, _status_or_none(place.parent)]) if user else root


def _identity_of(user: int, files: list[os.stat_result | None]) -> _Identity:
    """Return *user* with its groups; without a password entry, as in containers, with the group of its *files*."""
    try:
        entry = pwd.getpwuid(user)
    except KeyError:
        groups = [one.st_gid for one in files if one and one.st_uid == user]
        group = next(filter(None, groups), user)  # never 0, the group of root
        return _Identity(user, group, (group,))
    return _Identity(user, entry.pw_gid, tuple(os.getgrouplist(entry.pw_name, entry.pw_gid)))


@dataclass
class _PathOwner:
    """The user that controls the target of a path, derived folder by folder.

    Attributes:
        user: owner of the last folder, or of the nearest one above that is not root's; 0 if all belong to root.
        shared: a folder of root in which others may replace a name of the path.
    """

    user: int = 0
    shared: Path | None = None

    def enter(self, folder: Path, status: os.stat_result, *, is_last: bool) -> None:
        """Update the attributes for *folder*, in which the next name is looked up."""
        if status.st_uid and (is_last or status.st_uid != _OVERFLOW):
            self.user = status.st_uid
            return
        is_sticky = status.st_mode & stat.S_ISVTX and not is_last
        if not is_sticky and written_by_others(str(folder), status, trusted_group=0):
            self.shared = folder


def _resolve(path: str) -> tuple[_PathOwner, Path]:
    """Follow *path* name by name; return its owner, and the place it leads to.

    A link that a user owns, or that stands in a user's folder, is not followed: the target is opened with that user's
    rights. A missing folder ends the path too.

    Raises:
        OSError: a link or an ACL cannot be read.
    """
    owner, links = _PathOwner(), 0
    folder, place, names = Path("/"), Path(path), _names(path)
    while names and (status := _status_or_none(folder)):
        place = folder / names.pop()
        owner.enter(folder, status, is_last=not names)
        entry = _status_or_none(place)
        if entry is None or not stat.S_ISLNK(entry.st_mode):
            folder = place
            continue
        owner.user, links = owner.user or entry.st_uid, links + 1
        if owner.user or owner.shared or links > _LINK_LIMIT:
            break
        target = place.readlink()
        names += _names(str(target))
        folder = Path("/") if target.is_absolute() else folder
    return owner, place


def _names(path: str) -> list[str]:
    """Return the names of *path* in reverse order, for ``pop``."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _status_or_none(place: Path) -> os.stat_result | None:
    try:
        return place.lstat()
    except OSError:
        return None
