"""The commands: parse, call a store, print. Data goes to stdout, everything else to stderr.

Exit status: 0 done, 1 could not, 2 wrong usage. A failure is one line that says what to do.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NoReturn

from .exceptions import AmbiguousTokenError, FreeGPTAuthError, TokenNotFoundError
from .listing import entry, local, record, title
from .settings import store_location, usage_location
from .stores import open_store
from .tokens import PREFIX_LENGTH, checked_name, digest_of, find, issue, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .stores.base import TokenStore
    from .tokens import Token
    from .usage import Usage

_COMMAND = "python -m freegpt_auth"
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_REFERENCE_HELP = (
    "the prefix that list shows, more of the secret, the token id, or the whole secret; - reads it from stdin"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows no check mark still gets a list
    options = _parser().parse_args(arguments)
    try:
        location = store_location(options.store)
        status: int = options.run(open_store(location), location, options)
        sys.stdout.flush()
    except FreeGPTAuthError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # The reader has gone, as in `list | head -1`; nothing more may be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"cannot write the output: {error.strerror}")
    except KeyboardInterrupt:
        return 130
    return status


def _fail(message: str) -> int:
    _say(f"freegpt-auth: {message}")
    return 1


def _say(message: str) -> None:
    print(message, file=sys.stderr)


# --- the commands


def _create(store: TokenStore, location: str, options: argparse.Namespace) -> int:
    now = _now()
    expires_at = _after(now, options.expires_in) if options.expires_in else None
    token, secret = issue(options.name, now=now, expires_at=expires_at)
    store.add(digest_of(secret), token)
    try:
        print(json.dumps({"token": secret, **record(token, None, now)}) if options.json else secret, flush=True)
    except OSError:
        store.delete(token.id)
        raise
    until = f" until {local(expires_at)}" if expires_at else ""
    _say(f"Created token {token.prefix}... for {token.name}{until} in {location}.")
    _say("Save this token now: it is not shown again.")
    return 0


def _list(store: TokenStore, location: str, options: argparse.Namespace) -> int:
    now, usage = _now(), _usage(location)
    tokens = list(store.tokens().values())
    if options.json:
        print(json.dumps([record(token, usage.get(token.id), now) for token in tokens], indent=2))
    elif not tokens:
        print("No tokens found.")
        _say(f"Create one: {_COMMAND} create NAME")
    else:
        print(f"Found {len(tokens)} token(s):")
        for number, token in enumerate(tokens, start=1):
            print(f"\n{entry(number, token, usage.get(token.id), now)}")
    return 0


def _revoke(store: TokenStore, location: str, options: argparse.Namespace) -> int:
    token = _referred(store, location, options.reference)
    if token.revoked_at is not None:
        _say(f"Token {title(token)} was revoked before, at {local(token.revoked_at)}.")
        return 0
    store.revoke(token.id, _now())
    _say(f"Revoked token {title(token)}. It is refused from now on.")
    return 0


def _delete(store: TokenStore, location: str, options: argparse.Namespace) -> int:
    token = store.delete(_referred(store, location, options.reference).id)
    _say(f"Deleted token {title(token)}. It is refused from now on.")
    if not store.tokens():
        _say(
            f"It was the last one. Authentication stays on; to turn it off, move {location} away and restart the server."
        )
    return 0


def _referred(store: TokenStore, location: str, reference: str) -> Token:
    """Return the one token that *reference* means."""
    if reference == "-":
        reference = sys.stdin.readline().strip()
    matches = find(reference, dict(store.tokens()))
    if not matches:
        # The reference may be a secret, and is not repeated.
        raise TokenNotFoundError(
            f"no token of {location} matches; give the {PREFIX_LENGTH} characters that list shows, "
            "the token id or the whole token"
        )
    if len(matches) > 1:
        lines = "".join(f"\n  {token.id}  {title(token)}" for token in matches)
        raise AmbiguousTokenError(
            f"{len(matches)} tokens match and nothing was done; give one of these ids:{lines}", matches
        )
    return matches[0]


def _usage(location: str) -> Mapping[str, Usage]:
    import sqlite3  # noqa: PLC0415  only list needs it

    from .usage import read_usage  # noqa: PLC0415

    path = usage_location(location)
    try:
        return read_usage(path) if path else {}
    except (OSError, sqlite3.Error) as error:
        _say(f"freegpt-auth: the usage in {path} cannot be read and is left out: {error}")
        return {}


# --- what is typed


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)}; see {self.prog} --help\n")


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
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser, required=True)

    create = _command(
        commands,
        "create",
        _create,
        "make a token and print its secret, once",
        "create my-application --expires-in 90d",
    )
    create.add_argument("name", metavar="NAME", type=_name, help="what to call it: the person, app or job that gets it")
    create.add_argument(
        "--expires-in", metavar="TIME", type=_seconds, help="90d, 12h, 30m, 2w or seconds; never by default"
    )
    create.add_argument("--json", action="store_true", help="print the secret and the record as JSON")

    listing = _command(commands, "list", _list, "show every token", "list --json")
    listing.add_argument("--json", action="store_true", help="print records as JSON, with ids and use counts")

    for name, run, summary in (
        ("revoke", _revoke, "refuse a token from now on and keep its record"),
        ("delete", _delete, "refuse a token from now on and remove its record"),
    ):
        command = _command(commands, name, run, summary, f"{name} sk-a1b2c3d4e5f")
        command.add_argument("reference", metavar="REF", help=_REFERENCE_HELP)
    return parser


def _command(
    commands: argparse._SubParsersAction[_Parser],
    name: str,
    run: Callable[[TokenStore, str, argparse.Namespace], int],
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(
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
        _after(_now(), seconds)
    except OverflowError:
        raise argparse.ArgumentTypeError(f"{text} is too far away; leave --expires-in out for never") from None
    if not seconds:
        raise argparse.ArgumentTypeError(f"{printable(text)!r} is no time; write 90d, 12h, 30m, 2w or seconds")
    return seconds


def _after(now: datetime, seconds: int) -> datetime:
    return now + timedelta(seconds=seconds)


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
