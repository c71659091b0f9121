"""Subscription to the notifications of new revisions, and a test whether they arrive: some poolers deliver none."""

from __future__ import annotations

import contextlib
import secrets
import time
from typing import TYPE_CHECKING

from .schema import CHANNEL

if TYPE_CHECKING:
    from .address import Address
    from .connection import Connection


def listen(connection: Connection, address: Address, time_limit: float) -> bool:
    """Subscribe *connection* to new revisions; return whether a test notification arrived within *time_limit* seconds.

    A pooler in transaction mode gives each transaction another session, and delivers no notifications.

    Raises:
        psycopg.Error: the database does not answer.
    """
    own = f"{CHANNEL}-{secrets.token_hex(8)}"
    connection.run(f'LISTEN "{CHANNEL}"')
    connection.run(f'LISTEN "{own}"')
    # Notify from another connection: a pooler may deliver a connection's own notifications, and no others.
    with contextlib.closing(address.connect()) as other:
        other.run("SELECT pg_notify(%s, '')", (own,))
    deadline = time.monotonic() + time_limit
    while (left := deadline - time.monotonic()) > 0:
        if own in connection.notifications(left):
            connection.run(f'UNLISTEN "{own}"')
            return True
    return False
