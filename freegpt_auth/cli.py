"""The command line: what may be typed, and what an exit status means.

Exit status: 0 done, 1 could not, 2 wrong usage. A failure is one line that says what to do.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import sys
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from .acting import as_owner_of
from .commands import tokens
from .commands.listing import title
from .exceptions import AmbiguousTokenError, FreeGPTAuthError, StoreError
from .names import checked_name, printable
from .settings import copied_locations, store_location

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_COMMAND = "python -m freegpt_auth"
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_REFERENCE_HELP = (
    "the prefix that list shows, a longer part of the token, its id, its exact name if no other token has it, or the "
    "whole token; - to read one from stdin"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    if sys.stdout is None:
        return _fail("cannot write the output: stdout is closed")
    try:
        _prepare_streams()
        logging.getLogger("psycopg").addHandler(logging.NullHandler())  # its errors are explained by ours
        options = _parser().parse_args(arguments)
        _locate(options)
        status: int = options.run(options)
        sys.stdout.flush()
    except FreeGPTAuthError as error:
        _fail(str(error))
        for token in error.matches if isinstance(error, AmbiguousTokenError) else ():
            tokens.say(f"  {token.id}  {title(token)}")
        return 1
    except BrokenPipeError:
        tokens.discard(sys.stdout)  # the reader has gone, as in `list | head -1`
        return 1
    except OSError as error:
        tokens.discard(sys.stdout)
        return _fail(f"cannot write the output: {error.strerror}")
    except KeyboardInterrupt:
        return 130
    return status


def _prepare_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows no check mark still gets a list
    if isinstance(getattr(sys.stdout, "buffer", None), io.RawIOBase):
        # Unbuffered, by -u or PYTHONUNBUFFERED: what a disk that is nearly full does not take would be lost unnoticed.
        raw, encoding, errors = sys.stdout.fileno(), sys.stdout.encoding, sys.stdout.errors
        sys.stdout = os.fdopen(raw, "w", encoding=encoding, errors=errors, closefd=False)


def _fail(message: str) -> int:
    tokens.say(f"freegpt-auth: {_masked(message)}")
    return 1


def _masked(text: str) -> str:
    """Hide what looks like a secret that was typed in a wrong place, generated or imported, and passwords in URLs."""
    text = re.sub(r"(?i)(password=)[^&\s]+", r"\1…", re.sub(r"://[^/@\s:]*:[^\s]*@", "://…@", text))
    return re.sub(r"sk-[\w-]{20,}", "sk-…", text)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and repeats no secret that was typed in a wrong place."""

    def error(self, message: str) -> NoReturn:
        shown = re.sub(r"sk-[\w-]+", "sk-…", _masked(printable(message)))
        if "unrecognized arguments" in message:
            shown += "; a name with spaces needs quotes"
        self.exit(2, f"{self.prog}: {shown}; see {self.prog} --help\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # while there is somebody to say that it failed
        super().exit(status, message)


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version  # noqa: PLC0415

        print(f"freegpt-auth {version('freegpt-auth')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_COMMAND,
        description="Bearer tokens for OpenAI-compatible servers: create, list, revoke, delete; copy and migrate for a fleet.",
        epilog=f"Example: {_COMMAND} create my-application",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    _add_store(parser, default=None)
    group = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser, required=True)

    create = _command(
        group,
        "create",
        tokens.create,
        "create a token and print it, once; a running server accepts it at once",
        "create my-application --expires-in 90d",
    )
    create.add_argument("name", metavar="NAME", type=_name, help="what to call it: the person, app or job that gets it")
    create.add_argument(
        "--expires-in", metavar="TIME", type=_seconds, help="90d, 12h, 30m, 2w or seconds; by default it never expires"
    )
    create.add_argument("--json", action="store_true", help="print the secret and the record as JSON")

    listing = _command(group, "list", tokens.list_tokens, "show every token and when it was last used", "list --json")
    listing.add_argument("--json", action="store_true", help="print records as JSON, with ids and use counts")

    for name, run, summary in (
        ("revoke", tokens.revoke, "refuse tokens for good and keep their records; this cannot be undone"),
        ("delete", tokens.delete, "refuse tokens for good and remove their records"),
    ):
        command = _command(group, name, run, summary, f"{name} sk-a1b2c3d4e5f")
        command.add_argument("references", metavar="TOKEN", nargs="+", help=_REFERENCE_HELP)
    _add_fleet_commands(group)
    return parser


def _add_fleet_commands(group: argparse._SubParsersAction[_Parser]) -> None:
    copy = _command(
        group,
        "copy",
        tokens.copy,
        "put the tokens of one store, and their usage, into another; to do it twice changes nothing more",
        "copy api_tokens.json -",
        in_store=False,
    )
    copy.add_argument(
        "origin", metavar="FROM", help="a token file or the URL of a database; - for the one in FREEGPT_AUTH_STORE"
    )
    copy.add_argument("target", metavar="TO", help="the same; what it holds stays")
    copy.add_argument("--delete", action="store_true", help="also delete the tokens of TO that FROM does not hold")

    _command(
        group,
        "migrate",
        tokens.migrate,
        "make the tables of a database, or bring them to this release; may be run again at any time",
        "--store postgresql://db/tokens migrate",
    )


def _command(
    group: argparse._SubParsersAction[_Parser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    example: str,
    *,
    in_store: bool = True,
) -> argparse.ArgumentParser:
    command = group.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=f"Example: {_COMMAND} {example}"
    )
    if in_store:
        _add_store(command, default=argparse.SUPPRESS)
    command.set_defaults(run=partial(_as_owner, run, "store" if in_store else "target"))
    return command


def _as_owner(run: Callable[[argparse.Namespace], int], changed: str, options: argparse.Namespace) -> int:
    """Run a command with no more rights than the owner of the store that it changes."""
    try:
        with as_owner_of(getattr(options, changed)):
            return run(options)
    except FileNotFoundError:  # of a relative path: stores explain their own errors, and no write to stdout fails so
        raise StoreError("the working directory was deleted; change to another, or give absolute paths") from None


def _add_store(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--store",
        metavar="PATH|URL",
        default=default,
        help="the token file or database; else FREEGPT_AUTH_STORE, else api_tokens.json in the working directory; every user "
        "of this host sees a password given here, and none in the variable",
    )


def _locate(options: argparse.Namespace) -> None:
    """Replace the locations that were typed by those that are meant."""
    if hasattr(options, "origin"):
        options.origin, options.target = copied_locations(options.origin, options.target)
    else:
        options.store = store_location(options.store)


def _name(text: str) -> str:
    try:
        return checked_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seconds(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,12})([smhdw]?)", text)
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    try:
        datetime.now(UTC) + timedelta(seconds=seconds)
    except OverflowError:
        raise argparse.ArgumentTypeError(f"{text} is too far away; leave --expires-in out for never") from None
    if not seconds:
        raise argparse.ArgumentTypeError(f"{printable(text)!r} is not a time; write 90d, 12h, 30m, 2w or seconds")
    return seconds
