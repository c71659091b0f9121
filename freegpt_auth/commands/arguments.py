"""The parts of the command line that the families share: the store, a token's name, a duration, the owner's rights."""

from __future__ import annotations

import argparse
import contextlib
import re
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

from ..acting import as_owner_of
from ..exceptions import StoreError
from ..names import checked_name, printable
from ..settings import store_location

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from ..location import Location

PROGRAM = "python -m freegpt_auth"
"""The command line in help and messages."""

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def add_command(
    group: argparse._SubParsersAction[argparse.ArgumentParser],
    run: Callable[[argparse.Namespace], int],
    name: str,
    *,
    summary: str,
    example: str,
    in_store: bool = True,
) -> argparse.ArgumentParser:
    """Add the command *name* to *group* and return its parser.

    Args:
        group: the commands of the program.
        run: runs the command with the options and returns the exit status.
        name: of the command.
        summary: one phrase for ``--help``, in lower case.
        example: arguments for a command to copy.
        in_store: add ``--store``, and run the command with no more rights than the owner of that store.
    """
    command = group.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=f"Example: {PROGRAM} {example}"
    )
    if in_store:
        add_store_option(command, default=argparse.SUPPRESS)
    command.set_defaults(run=partial(_run_in_store, run) if in_store else run)
    return command


def add_store_option(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Add ``--store``, which may be given before or after the command."""
    parser.add_argument(
        "--store",
        metavar="PATH|URL",
        default=default,
        help="the token file or database; else FREEGPT_AUTH_STORE, else api_tokens.json in the working directory; "
        "other users of this host can read a password given here, but not one in the variable",
    )


def _run_in_store(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    options.store = store_location(options.store)
    with as_owner(options.store):
        return run(options)


@contextlib.contextmanager
def as_owner(location: Location) -> Generator[None]:
    """Run the block with no more rights than the owner of the store at *location*; see as_owner_of.

    Raises:
        StoreError: the owner's rights cannot be taken, or the working directory was deleted.
    """
    try:
        with as_owner_of(location):
            yield
    except FileNotFoundError:  # of a relative path: neither a store nor stdout raises this error
        raise StoreError("the working directory was deleted; change to another, or give absolute paths") from None


def token_name(text: str) -> str:
    """Return *text* as the name of a token; for ``type=`` of an argument."""
    try:
        return checked_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def instant(text: str) -> datetime:
    """Return the instant of an ISO 8601 date, or date and time; for ``type=`` of an argument.

    Without an offset it is local time: of two instants with the same local time, the earlier one. A date is its
    midnight.
    """
    try:
        moment = datetime.fromisoformat(text).replace(microsecond=0)
    except ValueError:
        problem = f"{printable(text)!r} is not a date; write 2027-01-31, 2027-01-31T18:00, or 2027-01-31T18:00+01:00"
        raise argparse.ArgumentTypeError(problem) from None
    try:
        return moment.astimezone(UTC)
    except (OverflowError, ValueError, OSError):  # at either end of the calendar
        raise argparse.ArgumentTypeError(f"{printable(text)} is too far away; give a nearer date") from None


def duration(text: str) -> int:
    """Return the seconds of ``90d``, ``12h``, ``30m``, ``2w`` or a plain number; for ``type=`` of an argument."""
    match = re.fullmatch(r"([0-9]{1,12})([smhdw]?)", text)
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    try:
        datetime.now(UTC) + timedelta(seconds=seconds)
    except OverflowError:
        raise argparse.ArgumentTypeError(f"{text} is too far away; give a shorter time") from None
    if not seconds:
        raise argparse.ArgumentTypeError(f"{printable(text)!r} is not a time; write 90d, 12h, 30m, 2w or seconds")
    return seconds
