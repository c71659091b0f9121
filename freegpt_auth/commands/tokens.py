"""The life of a token: ``create``, ``list``, ``revoke``, ``delete``."""

from __future__ import annotations

import contextlib
import json
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from ..exceptions import StoreError
from ..settings import usage_location
from ..stores import open_store
from ..stores.base import AtOnce
from ..tokens import digest_of, issue
from .arguments import add_command, duration, instant, token_name
from .changes import delete_tokens, in_force, now
from .listing import as_json, as_text, local_time, title
from .lookup import resolve
from .output import note
from .usage import read_usage

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ..stores.base import TokenStore
    from ..tokens import Token

_REFERENCE_HELP = (
    "the prefix that list shows, a longer part of the token, its id, its exact name if no other token has it, or the "
    "whole token; - to read one from stdin"
)


def add_arguments(group: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands of this family to *group*."""
    command = add_command(
        group,
        create,
        "create",
        summary="create a token and print it, once; a running server accepts it at once",
        example="create my-application --expires-in 90d",
    )
    command.add_argument(
        "name", metavar="NAME", type=token_name, help="name of the token: the person, app or job that receives it"
    )
    expiry = command.add_mutually_exclusive_group()
    expiry.add_argument(
        "--expires-in", metavar="TIME", type=duration, help="90d, 12h, 30m, 2w or seconds; by default it never expires"
    )
    expiry.add_argument(
        "--expires-at",
        metavar="DATE",
        type=instant,
        help="2027-01-31 (midnight, as the day begins) or 2027-01-31T18:00: times here, unless Z or +01:00 follows",
    )
    command.add_argument("--json", action="store_true", help="print the secret and the record as JSON")

    command = add_command(
        group, list_tokens, "list", summary="show every token and when it was last used", example="list --expiring 7d"
    )
    command.add_argument("--active", action="store_true", help="only tokens that are in force")
    command.add_argument(
        "--expiring", metavar="TIME", type=duration, help="only tokens that are in force and expire within this time"
    )
    command.add_argument("--json", action="store_true", help="print records as JSON, with ids and use counts")

    for name, run, summary in (
        ("revoke", revoke, "refuse tokens for good and keep their records; this cannot be undone"),
        ("delete", delete, "refuse tokens for good and remove their records"),
    ):
        command = add_command(group, run, name, summary=summary, example=f"{name} sk-a1b2c3d4e5f")
        command.add_argument("references", metavar="TOKEN", nargs="+", help=_REFERENCE_HELP)


def create(options: argparse.Namespace) -> int:
    """Issue a token and print its secret, which is never shown again."""
    store = open_store(options.store)
    present = now(store)
    expires_at = present + timedelta(seconds=options.expires_in) if options.expires_in else options.expires_at
    if expires_at is not None and expires_at <= present:
        raise StoreError(f"{local_time(expires_at)} is over, so the token would have expired; give a later time")
    token, secret = issue(options.name, now=present, expires_at=expires_at)
    store.add(digest_of(secret), token)
    record = {"token": secret, **as_json(token, None, present.timestamp())}
    try:
        print(json.dumps(record) if options.json else secret, flush=True)
    except OSError:
        store.delete(token.id)
        raise
    until = f" until {local_time(expires_at)}" if expires_at else ""
    note(f"Created token {token.prefix}... for {token.name}{until} in {store.source}.")
    note("Save this token now: it is not shown again.")
    return 0


def list_tokens(options: argparse.Namespace) -> int:
    """Print the tokens, oldest first: all of them, or the chosen ones."""
    store = open_store(options.store)
    every = list(store.tokens().values())
    present, usage = now(store).timestamp(), read_usage(options.store)
    tokens = _chosen(every, present, active=options.active, expiring=options.expiring)
    if options.json:
        compact = json.dumps([as_json(token, usage.get(token.id), present) for token in tokens])
        print(msgspec.json.format(compact, indent=2))  # json itself takes 1 s longer at 100,000 tokens
    elif not tokens:
        print("No tokens found.")
        if not every:
            note(f"Is {store.source} where your server's tokens are? If not, give --store. To add a token: create NAME")
    else:
        print(f"Found {len(tokens)} token(s):")
        for number, token in enumerate(tokens, start=1):
            print(f"\n{as_text(number, token, usage.get(token.id), present)}")
    return 0


def _chosen(tokens: Sequence[Token], now: float, *, active: bool, expiring: int | None) -> Sequence[Token]:
    """Return the *tokens* in force if *active*, those of them that expire within *expiring* seconds if it is given."""
    if active or expiring is not None:
        tokens = [token for token in tokens if token.status(now) == "active"]
    if expiring is not None:
        tokens = [token for token in tokens if token.expires_at and token.expires_at.timestamp() - now <= expiring]
    return tokens


def revoke(options: argparse.Namespace) -> int:
    """Refuse tokens from now on and keep their records."""
    store = open_store(options.store)
    tokens, at = resolve(store, options.references), now(store)
    # Revoked ones too: the command that revoked them may not have waited for the servers yet.
    ids = [token.id for token in tokens]
    revoked = store.revoke_all(ids, at) if isinstance(store, AtOnce) else (store.revoke(each, at) for each in ids)
    for token, _ in zip(tokens, revoked, strict=True):
        if token.revoked_at is not None:
            since = local_time(token.revoked_at)
            note(f"Token {title(token)} was already revoked at {since}.{in_force(store, '')}")
        else:
            note(f"Revoked token {title(token)}.{in_force(store)}")
    return 0


def delete(options: argparse.Namespace) -> int:
    """Refuse tokens from now on and remove their records and their usage."""
    store = open_store(options.store)
    tokens = resolve(store, options.references)
    for token in delete_tokens(store, tokens, partial(usage_location, options.store)):
        note(f"Deleted token {title(token)}.{in_force(store)}")
    if options.store.can_be_open:
        _report_empty(store, tokens)
    return 0


def _report_empty(store: TokenStore, deleted: Sequence[Token]) -> None:
    with contextlib.suppress(StoreError):  # the tokens are deleted whether or not the file can be read once more
        if not store.tokens():
            last = "It was the last one" if len(deleted) == 1 else "They were the last ones"
            way_out = f"to turn it off, move {store.source} away and restart the server"
            note(f"{last}. Authentication stays on; {way_out}.")
