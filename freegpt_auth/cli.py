"""The command line: run a command, mask secrets in messages, turn errors into exit statuses.

Exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted. Messages name the remedy.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from typing import TYPE_CHECKING, NoReturn

from .commands import FAMILIES
from .commands.arguments import PROGRAM, add_store_option
from .commands.listing import title
from .commands.output import discard, note, prepare_streams
from .exceptions import AmbiguousTokenError, FreeGPTAuthError
from .location import masked
from .names import printable

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        arguments: without the name of the program; by default those of the process.
    """
    if sys.stdout is None:
        return _fail("cannot write the output: stdout is closed")
    try:
        prepare_streams()
        logging.getLogger("psycopg").addHandler(logging.NullHandler())  # the command explains the driver's errors
        options = _parser().parse_args(arguments)
        status: int = options.run(options)
        sys.stdout.flush()
    except FreeGPTAuthError as error:
        _fail(str(error))
        for token in error.matches if isinstance(error, AmbiguousTokenError) else ():
            note(f"  {token.id}  {title(token)}")
        return 1
    except BrokenPipeError:
        discard(sys.stdout)  # the reader has gone, as in `list | head -1`
        return 1
    except OSError as error:
        discard(sys.stdout)
        return _fail(f"cannot write the output: {error.strerror}")
    except KeyboardInterrupt:
        return 130
    return status


def _fail(message: str) -> int:
    note(f"freegpt-auth: {_masked(message)}")
    return 1


def _masked(text: str) -> str:
    """Mask passwords in URLs, and secrets typed in a wrong place, generated or imported."""
    return re.sub(r"sk-[\w-]{20,}", "sk-…", masked(text))


class _Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, with secrets masked."""

    def error(self, message: str) -> NoReturn:
        shown = re.sub(r"sk-[\w-]+", "sk-…", _masked(printable(message)))
        if "unrecognized arguments" in message:
            shown += "; a name with spaces needs quotes"
        self.exit(2, f"{self.prog}: {shown}; see {self.prog} --help\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # here a full disk is still reported: at exit the interpreter would fail
        super().exit(status, message)


class _Version(argparse.Action):
    """Prints the version, which is read on demand only: no other command needs that import."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version  # noqa: PLC0415

        print(f"freegpt-auth {version('freegpt-auth')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Bearer tokens for OpenAI-compatible servers: create, list, revoke, delete; copy and migrate for a "
        "fleet.",
        epilog=f"Example: {PROGRAM} create my-application",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    add_store_option(parser, default=None)
    group: argparse._SubParsersAction[argparse.ArgumentParser] = parser.add_subparsers(
        title="commands", metavar="COMMAND", parser_class=_Parser, required=True
    )
    for family in FAMILIES:
        family.add_arguments(group)
    return parser
