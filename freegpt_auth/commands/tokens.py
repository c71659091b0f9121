"""What each command does: call a store, print. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, TextIO

import msgspec

from ..acting import as_owner_of
from ..exceptions import FreeGPTAuthError, StoreError, UsageError
from ..location import is_url
from ..names import printable
from ..settings import usage_location
from ..stores import open_store, open_usage
from ..stores.base import AtOnce, Migrating
from ..stores.file.disk import explain
from ..tokens import digest_of, issue
from .listing import entry, local, record, title
from .lookup import resolve

if TYPE_CHECKING:
    import argparse
    from collections.abc import Generator, Iterator, Mapping, Sequence

    from ..stores.base import TokenStore, Unseen
    from ..tokens import Token
    from ..usage.base import Usage, UsageStore

    _UsageSetting = tuple[str, str | None]  # the arguments of usage_location


def create(options: argparse.Namespace) -> int:
    """Make a token and print its secret: the only time that it is shown."""
    store = open_store(options.store)
    now = _now(store)
    expires_at = now + timedelta(seconds=options.expires_in) if options.expires_in else None
    token, secret = issue(options.name, now=now, expires_at=expires_at)
    store.add(digest_of(secret), token)
    try:
        print(
            json.dumps({"token": secret, **record(token, None, now.timestamp())}) if options.json else secret,
            flush=True,
        )
    except OSError:
        store.delete(token.id)
        raise
    until = f" until {local(expires_at)}" if expires_at else ""
    say(f"Created token {token.prefix}... for {token.name}{until} in {store.source}.")
    say("Save this token now: it is not shown again.")
    return 0


def list_tokens(options: argparse.Namespace) -> int:
    """Print every token, oldest first."""
    store = open_store(options.store)
    tokens = list(store.tokens().values())
    now, usage = _now(store).timestamp(), _usage(options.store)
    if options.json:
        compact = json.dumps([record(token, usage.get(token.id), now) for token in tokens])
        print(msgspec.json.format(compact, indent=2))  # by json itself it takes 1 s longer at 100,000 tokens
    elif not tokens:
        print("No tokens found.")
        say(f"Is {store.source} where your server's tokens are? If not, give --store. To add a token: create NAME")
    else:
        print(f"Found {len(tokens)} token(s):")
        for number, token in enumerate(tokens, start=1):
            print(f"\n{entry(number, token, usage.get(token.id), now)}")
    return 0


def revoke(options: argparse.Namespace) -> int:
    """Refuse tokens from now on and keep their records."""
    store = open_store(options.store)
    tokens, at = resolve(store, options.references), _now(store)
    # Revoked ones too: the command that revoked them may not have waited for the servers yet.
    ids = [token.id for token in tokens]
    revoked = store.revoke_all(ids, at) if isinstance(store, AtOnce) else (store.revoke(each, at) for each in ids)
    for token, _ in zip(tokens, revoked, strict=True):
        if token.revoked_at is not None:
            say(f"Token {title(token)} was already revoked at {local(token.revoked_at)}.{_in_force(store, '')}")
        else:
            say(f"Revoked token {title(token)}.{_in_force(store)}")
    return 0


def delete(options: argparse.Namespace) -> int:
    """Refuse tokens from now on and remove their records and their usage."""
    store = open_store(options.store)
    tokens = resolve(store, options.references)
    for token in _deleted(store, tokens, (options.store, None)):
        say(f"Deleted token {title(token)}.{_in_force(store)}")
    if not is_url(options.store):  # a server with a database is never open
        with contextlib.suppress(StoreError):  # the token is deleted whether or not the file can be read once more
            if not store.tokens():
                last = "It was the last one" if len(tokens) == 1 else "They were the last ones"
                way_out = f"to turn it off, move {store.source} away and restart the server"
                say(f"{last}. Authentication stays on; {way_out}.")
    return 0


def copy(options: argparse.Namespace) -> int:
    """Put the tokens of one store, and their usage, into another. What is revoked in either is revoked in the second."""
    target = open_store(options.target)
    with as_owner_of(options.origin):  # also for the import of a driver
        origin = open_store(options.origin)
        tokens = origin.tokens()
    if not tokens:
        raise StoreError(f"{origin.source} holds no tokens, so nothing was copied; is it the right one?")
    # Before anything is changed: a setting may be wrong.
    usage_from, usage_to = (usage_location(*_usage_setting(location)) for location in (options.origin, options.target))
    merged, there = target.merge(tokens), target.tokens()
    _copy_usage(usage_from, usage_to, {tokens[digest].id: there[digest].id for digest in tokens if digest in there})
    say(
        f"Copied {len(tokens)} token(s) from {origin.source} to {target.source}: {merged.added} new, "
        f"{merged.revoked} revoked now, {len(tokens) - merged.added - merged.revoked} there already."
        f"{_in_force(target, '')}"
    )
    others = [token for digest, token in there.items() if digest not in tokens]
    if options.delete:
        _delete_others(target, others, origin.source, _usage_setting(options.target))
    else:
        _report_others(target, others, origin.source)
    return 0


def migrate(options: argparse.Namespace) -> int:
    """Bring a database to the schema that this release works with."""
    store = open_store(options.store)
    if not isinstance(store, Migrating):
        say(f"{store.source} is a token file, which needs no schema: there is nothing to do.")
        return 0
    before, after = store.migrate()
    done = "has version" if before == after else f"was brought from version {before} to version"
    say(f"{store.source} {done} {after} of the schema.")
    return 0


def _delete_others(target: TokenStore, others: Sequence[Token], origin: str, usage: _UsageSetting) -> None:
    for token in _deleted(target, others, usage):
        say(f"Deleted token {title(token)}, which {origin} does not hold.{_in_force(target, '')}")


def _report_others(target: TokenStore, others: Sequence[Token], origin: str) -> None:
    active = [token for token in others if token.status(_now(target).timestamp()) == "active"]
    if not active:
        return
    say(f"{target.source} accepts {len(active)} token(s) more, which {origin} does not hold:")
    for token in active:
        say(f"  {token.id}  {title(token)}")
    say("If they were deleted there, run the same again with --delete.")


def _deleted(store: TokenStore, tokens: Sequence[Token], usage: _UsageSetting) -> Iterator[Token]:
    """Delete tokens, all in one change where the store can; yield each when it is deleted, then remove their usage."""
    ids, done = [token.id for token in tokens], []
    try:
        for token in store.delete_all(ids) if isinstance(store, AtOnce) else map(store.delete, ids):
            done.append(token.id)
            yield token
    finally:
        _forget_usage(usage, done)


def _in_force(store: TokenStore, at_once: str = " It is refused from now on.") -> str:
    """Return *at_once*, or the seconds until the last change of *store* is in force in every server process."""
    unseen: Unseen | None = getattr(store, "unseen", None)
    if unseen is None:
        return at_once
    return (
        f" In force everywhere within {unseen.seconds} s: {unseen.processes} server process(es) have not confirmed it."
    )


def _usage(location: str) -> Mapping[str, Usage]:
    path = usage_location(location)
    if path is None:
        return {}
    try:
        with _opened_usage(path) as store:
            return store.read()
    except StoreError as error:
        say(f"freegpt-auth: usage cannot be read and is left out: {error}")
        return {}


@contextlib.contextmanager
def _opened_usage(location: str) -> Generator[UsageStore]:
    """Open the usage at *location* as the owner of its folder; any fault is a ``StoreError`` that names the place."""
    with as_owner_of(location), contextlib.closing(open_usage(location)) as store:
        try:
            yield store
        except UsageError as error:
            raise StoreError(f"{store.source}: {error}") from None


def _usage_setting(location: str) -> _UsageSetting:
    """Return the arguments of ``usage_location``: a database has its own, for files there may be FREEGPT_AUTH_USAGE."""
    return location, location if is_url(location) else None


def _copy_usage(origin: str | None, target: str | None, names: Mapping[str, str]) -> None:
    """Copy the usage of each token, which may have another id in the second store; ``None`` is a place without usage."""
    if origin is None or target is None or origin == target:
        return
    try:
        with _opened_usage(origin) as before:
            usage = {names[token_id]: used for token_id, used in before.read().items() if token_id in names}
        if usage:
            with _opened_usage(target) as after:
                after.merge(usage)
    except StoreError as error:
        raise StoreError(f"the tokens were copied; their usage could not be copied: {error}; run it again") from None


def _forget_usage(setting: _UsageSetting, token_ids: Sequence[str]) -> None:
    """Remove the usage of deleted tokens. A fault is one line and no failure: the tokens are deleted."""
    try:
        location = usage_location(*setting)
        if token_ids and location is not None:
            with _opened_usage(location) as store:
                store.forget(token_ids)
    except (FreeGPTAuthError, OSError) as error:  # OSError: the working directory is gone
        reason = explain(error) if isinstance(error, OSError) else error
        say(f"freegpt-auth: the usage of the deleted token(s) could not be removed: {reason}")


def _now(store: TokenStore) -> datetime:
    """Return the present moment by the clock of the store, to the second."""
    clock = getattr(store, "now", time.time)
    return datetime.fromtimestamp(clock(), UTC).replace(microsecond=0)


def say(message: str) -> None:
    """Tell the operator something that is no data. Where nothing can be told, the command goes on as it would."""
    if sys.stderr is None:  # closed: print() would write to stdout instead
        return
    try:
        print(printable(message), file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Let nothing more be written, not even by the interpreter at exit, which would fail again and end with 120."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
