"""Reading and changing the token file by a command. A change holds the lock and is atomic."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from ...exceptions import FileError, StoreError
from . import disk
from .document import Document
from .lock import locked

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")


def read(path: str, parse: Callable[[bytes | None], _T]) -> _T:
    """Return ``parse(content)``, where *content* is the bytes of the file, or ``None`` if there is no file.

    Raises:
        FileError: the file cannot be read, or *parse* raised a ``ValueError``.
    """
    try:
        return disk.read_file(path, lambda file: parse(file.read()))[1]
    except FileNotFoundError as error:
        if disk.signature_at(path) != disk.MISSING:  # an unread file must not be replaced by a new one
            raise FileError(path, f"it {error.strerror}") from None
        return parse(None)
    except ValueError as error:
        raise FileError(path, f"{error}; restore a copy, or move it away and create new tokens") from None


def change(path: str, edit: Callable[[Document], _T], lock_timeout: float) -> _T:
    """Edit the file, and replace it if *edit* changed the document; return the result of *edit*.

    Args:
        path: of the file, which need not exist.
        edit: changes the document.
        lock_timeout: seconds to wait for another writer.

    Raises:
        StoreError: the file cannot be changed, and is as before.
    """
    target = disk.real_path(path)
    with locked(target, lock_timeout):
        document = read(path, Document)
        try:
            result = edit(document)
            content = document.encode() if document.changed else None
        except ValueError as error:
            problem = f"nothing was changed, since the change cannot be kept: {error}"
            raise StoreError(f"{path}: {problem}") from None
        if content is not None:
            disk.replace_file(target, content)
    return result
