"""Stores of a fleet: ``copy`` between files and databases, ``migrate`` for the tables of a database."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..acting import as_owner_of
from ..exceptions import StoreError
from ..settings import copied_locations, usage_location
from ..stores import open_store
from ..stores.base import Migrating
from .arguments import add_command, as_owner
from .changes import delete_tokens, in_force, now
from .listing import title
from .output import note
from .usage import copy_usage

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ..location import Location
    from ..stores.base import TokenStore
    from ..tokens import Token


def add_arguments(group: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands of this family to *group*."""
    command = add_command(
        group,
        copy,
        "copy",
        summary="put the tokens of one store, and their usage, into another; a second run changes nothing more",
        example="copy api_tokens.json -",
        in_store=False,
    )
    command.add_argument(
        "origin", metavar="FROM", help="a token file or the URL of a database; - for the one in FREEGPT_AUTH_STORE"
    )
    command.add_argument("target", metavar="TO", help="the same; its own tokens stay")
    command.add_argument("--delete", action="store_true", help="also delete the tokens of TO that FROM does not hold")

    add_command(
        group,
        migrate,
        "migrate",
        summary="make the tables of a database, or bring them to this release; may be run again at any time",
        example="--store postgresql://db/tokens migrate",
    )


def copy(options: argparse.Namespace) -> int:
    """Add the tokens of one store, and their usage, to another. A token that is revoked in either is revoked there."""
    origin, target = copied_locations(options.origin, options.target)
    with as_owner(target):
        _copy(origin, target, delete=options.delete)
    return 0


def _copy(origin: Location, target: Location, *, delete: bool) -> None:
    to = open_store(target)
    with as_owner_of(origin):  # also for the import of a driver
        source = open_store(origin)
        tokens = source.tokens()
    if not tokens:
        raise StoreError(f"{source.source} holds no tokens, so nothing was copied; is it the right one?")
    usage_from, usage_to = _usage_of(origin), _usage_of(target)  # before any change: a setting may be wrong
    merged, there = to.merge(tokens), to.tokens()
    copy_usage(usage_from, usage_to, {tokens[digest].id: there[digest].id for digest in tokens if digest in there})
    note(
        f"Copied {len(tokens)} token(s) from {source.source} to {to.source}: {merged.added} new, "
        f"{merged.revoked} revoked now, {len(tokens) - merged.added - merged.revoked} there already."
        f"{in_force(to, '')}"
    )
    others = [token for digest, token in there.items() if digest not in tokens]
    if not delete:
        _report_others(to, others, source.source)
        return
    for token in delete_tokens(to, others, lambda: usage_to):
        note(f"Deleted token {title(token)}, which {source.source} does not hold.{in_force(to, '')}")


def _usage_of(location: Location) -> Location | None:
    """Return the location of the usage: a database keeps its own, for files ``FREEGPT_AUTH_USAGE`` may name another."""
    return usage_location(location, location.text if location.is_database else None)


def _report_others(target: TokenStore, others: Sequence[Token], origin: str) -> None:
    active = [token for token in others if token.status(now(target).timestamp()) == "active"]
    if not active:
        return
    note(f"{target.source} accepts {len(active)} token(s) more, which {origin} does not hold:")
    for token in active:
        note(f"  {token.id}  {title(token)}")
    note("If they were deleted there, run the same again with --delete.")


def migrate(options: argparse.Namespace) -> int:
    """Bring a database to the schema that this release works with."""
    store = open_store(options.store)
    if not isinstance(store, Migrating):
        note(f"{store.source} is a token file, which needs no schema: there is nothing to do.")
        return 0
    before, after = store.migrate()
    done = "has version" if before == after else f"was brought from version {before} to version"
    note(f"{store.source} {done} {after} of the schema.")
    return 0
