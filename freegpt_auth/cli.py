"""The command line: what may be typed, and what an exit status means.

Exit status: 0 done, 1 could not, 2 wrong usage. A failure is one line that says what to do.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from . import commands
from .exceptions import FreeGPTAuthError
from .settings import store_location
from .stores import open_store
from .tokens import checked_name, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .stores.base import TokenStore

_COMMAND = "python -m freegpt_auth"
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_REFERENCE_HELP = (
    "the prefix that list shows, a longer part of the token, its id, or the whole token; - to read it from stdin"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows no check mark still gets a list
    if sys.stdout is None:
        return _fail("cannot write the output: stdout is closed")
    try:
        options = _parser().parse_args(arguments)
        location = store_location(options.store)
        if "://" not in location:
            location = os.path.abspath(location)  # a command in a wrong folder is then seen to be in one
        status: int = options.run(open_store(location), location, options)
        sys.stdout.flush()
    except FreeGPTAuthError as error:
        return _fail(str(error))
    except BrokenPipeError:
        _discard_output()  # the reader has gone, as in `list | head -1`
        return 1
    except OSError as error:
        _discard_output()
        return _fail(f"cannot write the output: {error.strerror}")
    except KeyboardInterrupt:
        return 130
    return status


def _discard_output() -> None:
    """Let nothing more be written, not even by the interpreter at exit, which would fail again and end with 120."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> int:
    commands.say(f"freegpt-auth: {message}")
    return 1


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and repeats no secret that was typed in a wrong place."""

    def error(self, message: str) -> NoReturn:
        shown = re.sub(r"sk-\w+", "sk-…", printable(message))
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
        description="Bearer tokens for OpenAI-compatible servers: create, list, revoke, delete.",
        epilog=f"Example: {_COMMAND} create my-application",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    _add_store(parser, default=None)
    group = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser, required=True)

    create = _command(
        group,
        "create",
        commands.create,
        "create a token and print it, once; a running server accepts it at once",
        "create my-application --expires-in 90d",
    )
    create.add_argument("name", metavar="NAME", type=_name, help="what to call it: the person, app or job that gets it")
    create.add_argument(
        "--expires-in", metavar="TIME", type=_seconds, help="90d, 12h, 30m, 2w or seconds; by default it never expires"
    )
    create.add_argument("--json", action="store_true", help="print the secret and the record as JSON")

    listing = _command(group, "list", commands.list_tokens, "show every token and when it was last used", "list --json")
    listing.add_argument("--json", action="store_true", help="print records as JSON, with ids and use counts")

    for name, run, summary in (
        ("revoke", commands.revoke, "refuse a token for good and keep its record; this cannot be undone"),
        ("delete", commands.delete, "refuse a token for good and remove its record"),
    ):
        command = _command(group, name, run, summary, f"{name} sk-a1b2c3d4e5f")
        command.add_argument("reference", metavar="TOKEN", help=_REFERENCE_HELP)
    return parser


def _command(
    group: argparse._SubParsersAction[_Parser],
    name: str,
    run: Callable[[TokenStore, str, argparse.Namespace], int],
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    command = group.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=f"Example: {_COMMAND} {example}"
    )
    _add_store(command, default=argparse.SUPPRESS)
    command.set_defaults(run=run)
    return command


def _add_store(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--store",
        metavar="PATH",
        default=default,
        help="the token file; else FREEGPT_AUTH_STORE, else api_tokens.json in the working directory",
    )


def _name(text: str) -> str:
    try:
        return checked_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seconds(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,12})([smhdw]?)", text)
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    try:
        commands.now_in_utc() + timedelta(seconds=seconds)
    except OverflowError:
        raise argparse.ArgumentTypeError(f"{text} is too far away; leave --expires-in out for never") from None
    if not seconds:
        raise argparse.ArgumentTypeError(f"{printable(text)!r} is not a time; write 90d, 12h, 30m, 2w or seconds")
    return seconds
