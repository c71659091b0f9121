"""What each command does: call a store, print. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from .exceptions import AmbiguousTokenError, TokenNotFoundError
from .listing import entry, local, record, title
from .settings import usage_location
from .tokens import SECRET_LENGTH, digest_of, find, has_valid_checksum, issue

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from .stores.base import TokenStore
    from .tokens import Token
    from .usage_database import Usage


def create(store: TokenStore, location: str, options: argparse.Namespace) -> int:
    """Make a token and print its secret: the only time that it is shown."""
    now = now_in_utc()
    expires_at = now + timedelta(seconds=options.expires_in) if options.expires_in else None
    token, secret = issue(options.name, now=now, expires_at=expires_at)
    store.add(digest_of(secret), token)
    try:
        print(json.dumps({"token": secret, **record(token, None, now)}) if options.json else secret, flush=True)
    except OSError:
        store.delete(token.id)
        raise
    until = f" until {local(expires_at)}" if expires_at else ""
    say(f"Created token {token.prefix}... for {token.name}{until} in {location}.")
    say("Save this token now: it is not shown again.")
    return 0


def list_tokens(store: TokenStore, location: str, options: argparse.Namespace) -> int:
    """Print every token, oldest first."""
    tokens = list(store.tokens().values())
    now, usage = now_in_utc(), _usage(location)
    if options.json:
        print(json.dumps([record(token, usage.get(token.id), now) for token in tokens], indent=2))
    elif not tokens:
        print("No tokens found.")
        say(f"Is {location} your server's token file? If not, give --store PATH. To add a token: create NAME")
    else:
        print(f"Found {len(tokens)} token(s):")
        for number, token in enumerate(tokens, start=1):
            print(f"\n{entry(number, token, usage.get(token.id), now)}")
    return 0


def revoke(store: TokenStore, location: str, options: argparse.Namespace) -> int:
    """Refuse a token from now on and keep its record."""
    token = _referred(store, location, options.reference)
    if token.revoked_at is not None:
        say(f"Token {title(token)} was already revoked at {local(token.revoked_at)}.")
        return 0
    store.revoke(token.id, now_in_utc())
    say(f"Revoked token {title(token)}. It is refused from now on.")
    return 0


def delete(store: TokenStore, location: str, options: argparse.Namespace) -> int:
    """Refuse a token from now on and remove its record."""
    token = store.delete(_referred(store, location, options.reference).id)
    say(f"Deleted token {title(token)}. It is refused from now on.")
    if not store.tokens():
        say(
            f"It was the last one. Authentication stays on; to turn it off, move {location} away and restart the server."
        )
    return 0


def _referred(store: TokenStore, location: str, reference: str) -> Token:
    """Return the one token that *reference* means."""
    if reference == "-":
        reference = _typed()
    reference = reference.strip()
    matches = find(reference, store.tokens())
    if not matches:
        # The reference may be a secret, and is not repeated.
        mistyped = len(reference) == SECRET_LENGTH and not has_valid_checksum(reference)
        why = "it is mistyped, since its checksum is wrong" if mistyped else "it is none of them"
        raise TokenNotFoundError(
            f"no token of {location} matches: {why}; give the prefix that list shows, the token id or the whole token"
        )
    if len(matches) > 1:
        lines = "".join(f"\n  {token.id}  {title(token)}" for token in matches)
        raise AmbiguousTokenError(
            f"{len(matches)} tokens match and nothing was done; give one of these ids:{lines}", matches
        )
    return matches[0]


def _typed() -> str:
    try:
        return sys.stdin.readline().strip() if sys.stdin else ""
    except UnicodeDecodeError:
        return ""


def _usage(location: str) -> Mapping[str, Usage]:
    import sqlite3  # noqa: PLC0415  only list needs it

    from .usage_database import read_usage  # noqa: PLC0415

    path = usage_location(location)
    try:
        return read_usage(path) if path else {}
    except (OSError, sqlite3.Error) as error:
        say(f"freegpt-auth: the usage in {path} cannot be read and is left out: {error}")
        return {}


def now_in_utc() -> datetime:
    """Return the present moment, to the second."""
    return datetime.now(UTC).replace(microsecond=0)


def say(message: str) -> None:
    """Tell the operator something that is no data."""
    if sys.stderr is not None:  # closed: print() would write to stdout instead
        print(message, file=sys.stderr)
